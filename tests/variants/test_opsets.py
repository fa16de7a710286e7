"""Graphs of every version of ONNX that people have: each is split, and answers as it did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from tests.marks import slow, survey
from tests.variants.conftest import MODELS, Source

from pipeload.format.manifest import Manifest

_MARKS = {("bert", 11): pytest.param} | dict.fromkeys(
    [("vit", 13), *(("llama", opset) for opset in (13, 20, 24))], slow
)


def block_operators(manifest: Manifest, directory: Path) -> list[str]:
    block = next(shard for shard in manifest.shards if shard.role == "block")
    return [node.op_type for node in onnx.load(directory / block.graph.path, load_external_data=False).graph.node]


@pytest.mark.parametrize(
    ("name", "opset"),
    [_MARKS.get((name, opset), survey)(name, opset) for name in MODELS for opset in range(11, 25)],
)
def test_every_opset_is_right(name: str, opset: int, source: Source, assert_right: Callable[..., Any]) -> None:
    manifest = assert_right(source(name, opset), name)
    assert sum(shard.role == "block" for shard in manifest.shards) == 3


@pytest.mark.slow
def test_shards_use_only_what_their_opset_has(source: Source, assert_right: Callable[..., Any], tmp_path: Path) -> None:
    """LayerNormalization came with opset 17; onnxruntime fuses it into graphs of any version."""
    for opset, there in ((13, False), (18, True)):
        manifest = assert_right(source("bert", opset), "bert", force=True)
        assert ("LayerNormalization" in block_operators(manifest, tmp_path / "target")) is there


def test_a_decoder_of_the_newest_opset_has_fused_norms(
    source: Source, assert_right: Callable[..., Any], tmp_path: Path
) -> None:
    """ONNX's name for onnxruntime's SimplifiedLayerNormalization, from opset 23 on; caches in place take 24."""
    manifest = assert_right(source("llama", 20), "llama")
    assert all(cache.in_place for cache in manifest.caches)
    assert block_operators(manifest, tmp_path / "target").count("RMSNormalization") == 2
