"""What a model's file says that changes no answer does not reach the shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeload_export.graph.load import load


def test_tensors_in_attributes_have_no_names(tmp_path: Path) -> None:
    """optimum names them where it keeps weights in a file of their own, and not elsewhere."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["y"], value=numpy_helper.from_array(np.ones(1), "a name")),
    ]
    one, two = ([helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["n"])] for name in ("x", "y"))
    graph = helper.make_graph(nodes, "toy", one, two)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    assert [item.t.name for node in load(tmp_path / "m.onnx").nodes for item in node.attribute] == [""]
