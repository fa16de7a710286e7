"""A damaged graph is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.engine.storage.reading import (
    cut,
    flip,
    open_graph,
    open_storage,
    short_reads,
)

from pipeload.errors import ShardError
from pipeload.storage import stamps as stamping


def _replace_for_a_moment(path: Path) -> None:
    good = path.rename(path.with_suffix(".good"))
    path.write_bytes(b"bad")
    good.replace(path)


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
        open_graph(storage, shard)
    assert "shards/block.001.onnx" in str(caught.value)


def test_short_reads_of_a_graph_are_no_damage(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_reads(monkeypatch)
    storage, shard, _ = open_storage(toy)
    assert open_graph(storage, shard) == (toy / shard.graph.path).read_bytes()


def test_a_graph_that_changes_size_later_is_named(toy_copy: Path) -> None:
    storage, shard, _ = open_storage(toy_copy)
    with storage.graph(shard) as graph:
        assert graph.path == toy_copy / shard.graph.path
    cut(toy_copy / shard.graph.path, 1)
    with pytest.raises(ShardError, match="bytes, the manifest says"):
        open_graph(storage, shard)


@pytest.mark.parametrize("change", [lambda p: flip(p, 20), _replace_for_a_moment, Path.unlink])
@pytest.mark.parametrize("known", [True, False])
def test_a_graph_that_changes_while_it_is_opened_is_named(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], known: bool
) -> None:
    # Between the check and onnxruntime's own opening of the path, another file could take the graph's place.
    monkeypatch.setattr(stamping, "_FRESH_NS", -1 if known else 1 << 62)
    storage, shard, _ = open_storage(toy_copy)
    for _ in range(2):
        open_graph(storage, shard)
    with pytest.raises(ShardError, match=r"block\.001\.onnx' (changed while it was opened|cannot be read)"):
        open_graph(storage, shard, change)
