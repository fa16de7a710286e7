"""Graphs that onnxruntime's optimisers wrote: with fused operators, some of them in ONNX's name but not ONNX's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from onnxruntime import GraphOptimizationLevel
from tests.marks import slow, survey
from tests.variants.conftest import MODELS

_LEVELS = {
    "basic": GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_FAMILY = {"bert": "bert", "vit": "vit", "llama": "gpt2"}
_MARKS = {("bert", "all", 13): pytest.param, ("vit", "extended", 18): slow, ("llama", "all", 18): slow}


@pytest.mark.parametrize(
    ("name", "level", "opset"),
    [
        _MARKS.get((name, level, opset), survey)(name, level, opset)
        for name in MODELS
        for level in _LEVELS
        for opset in (13, 18)
    ],
)
def test_saved_by_onnxruntime(
    name: str, level: str, opset: int, variant: Callable[..., Path], assert_right: Callable[..., Any]
) -> None:
    def optimise(source: Path, target: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = _LEVELS[level]
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 4
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    manifest = assert_right(variant(name, optimise, opset), name)
    assert sum(shard.role == "block" for shard in manifest.shards) == 3


@pytest.mark.parametrize(
    ("name", "opset"),
    [("bert", 18), slow("vit", 13), survey("llama", 13), survey("llama", 18)],
)
def test_saved_by_the_transformers_optimiser(
    name: str, opset: int, variant: Callable[..., Path], assert_right: Callable[..., Any]
) -> None:
    def optimise(source: Path, target: Path) -> None:
        from onnxruntime.transformers import optimizer

        result = optimizer.optimize_model(
            str(source), model_type=_FAMILY[name], num_heads=4, hidden_size=64, opt_level=0
        )
        result.save_model_to_file(str(target))

    manifest = assert_right(variant(name, optimise, opset), name)
    assert sum(shard.role == "block" for shard in manifest.shards) >= 2
