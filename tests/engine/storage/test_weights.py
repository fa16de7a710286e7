"""Bytes come out of the files as they went in, however they are read."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.engine.storage.reading import (
    WAYS,
    content_of,
    expected_of,
    flip,
    never,
    note_direct_reads,
    open_graph,
    open_storage,
    parts_of,
    read_shard,
    short_reads,
)

from pipeload.errors import ShardError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import PAGE_BYTES
from pipeload.format.pages import page_ceil
from pipeload.storage import ranges
from pipeload.storage import stamps as stamping
from pipeload.storage import weights as storages
from pipeload.storage.buffers import Buffer, Part, tensor_in
from pipeload.storage.weights import Storage


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("piece_bytes", [PAGE_BYTES, 8 << 20])
def test_every_way_to_read_gives_the_same_bytes(
    toy_decoder: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None], piece_bytes: int
) -> None:
    way(monkeypatch)
    monkeypatch.setattr(storages, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(storages, "_MOST_PIECE_BYTES", piece_bytes)
    manifest = manifests.read(toy_decoder)
    storage = Storage(toy_decoder, manifest)
    for direct in (True, False):
        for shard in manifest.shards:
            assert read_shard(storage, shard, direct=direct) == expected_of(toy_decoder, shard)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("piece_bytes", [PAGE_BYTES, 8 << 20])
@pytest.mark.parametrize("cuts", [(4096,), (2000,), (11_000,), (1, 11_000, 16_384), (8192, 8192)], ids=str)
def test_parts_hold_the_same_bytes_and_are_checked_together(
    toy_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[[pytest.MonkeyPatch], None],
    piece_bytes: int,
    cuts: tuple[int, ...],
) -> None:
    way(monkeypatch)
    monkeypatch.setattr(storages, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(storages, "_MOST_PIECE_BYTES", piece_bytes)
    storage, shard, path = open_storage(toy_copy)
    assert read_shard(storage, shard, *cuts) == expected_of(toy_copy, shard)
    flip(path, -shard.nbytes + cuts[0])
    storage, shard, path = open_storage(toy_copy)
    with pytest.raises(ShardError, match="is damaged"):
        read_shard(storage, shard, *cuts)


def test_one_part_alone_of_a_file_that_was_found_right_is_all_that_is_read(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamping, "_FRESH_NS", -1)
    storage, shard, path = open_storage(toy_copy)
    read_shard(storage, shard)
    asked: list[tuple[int, int]] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: (asked.append((at, len(views[0]))), real(fd, views, at))[1])
    part = parts_of(shard, 11_000)[1]
    assert storage.read_weights(shard, [part], never)
    assert content_of([part]) == expected_of(toy_copy, shard)[11_000:]
    # Nothing but the part's own pages: the range begins at the file's second page.
    assert asked == [(4096 + 8192, page_ceil(shard.nbytes) - 8192)]
    flip(path, -1)
    with pytest.raises(ShardError, match="is damaged"):
        read_shard(storage, shard)


@pytest.mark.parametrize("direct", [True, False])
def test_direct_says_how_files_are_opened(toy: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    storage, shard, _ = open_storage(toy)
    seen = note_direct_reads(monkeypatch)
    read_shard(storage, shard, direct=direct)
    assert set(seen) == {direct}


def test_a_file_system_in_memory_gives_the_same_bytes(toy: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        pytest.skip("/dev/shm cannot be written")
    directory = memory / f"pipeload-test-{os.getpid()}"
    shutil.copytree(toy, directory)
    try:
        storage, shard, _ = open_storage(directory)
        assert read_shard(storage, shard) == expected_of(toy, shard)
    finally:
        shutil.rmtree(directory)


def test_tensors_are_views_into_the_buffer(toy: Path) -> None:
    storage, shard, path = open_storage(toy)
    assert shard.weights is not None
    parts = parts_of(shard, shard.tensors[1].offset - shard.weights.offset)
    storage.read_weights(shard, parts, never)
    content = path.read_bytes()
    for spec in shard.tensors:
        array = tensor_in(parts, spec, shard.weights.offset)
        expected = np.frombuffer(content, spec.dtype, array.size, spec.offset).reshape(spec.shape)
        np.testing.assert_array_equal(array, expected)
        array[...] = 0
    assert not any(content_of(parts))


def test_exported_weights_files_open_with_safetensors(exported: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    manifest = manifests.read(exported)
    storage = Storage(exported, manifest)
    for shard in manifest.shards:
        if shard.weights is None or shard.role == "head":
            continue
        parts = parts_of(shard)
        storage.read_weights(shard, parts, never)
        expected = numpy.load_file(exported / shard.weights.path)
        for spec in shard.tensors:
            np.testing.assert_array_equal(tensor_in(parts, spec, shard.weights.offset), expected[spec.name])


def test_a_shard_without_weights_reads_nothing(toy: Path) -> None:
    storage, shard, _ = open_storage(toy)
    bare = replace(shard, weights=None, tensors=())
    parts = parts_of(bare)
    assert storage.read_weights(bare, parts, never)
    assert content_of(parts) == b""


def test_reading_leaves_no_descriptor_open(toy: Path, descriptors: Callable[[], int]) -> None:
    storage, shard, _ = open_storage(toy)
    before = descriptors()
    for _ in range(3):
        read_shard(storage, shard)
        read_shard(storage, shard, 11_000, direct=False)
        open_graph(storage, shard)
    assert descriptors() == before


def test_reads_grow_where_they_are_fast_and_not_where_they_are_slow(
    toy_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storages, "_PIECE_BYTES", PAGE_BYTES)
    manifest = manifests.read(toy_large)
    shard = max(manifest.shards, key=lambda shard: shard.nbytes)
    sizes: dict[float, list[int]] = {}
    preadv = os.preadv
    for seconds in (1e-6, 1.0):
        clock = itertools.count(step=seconds)
        monkeypatch.setattr(ranges.time, "perf_counter", lambda clock=clock: next(clock))
        seen = sizes.setdefault(seconds, [])

        def noting(descriptor: int, buffers: list[memoryview], offset: int, seen: list[int] = seen) -> int:
            seen.append(buffers[0].nbytes)
            return preadv(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", noting)
        buffer = Buffer(shard.nbytes)
        assert Storage(toy_large, manifest).read_weights(shard, [Part(0, shard.nbytes, buffer)], lambda: False)
    assert set(sizes[1.0]) == {PAGE_BYTES}
    assert sizes[1e-6][:2] == [PAGE_BYTES, page_ceil(shard.nbytes) - PAGE_BYTES]


def test_a_cancelled_read_stops_at_the_next_piece(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "_PIECE_BYTES", PAGE_BYTES)
    monkeypatch.setattr(storages, "_MOST_PIECE_BYTES", PAGE_BYTES)
    storage, shard, _ = open_storage(toy)
    for cuts in ((), (11_000,)):
        answers = iter([False, False, True])
        parts = parts_of(shard, *cuts)
        assert not storage.read_weights(shard, parts, answers.__next__)
        # The first piece was there, and the one on the way when it was cancelled.
        assert content_of(parts)[2 * PAGE_BYTES :] == b"\xaa" * (shard.nbytes - 2 * PAGE_BYTES)
        assert next(answers, None) is None
    # A range that was not read to the end does not count as verified.
    assert read_shard(storage, shard) == expected_of(toy, shard)


def test_a_cancelled_read_does_not_count_as_verified(toy_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "_PIECE_BYTES", PAGE_BYTES)
    monkeypatch.setattr(storages, "_MOST_PIECE_BYTES", PAGE_BYTES)
    storage, shard, path = open_storage(toy_copy)
    answers = iter([False, True])
    assert not storage.read_weights(shard, parts_of(shard), lambda: next(answers))
    flip(path, -1)
    with pytest.raises(ShardError, match="is damaged"):
        read_shard(storage, shard)


def test_a_graph_comes_in_any_number_of_reads(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, shard, _ = open_storage(toy)
    short_reads(monkeypatch)
    assert open_graph(storage, shard) == (toy / shard.graph.path).read_bytes()
