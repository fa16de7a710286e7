"""A damaged graph is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.engine.storage.reading import (
    cut,
    flip,
    open_graph,
    open_storage,
    raising,
    short_reads,
)

from pipeload.errors import ShardError
from pipeload.storage import stamps as stamping
from pipeload.storage import weights as storages


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
    assert storage.graph(shard).path == toy_copy / shard.graph.path
    cut(toy_copy / shard.graph.path, 1)
    with pytest.raises(ShardError, match="bytes, the manifest says"):
        open_graph(storage, shard)


@pytest.mark.parametrize("change", [lambda p: flip(p, 20), _replace_for_a_moment, Path.unlink])
@pytest.mark.parametrize("known", [True, False])
def test_onnxruntime_gets_the_bytes_that_were_checked_whatever_becomes_of_the_path(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], known: bool
) -> None:
    monkeypatch.setattr(stamping, "_FRESH_NS", -1 if known else 1 << 62)
    storage, shard, _ = open_storage(toy_copy)
    right = (toy_copy / shard.graph.path).read_bytes()
    for _ in range(2):
        open_graph(storage, shard)
    read = os.pread

    def then_change(descriptor: int, size: int, at: int) -> bytes:
        data = read(descriptor, size, at)
        change(toy_copy / shard.graph.path)
        return data

    with monkeypatch.context() as patch:
        patch.setattr(storages.os, "pread", then_change)
        assert open_graph(storage, shard) == right


@pytest.mark.parametrize("known", [True, False])
def test_a_graph_that_is_overwritten_before_it_is_read_is_named(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    monkeypatch.setattr(stamping, "_FRESH_NS", -1 if known else 1 << 62)
    storage, shard, _ = open_storage(toy_copy)
    open_graph(storage, shard)
    read = os.pread

    def change_first(descriptor: int, size: int, at: int) -> bytes:
        flip(toy_copy / shard.graph.path, 20)
        return read(descriptor, size, at)

    monkeypatch.setattr(storages.os, "pread", change_first)
    with pytest.raises(ShardError, match="is damaged"):
        open_graph(storage, shard)


def test_a_graph_that_comes_in_several_reads_is_whole(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, shard, _ = open_storage(toy)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, nbytes, at: real(descriptor, max(1, nbytes // 3), at))
    assert open_graph(storage, shard) == (toy / shard.graph.path).read_bytes()


def test_a_graph_of_which_the_disk_brings_nothing_is_named(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, shard, _ = open_storage(toy)
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    nbytes = shard.graph.nbytes
    with pytest.raises(ShardError, match=rf"'{shard.graph.path}' brought no byte 0, although it has {nbytes} bytes"):
        open_graph(storage, shard)


def test_a_graph_that_is_cut_before_it_is_read_is_named(toy_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, shard, _ = open_storage(toy_copy)
    read, path = os.pread, toy_copy / shard.graph.path

    def cut_first(*arguments: int) -> bytes:
        os.truncate(path, shard.graph.nbytes - 1)
        return read(*arguments)

    monkeypatch.setattr(os, "pread", cut_first)
    with pytest.raises(
        ShardError, match=rf"has {shard.graph.nbytes - 1} bytes, the manifest says {shard.graph.nbytes}"
    ):
        open_graph(storage, shard)


def test_a_graph_beyond_the_limit_is_refused_unread(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, shard, _ = open_storage(toy)
    for nbytes, refused in ((shard.graph.nbytes, False), (shard.graph.nbytes - 1, True)):
        monkeypatch.setattr(storages, "_MOST_GRAPH_BYTES", nbytes)
        if not refused:
            open_graph(storage, shard)
            continue
        monkeypatch.setattr(os, "pread", raising(AssertionError("it is read")))
        with pytest.raises(ShardError, match=rf"has {nbytes + 1} bytes, and a shard's graph has at most {nbytes}"):
            open_graph(storage, shard)
