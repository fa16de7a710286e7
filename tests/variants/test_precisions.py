"""Graphs of low precision answer as in onnxruntime, which itself rounds elsewhere at each optimisation level."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tests.marks import slow, survey
from tests.variants.changes import PRECISIONS, bfloat16, half
from tests.variants.conftest import MODELS

from pipeload.errors import ExportError
from pipeload_export import export, verify

_MARKS = {("vit", "fp16-inside"): pytest.param} | dict.fromkeys(
    [("bert", "int8-qdq"), ("vit", "int8-operators"), ("llama", "int4")], slow
)
_ROUNDING = 1e-2
"""Of float16 inside; static int8 is held against the graph as onnxruntime optimises it."""


@pytest.mark.parametrize(
    ("name", "precision"),
    [_MARKS.get((name, precision), survey)(name, precision) for name in MODELS for precision in PRECISIONS],
)
def test_each_precision_is_right(
    name: str, precision: str, variant: Callable[..., Path], assert_right: Callable[..., Any]
) -> None:
    limit = {"fp16": _ROUNDING, "fp16-inside": _ROUNDING, "int8-qdq": 0.1}.get(precision, 1e-4)
    manifest = assert_right(variant(name, PRECISIONS[precision]), name, limit=limit)
    assert len(manifest.caches) == sum(spec.name.startswith("past") for spec in manifest.inputs)
    assert sum(shard.role == "block" for shard in manifest.shards) >= 2


def test_bfloat16_throughout_is_refused_in_onnxruntimes_words(variant: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"onnxruntime does not open .*model\.onnx"):
        export(variant("bert", bfloat16), tmp_path / "target", task="feature-extraction")


def test_a_wrong_weight_shows_through_the_rounding(variant: Callable[..., Path], tmp_path: Path) -> None:
    path = variant("bert", half(keep_io_types=True))
    manifest = export(path, tmp_path / "target", task="feature-extraction")
    assert {result.limit for result in manifest.verification} == {_ROUNDING}
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and tensor.data_type == 10)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float16(2), weight.name))
    onnx.save(model, path)
    with pytest.raises(ExportError, match="differs from the unsplit model by"):
        verify(tmp_path / "target", path)
