"""A shard may be read without being kept."""

from __future__ import annotations

import errno
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
    raising,
    read_shard,
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


def test_a_shard_that_is_to_be_read_from_the_disk_leaves_the_page_cache(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, shard, path = open_storage(toy_copy)
    assert shard.weights is not None
    advised: list[tuple[str, int, int, int]] = []

    def note(descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        advised.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), offset, nbytes, advice))

    monkeypatch.setattr(os, "posix_fadvise", note)
    storage.forget_cached(shard)
    assert advised == [(str(path), shard.weights.offset, shard.weights.nbytes, os.POSIX_FADV_DONTNEED)]
    storage.forget_cached(replace(shard, weights=None, tensors=()))
    assert len(advised) == 1


def test_a_page_cache_that_takes_no_advice_keeps_a_shard(toy_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read all the same; where the system refuses the advice, too."""
    storage, shard, _ = open_storage(toy_copy)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fadvise", raising(OSError(errno.ENODEV, "No such device")))
        storage.forget_cached(shard)
    monkeypatch.delattr(os, "posix_fadvise")
    storage.forget_cached(shard)
    assert read_shard(storage, shard) == expected_of(toy_copy, shard)
