"""A damaged graph is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.engine.storage.reading import (
    cut,
    flip,
    open_storage,
)

from pipeload.errors import ShardError


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "cannot be read"),
        (lambda p: cut(p, 1), "bytes, the manifest says"),
        (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "bytes, the manifest says"),
        (lambda p: flip(p, 20), "is damaged"),
    ],
    ids=["missing", "truncated", "grown", "flipped"],
)
def test_a_damaged_graph_is_named(toy_copy: Path, damage: Callable[[Path], None], words: str) -> None:
    storage, shard, _ = open_storage(toy_copy)
    damage(toy_copy / shard.graph.path)
    with pytest.raises(ShardError, match=words) as caught:
        storage.graph(shard)
    assert "shards/block.001.onnx" in str(caught.value)


def test_a_graph_that_changes_size_later_is_named(toy_copy: Path) -> None:
    storage, shard, _ = open_storage(toy_copy)
    assert storage.graph(shard) == toy_copy / shard.graph.path
    cut(toy_copy / shard.graph.path, 1)
    with pytest.raises(ShardError, match="bytes, the manifest says"):
        storage.graph(shard)
