"""A shard may be read without being kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.engine.storage.reading import (
    WAYS,
    expected_of,
    note_direct_reads,
    open_storage,
)

from pipeload.errors import ShardError
from pipeload.format.manifest import PAGE_BYTES
from pipeload.storage.buffers import Buffer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("direct", [True, False])
def test_a_stream_reads_all_of_a_shard_into_the_same_memory(
    toy: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None], direct: bool
) -> None:
    way(monkeypatch)
    storage, shard, _ = open_storage(toy)
    scratch, seen = Buffer(PAGE_BYTES), bytearray()
    for nbytes in storage.stream_weights(shard, scratch, direct=direct):
        assert 0 < nbytes <= PAGE_BYTES
        seen += scratch.piece(0, nbytes)
    assert bytes(seen) == expected_of(toy, shard)


def test_only_a_direct_stream_asks_for_direct_io(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, shard, _ = open_storage(toy)
    seen = note_direct_reads(monkeypatch)
    for direct in (True, False):
        assert sum(storage.stream_weights(shard, Buffer(1 << 20), direct=direct)) == shard.nbytes
    assert seen == [True, False]


def test_a_stream_that_is_left_closes_its_file(toy: Path, descriptors: Callable[[], int]) -> None:
    storage, shard, _ = open_storage(toy)
    before = descriptors()
    stream = storage.stream_weights(shard, Buffer(PAGE_BYTES))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert descriptors() == before


def test_a_stream_of_a_shard_without_weights_is_empty(toy: Path) -> None:
    storage, shard, _ = open_storage(toy)
    assert list(storage.stream_weights(replace(shard, weights=None, tensors=()), Buffer(1))) == []


def test_a_stream_of_a_file_that_is_cut_is_named(toy_copy: Path) -> None:
    storage, shard, path = open_storage(toy_copy)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ShardError, match="bytes, the manifest says"):
        list(storage.stream_weights(shard, Buffer(PAGE_BYTES)))
