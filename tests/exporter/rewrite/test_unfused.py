"""Products that onnxruntime fused with what follows are taken apart: the same answers, of a plain product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeload_export.graph.graph import tensor_proto
from pipeload_export.graph.load import load
from pipeload_export.graph.types import plain_model
from pipeload_export.rewrite.matrices import find_matrices
from pipeload_export.rewrite.unfused import take_products_apart

WIDTH = 64


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("FusedGemm", {"activation": "Relu"}),
        ("FusedGemm", {"activation": "LeakyRelu", "activation_alpha": 0.3, "transB": 1}),
        ("FusedMatMul", {"alpha": 0.25}),
        ("FusedMatMul", {"alpha": 0.25, "transB": 1}),
    ],
    ids=str,
)
def test_a_fused_product_is_a_plain_one_and_the_rest(kind: str, attributes: dict[str, Any], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = {"weight": (WIDTH, WIDTH), **({"bias": (WIDTH,)} if kind == "FusedGemm" else {})}
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(kind, ["x", *values], ["y"], domain="com.microsoft", **attributes)],
            "fused",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])],
            [numpy_helper.from_array(random.standard_normal(s).astype(np.float32), n) for n, s in values.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "fused.onnx")
    graph = load(tmp_path / "fused.onnx")
    assert not find_matrices(graph)
    take_products_apart(graph)
    assert [matrix.name for matrix in find_matrices(graph)] == ["weight"]
    constants = [tensor_proto(name, constant) for name, constant in graph.constants.items()]
    apart = plain_model(graph, graph.nodes, graph.inputs, graph.outputs, constants)
    x = random.standard_normal((3, WIDTH)).astype(np.float32)
    found, wanted = (
        ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for one in (apart, model)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
