"""Graphs that onnxruntime or the format cannot take are refused with the true reason, and never with a traceback."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, helper
from tests.exporter.graphs import encoder

from pipeload.errors import ExportError
from pipeload_export import export


def _unknown_operator(model: ModelProto) -> None:
    model.graph.node[-2].op_type = "NoSuchOperator"


def _unknown_domain(model: ModelProto) -> None:
    model.graph.node[-2].domain = "someones.own"
    model.opset_import.append(helper.make_opsetid("someones.own", 1))


def _float_ids(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def _too_new(model: ModelProto) -> None:
    model.opset_import[0].version = 99


def _sequence(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("SequenceConstruct", ["hidden"], ["states"]))
    model.graph.output.append(helper.make_tensor_sequence_value_info("states", onnx.TensorProto.FLOAT, None))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_unknown_operator, r"onnxruntime does not open .*model\.onnx: .*NoSuchOperator"),
        (_unknown_domain, r"onnxruntime does not open .*model\.onnx: .*someones\.own:LayerNormalization"),
        (_float_ids, r"onnxruntime does not open .*model\.onnx: .*Type Error"),
        (_too_new, r"onnxruntime does not open .*model\.onnx: .*[Oo]pset"),
        (_sequence, "'states' of .* is no tensor"),
    ],
)
def test_the_true_reason_is_given(spoil: Callable[[ModelProto], None], reason: str, tmp_path: Path) -> None:
    model = encoder().model()
    spoil(model)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError) as caught:
        export(tmp_path / "model.onnx", tmp_path / "target")
    assert re.search(reason, str(caught.value)), caught.value
    assert "report the model" not in str(caught.value)
