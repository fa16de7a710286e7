"""Rows of tables are those that numpy would index, and a damaged table is named."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.storage.reading import (
    HEADER_DAMAGE,
    edit_tensor,
    expected_of,
    flip,
    raising,
    read_shard,
    replace_header,
    short_reads,
)

from pipeload.errors import ShardError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Lookup
from pipeload.storage import stamps as stamping
from pipeload.storage.weights import Storage


@pytest.fixture
def table(toy: Path) -> tuple[Storage, Lookup, Any]:
    manifest = manifests.read(toy)
    (lookup,) = manifest.shards[0].lookups
    content = (toy / lookup.path).read_bytes()
    size = int(np.prod(lookup.table.shape))
    whole = np.frombuffer(content, lookup.table.dtype, size, lookup.table.offset).reshape(lookup.table.shape)
    return Storage(toy, manifest), lookup, whole


_INDICES = [
    np.array([[3, 1, 3], [0, 95, 1]]),
    np.array([-1, 0, -96, 95]),
    np.array(7),
    np.array([], np.int64),
    np.zeros((2, 0, 3), np.int32),
    np.array([5, 5, 5], np.int32),
    np.array([[250], [1]], np.uint8) % 96,
    np.array([3, -3], np.int8),
    np.array([95], np.uint64),
    np.arange(96)[::-1].reshape(4, 24),
]


def test_rows_come_in_any_number_of_reads(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, lookup, whole = table
    short_reads(monkeypatch)
    indices = np.array([[3, 1, 3], [0, 95, 1]])
    for _ in range(2):
        np.testing.assert_array_equal(storage.read_rows(lookup, indices, keep_cached=False), whole[indices])


@pytest.mark.parametrize("indices", _INDICES, ids=lambda indices: f"{indices.dtype}{list(indices.shape)}")
@pytest.mark.parametrize("keep_cached", [True, False])
def test_rows_are_what_numpy_would_index(table: Any, indices: Any, keep_cached: bool) -> None:
    storage, lookup, whole = table
    rows = storage.read_rows(lookup, indices, keep_cached=keep_cached)
    assert rows.dtype == whole.dtype
    np.testing.assert_array_equal(rows, whole[indices])


def test_random_rows_are_what_numpy_would_index(table: Any) -> None:
    storage, lookup, whole = table
    random = np.random.default_rng(0)
    for _ in range(50):
        shape = random.integers(0, 6, random.integers(0, 4))
        indices = random.integers(-96, 96, shape)
        np.testing.assert_array_equal(storage.read_rows(lookup, indices, keep_cached=True), whole[indices])


@pytest.mark.parametrize("indices", [[96], [-97], [0, 1, 10**12], [[5], [-(10**12)]]])
def test_rows_beyond_the_table_are_an_index_error(table: Any, indices: Any) -> None:
    storage, lookup, _ = table
    with pytest.raises(IndexError, match=r"is no row of 'embeddings\.table', which has 96"):
        storage.read_rows(lookup, np.array(indices), keep_cached=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_rows_of_every_element_type_are_read(toy: Path, dtype: str) -> None:
    manifest = manifests.read(toy)
    (lookup,) = manifest.shards[0].lookups
    width = 256 // manifests.dtype_bytes(dtype)
    # The same bytes as another type: the header would not agree, so the manifest lists none of its tensors.
    other = replace(lookup, table=replace(lookup.table, name="other", dtype=dtype, shape=(96, width)))
    storage = Storage(toy, replace(manifest, shards=(replace(manifest.shards[0], lookups=()),)))
    rows = storage.read_rows(other, np.array([4, 2]), keep_cached=True)
    assert rows.dtype == ("uint16" if dtype == "bfloat16" else dtype)
    expected = storage.read_rows(
        replace(lookup, table=replace(lookup.table, name="other")), np.array([4, 2]), keep_cached=True
    )
    assert rows.tobytes() == expected.tobytes()


def test_rows_of_a_table_in_parts_come_from_their_own_part(toy: Path, table: Any) -> None:
    manifest = manifests.read(toy)
    _, lookup, whole = table
    row_bytes = whole[0].nbytes
    # The parts in another order than in the file: each row is found by its part's offset, not by the table's.
    order = [(64, 32), (0, 5), (5, 59)]
    parts = tuple(
        replace(
            lookup.table,
            name=f"part.{first}",
            shape=(count, *whole.shape[1:]),
            offset=lookup.table.offset + first * row_bytes,
        )
        for first, count in order
    )
    storage = Storage(toy, replace(manifest, shards=(replace(manifest.shards[0], lookups=()),)))
    expected = np.concatenate([whole[first : first + count] for first, count in order])
    for indices in (np.arange(96), np.array([[31, 32], [36, 37]]), np.array([-1, 0])):
        rows = storage.read_rows(replace(lookup, parts=parts), indices, keep_cached=False)
        np.testing.assert_array_equal(rows, expected[indices])


@pytest.mark.parametrize(("damage", "words"), HEADER_DAMAGE)
@pytest.mark.parametrize("again", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_table_file_that_is_not_the_exported_one_is_named(
    toy_copy: Path, damage: Callable[[Path], Any], words: str, again: bool, verify: bool
) -> None:
    manifest = manifests.read(toy_copy)
    (lookup,) = manifest.shards[0].lookups
    storage = Storage(toy_copy, manifest, verify=verify)
    if again:
        storage.read_rows(lookup, np.array([1]), keep_cached=True)
    damage(toy_copy / lookup.path)
    with pytest.raises(ShardError, match=r"shards/embeddings\.safetensors"):
        storage.read_rows(lookup, np.array([1]), keep_cached=True)


def test_a_foreign_table_file_is_named(toy_copy: Path, made_toys: Callable[[str], Path]) -> None:
    manifest = manifests.read(toy_copy)
    (lookup,) = manifest.shards[0].lookups
    shutil.copy(made_toys("toy-other") / lookup.path, toy_copy / lookup.path)
    with pytest.raises(ShardError, match=r"'shards/embeddings\.safetensors' is damaged"):
        Storage(toy_copy, manifest).read_rows(lookup, np.array([1]), keep_cached=True)


@pytest.mark.parametrize(
    "damage",
    [
        replace_header(b"{}"),
        edit_tensor(dtype="I32"),
        edit_tensor(shape=[16, 64]),
        edit_tensor(data_offsets=[64, 0]),
    ],
    ids=["none", "other dtype", "smaller", "other place"],
)
def test_a_slice_of_a_head_lies_within_a_tensor_of_its_file(
    toy_decoder: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    directory = Path(shutil.copytree(toy_decoder, tmp_path / "model"))
    manifest = manifests.read(directory)
    # Not tied: nothing else speaks of the file.
    manifest = replace(manifest, shards=tuple(replace(shard, lookups=()) for shard in manifest.shards))
    storage, head = Storage(directory, manifest, verify=False), manifest.shards[-2]
    assert read_shard(storage, head) == expected_of(directory, head)
    assert head.weights is not None
    damage(directory / head.weights.path)
    with pytest.raises(ShardError, match=r"'shards/embeddings\.safetensors' (is not the file|has a damaged .* header)"):
        read_shard(Storage(directory, manifest, verify=False), head)


def test_a_tied_table_is_checked_by_the_slices_of_its_head(
    toy_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamping, "_FRESH_NS", -1)
    # Each slice is loaded and checked before a pass has an answer: to read all of the table for it would be a waste.
    directory = Path(shutil.copytree(toy_decoder, tmp_path / "model"))
    manifest = manifests.read(directory)
    (lookup,) = manifest.shards[0].lookups
    flip(directory / lookup.path, -1)
    storage = Storage(directory, manifest)
    storage.read_rows(lookup, np.array([1]), keep_cached=True)
    read_shard(storage, manifest.shards[-2])
    with pytest.raises(ShardError, match=r"'shards/embeddings\.safetensors' is damaged"):
        read_shard(storage, manifest.shards[-1])


def test_a_table_beside_a_tied_head_is_checked(exported: Path, tmp_path: Path) -> None:
    manifest = manifests.read(exported)
    heads = {shard.weights.path for shard in manifest.shards if shard.role == "head" and shard.weights}
    tied = [lookup for shard in manifest.shards for lookup in shard.lookups if lookup.path in heads]
    if len({lookup.table.name for lookup in tied}) < 2:
        pytest.skip("no second table in the file of a tied head")
    copy = Path(shutil.copytree(exported, tmp_path / "model"))
    table = min((lookup.table for lookup in tied), key=lambda table: table.nbytes)
    with (copy / tied[0].path).open("r+b") as file:
        file.seek(table.offset)
        file.write(b"\x55" * 64)
    with pytest.raises(ShardError, match=r"embeddings\.safetensors' is damaged"):
        Storage(copy, manifest).read_rows(tied[0], np.array([1]), keep_cached=True)


def test_a_disk_that_fails_for_a_row_is_named(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, lookup, _ = table
    storage.read_rows(lookup, np.array([1]), keep_cached=True)
    monkeypatch.setattr(os, "preadv", raising(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(ShardError, match=r"'shards/embeddings\.safetensors' cannot be read: Input/output error"):
        storage.read_rows(lookup, np.array([1]), keep_cached=True)


def test_short_reads_bring_the_same_rows(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    short_reads(monkeypatch)
    storage, lookup, whole = table
    for _ in range(2):  # the header is parsed at the first, and compared at the second
        np.testing.assert_array_equal(storage.read_rows(lookup, np.array([7, 1]), keep_cached=True), whole[[7, 1]])


def test_rows_of_which_the_disk_brings_nothing_are_named(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, lookup, _ = table
    storage.read_rows(lookup, np.array([1]), keep_cached=True)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    begin = lookup.table.offset + 7 * lookup.table.nbytes // lookup.table.shape[0]
    with pytest.raises(ShardError, match=rf"'{lookup.path}' brought no byte {begin}, although it has"):
        storage.read_rows(lookup, np.array([7]), keep_cached=True)


def test_rows_are_read_where_the_page_cache_takes_no_advice(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, lookup, whole = table
    monkeypatch.delattr(os, "posix_fadvise")
    for keep_cached in (True, False):
        rows = storage.read_rows(lookup, np.array([7, 1]), keep_cached=keep_cached)
        np.testing.assert_array_equal(rows, whole[[7, 1]])
