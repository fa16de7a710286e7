"""Reading is measured for every number of agents and both ways, and a reader that fails ends all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.engine.harness import PATIENCE_S, agents

from pipeload.errors import ShardError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Shard
from pipeload.measuring import bandwidth
from pipeload.measuring.bandwidth import measure_bandwidth
from pipeload.storage.buffers import Buffer
from pipeload.storage.weights import Storage


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a small model once for each figure."""
    monkeypatch.setattr(bandwidth, "_SMALL_MODEL_S", 0.0)


def test_every_number_of_agents_and_size_of_requests_has_a_bandwidth(toy_large: Path) -> None:
    manifest = manifests.read(toy_large)
    told: list[tuple[str, int, int]] = []
    found = measure_bandwidth(Storage(toy_large, manifest), manifest.shards, lambda *each: told.append(each))
    for figures, keys in (
        (found.read_bytes_per_s, [1, 2, 4, 8]),
        (found.cached_read_bytes_per_s, [1, 2, 4, 8]),
        (found.read_bytes_per_s_by_request, [1 << 20, 8 << 20]),
    ):
        assert list(figures) == keys
        assert all(value > 0 for value in figures.values())
    assert told == [("Reading", done, 13) for done in range(14)]


def test_a_model_without_weights_has_no_bandwidth(toy: Path) -> None:
    found = measure_bandwidth(Storage(toy, manifests.read(toy)), [], lambda *_: None)
    assert found.read_bytes_per_s == found.cached_read_bytes_per_s == found.read_bytes_per_s_by_request == {}


class _Noting:
    """Storage that notes each read and its thread, and lets a test come in between."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.forgotten: list[str] = []
        self.reads: list[tuple[str, int, int, bool]] = []

    def forget_cached(self, shard: Shard) -> None:
        self.forgotten.append(shard.name)

    def stream_weights(self, shard: Shard, scratch: Buffer, *, direct: bool = True) -> Iterator[int]:
        self.reads.append((shard.name, threading.active_count(), scratch.nbytes, direct))
        yield from self.storage.stream_weights(shard, scratch, direct=direct)


def test_all_shards_are_read_cold_one_after_another(toy_large: Path) -> None:
    manifest = manifests.read(toy_large)
    noting = _Noting(Storage(toy_large, manifest))
    bandwidth._bandwidth(noting, manifest.shards, 1, 1 << 20, True)  # type: ignore[arg-type]
    names = [shard.name for shard in manifest.shards]
    assert noting.forgotten == names
    assert [name for name, *_ in noting.reads] == names
    assert {(nbytes, direct) for *_, nbytes, direct in noting.reads} == {(1 << 20, True)}


def test_agents_read_at_the_same_time(toy_large: Path) -> None:
    manifest = manifests.read(toy_large)
    noting, barrier = _Noting(Storage(toy_large, manifest)), threading.Barrier(4)
    read, met = noting.stream_weights, set[int]()

    def meet(shard: Shard, scratch: Buffer, *, direct: bool = True) -> Iterator[int]:
        # Each agent waits for the three others once, at its first shard.
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            barrier.wait(PATIENCE_S)
        yield from read(shard, scratch, direct=direct)

    noting.stream_weights = meet  # type: ignore[method-assign]
    assert bandwidth._bandwidth(noting, manifest.shards, 4, 1 << 20, False) > 0  # type: ignore[arg-type]
    assert {direct for *_, direct in noting.reads} == {False}


def test_a_reader_that_fails_ends_the_others_and_leaves_no_thread(toy_large: Path) -> None:
    manifest = manifests.read(toy_large)
    noting = _Noting(Storage(toy_large, manifest))

    def fail(shard: Shard, scratch: Buffer, *, direct: bool = True) -> Iterator[int]:
        if shard.name == "block.001":
            raise ShardError("'block.001' is gone.")
        # The others would go on for ever.
        while True:
            yield 0

    noting.stream_weights = fail  # type: ignore[method-assign]
    with pytest.raises(ShardError, match="is gone"):
        bandwidth._bandwidth(noting, manifest.shards, 4, 1 << 20, True)  # type: ignore[arg-type]
    assert agents() == []


def test_a_slow_disk_is_not_waited_for(toy_large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_SLOW_S", 0.0)
    manifest = manifests.read(toy_large)
    noting = _Noting(Storage(toy_large, manifest))
    bandwidth._bandwidth(noting, manifest.shards, 1, 1 << 20, True)  # type: ignore[arg-type]
    assert len(noting.reads) == 1
