"""A file whose digest leaves out the shards' ranges is checked whole all the same: each byte by one digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.digests import expected_record
from tests.engine.storage.reading import flip
from tests.engine.toy import make_toy

from pipeload.errors import ShardError
from pipeload.format.manifest import FileRecord, Manifest, Shard, read, write
from pipeload.storage import weights
from pipeload.storage.digests import FileDigests
from pipeload.storage.weights import Storage

TABLE = "shards/embeddings.safetensors"


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
@pytest.mark.parametrize("ranges", [[], [(10, 90)], [(0, 5), (5, 30), (40, 41)], [(20, 60), (30, 300)], [(300, 300)]])
def test_digests_are_those_of_the_parts_however_the_bytes_come(ranges: list[tuple[int, int]], piece: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, 300, np.uint8).tobytes()
    beside = bytes(byte for at, byte in enumerate(data) if not any(begin <= at < end for begin, end in ranges))
    for apart in (True, False):
        digests = FileDigests(ranges, apart=apart)
        for begin in range(0, len(data), piece):
            digests.update(data[begin : begin + piece])
        assert digests.position == len(data)
        assert digests.sha256 == hashlib.sha256(beside if apart else data).hexdigest()
        for begin, end in ranges:
            assert digests.range_sha256(begin, end) == hashlib.sha256(data[begin:end]).hexdigest()


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy whose weights files have digests without the shards' ranges; slices of the table are its head.

    Its files are as if just written, however long a test takes: the table of an older one is checked by the slices.
    """
    monkeypatch.setattr(weights, "is_fresh", lambda _: True)
    directory = make_toy(tmp_path / "model", decoder=True)
    manifest = read(directory)
    files = [
        expected_record(directory, record.path, manifest.shards, apart=True)
        if record.path.endswith(".safetensors")
        else record
        for record in manifest.files
    ]
    write(replace(manifest, files=tuple(files)), directory)
    return directory


def read_row(directory: Path) -> None:
    manifest = read(directory)
    storage = Storage(directory, manifest)
    storage.read_rows(manifest.shards[0].lookups[0], np.array([1]), keep_cached=True)


@pytest.mark.parametrize("at", [-1, -5000])
def test_damage_of_a_table_is_found_where_slices_have_digests_of_their_own(apart: Path, at: int) -> None:
    read_row(apart)
    flip(apart / TABLE, at)
    with pytest.raises(ShardError, match=rf"'{TABLE}' is damaged: its sha256"):
        read_row(apart)


def other_file(manifest: Manifest) -> Manifest:
    def changed(record: FileRecord) -> FileRecord:
        return replace(record, sha256="0" * 64) if record.path == TABLE else record

    return replace(manifest, files=tuple(map(changed, manifest.files)))


def other_slice(manifest: Manifest) -> Manifest:
    def changed(shard: Shard) -> Shard:
        if shard.role != "head" or shard.weights is None:
            return shard
        return replace(shard, weights=replace(shard.weights, sha256="0" * 64))

    return replace(manifest, shards=tuple(map(changed, manifest.shards)))


@pytest.mark.parametrize("change", [other_file, other_slice])
def test_all_digests_of_a_table_count(apart: Path, change: Callable[[Manifest], Manifest]) -> None:
    write(change(read(apart)), apart)
    with pytest.raises(ShardError, match=rf"'{TABLE}' is damaged: its sha256"):
        read_row(apart)
