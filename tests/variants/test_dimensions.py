"""Dimensions as graphs declare them: fixed, without a name, with one name for all, a name for each, or impossible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx.onnx_ml_pb2 import TensorShapeProto
from tests.marks import slow, survey
from tests.variants.conftest import MODELS

from pipeload.format.manifest import Manifest


def _unnamed(dim: TensorShapeProto.Dimension, place: int) -> None:
    dim.Clear()


def _question_mark(dim: TensorShapeProto.Dimension, place: int) -> None:
    dim.dim_param = "?"


def _negative(dim: TensorShapeProto.Dimension, place: int) -> None:
    dim.dim_value = -1


def _own_name(dim: TensorShapeProto.Dimension, place: int) -> None:
    dim.dim_param = f"unk__{place}"


def _fixed(dim: TensorShapeProto.Dimension, place: int) -> None:
    sizes = {"batch_size": 2, "sequence_length": 7, "num_channels": 3, "height": 32, "width": 32}
    dim.dim_value = sizes.get(dim.dim_param, 7)


def _formula(dim: TensorShapeProto.Dimension, place: int) -> None:
    dim.dim_param = f"Max(0, -Min(64, {dim.dim_param}) + {dim.dim_param})"


_WAYS = {
    "unnamed": _unnamed,
    "?": _question_mark,
    "-1": _negative,
    "names": _own_name,
    "fixed": _fixed,
    "formula": _formula,
}
_OF_ONE_SIDE = {"fixed": "input", "formula": "output"}
_MARKS = dict.fromkeys([("bert", "?"), ("bert", "fixed"), ("vit", "-1")], pytest.param) | dict.fromkeys(
    [("bert", "formula"), ("llama", "formula")], slow
)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        _MARKS.get((name, way), survey)(name, way)
        for name in MODELS
        for way in _WAYS
        if (name, way) != ("llama", "fixed")
    ],
)
def test_sizes_that_belong_together_are_found(
    name: str, way: str, variant: Callable[..., Path], assert_right: Callable[..., Any]
) -> None:
    def change(source: Path, target: Path) -> None:
        model = onnx.load(source)
        sides = [_OF_ONE_SIDE[way]] if way in _OF_ONE_SIDE else ["input", "output"]
        values = [value for side in sides for value in getattr(model.graph, side)]
        for place, dim in enumerate(dim for value in values for dim in value.type.tensor_type.shape.dim):
            if dim.dim_param:
                _WAYS[way](dim, place)
        del model.graph.value_info[:]
        onnx.save(model, target)

    manifest: Manifest = assert_right(variant(name, change), name)
    assert sum(shard.role == "block" for shard in manifest.shards) == 3
    batches = {spec.shape[0] for spec in manifest.inputs}
    assert batches == ({2} if way == "fixed" else {next(iter(batches))})
    if name == "llama" and way not in _OF_ONE_SIDE:
        shapes = {spec.name: spec.shape for spec in manifest.inputs}
        assert shapes["attention_mask"][1] == (f"{shapes['input_ids'][1]} + {shapes['past_key_values.0.key'][2]}")
