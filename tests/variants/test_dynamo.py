"""Graphs of torch's own exporter (`torch.onnx.export(dynamo=True)`), which names and writes things in its own way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.marks import survey
from tests.models import seeded
from tests.variants.conftest import MODELS

pytestmark = pytest.mark.slow


def _export(folder: Path, name: str, attention: str, opset: int, *, external_data: bool) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    model_class, config_class, options, *_ = MODELS[name]
    model = seeded(model_class, config_class, {**options, "attn_implementation": attention, "use_cache": False})
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    text = torch.arange(18).reshape(2, 9)
    inputs: Mapping[str, Any] = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    dims: Mapping[str, Any] = {key: {0: batch, 1: length} for key in inputs}
    if name == "vit":
        inputs, dims = {"pixel_values": torch.zeros(2, 3, 32, 32)}, {"pixel_values": {0: batch}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (), kwargs=inputs, dynamic_shapes=dims, dynamo=True, opset_version=opset, verbose=False
        )
    program.save(str(folder / "model.onnx"), external_data=external_data)
    model.config.save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "attention", "opset", "external_data"),
    [
        ("bert", "sdpa", 18, True),
        ("llama", "sdpa", 20, False),
        survey("bert", "eager", 24, False),
        survey("llama", "eager", 22, True),
        survey("vit", "sdpa", 18, True),
        survey("vit", "eager", 21, False),
    ],
)
def test_a_graph_of_the_new_exporter_is_right(
    name: str,
    attention: str,
    opset: int,
    external_data: bool,
    tmp_path: Path,
    assert_right: Callable[..., Any],
) -> None:
    _export(tmp_path, name, attention, opset, external_data=external_data)
    manifest = assert_right(tmp_path / "model.onnx", name)
    assert sum(shard.role == "block" for shard in manifest.shards) == 3
