"""Where a core is little, a model is measured as it will run, and its profile belongs to the cores that there were."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.engine.planning.test_cores import PROFILE

from pipeload.errors import ConfigError
from pipeload.format import manifest as manifests
from pipeload.machine.cores import affinity
from pipeload.measuring import bandwidth, profile_store, profiler
from pipeload.measuring import stopwatch as stopwatches
from pipeload.measuring.profiler import measure_model, profile_dims
from pipeload.pipeline.session import ShardSession
from pipeload.storage.weights import Storage

DIMS = {"batch_size": 1, "sequence_length": 8}
USABLE = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_SMALL_MODEL_S", 0.0)
    monkeypatch.setattr(stopwatches, "_RUNS", 1)
    monkeypatch.setattr(stopwatches, "_CHOSEN_S", 0.0)
    monkeypatch.setenv("PIPELOAD_CACHE", str(tmp_path / "cache"))


def _capacities(monkeypatch: pytest.MonkeyPatch, capacities: dict[int, int]) -> None:
    monkeypatch.setattr(profiler, "core_capacities", lambda: capacities)
    monkeypatch.setattr(profile_store, "core_capacities", lambda: capacities)


@pytest.mark.skipif(len(USABLE) < 2, reason="needs two cores")
def test_sessions_are_made_where_agents_read_and_run_where_they_compute(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big, little = USABLE[:2]
    _capacities(monkeypatch, {big: 1024, little: 400})
    made: set[tuple[int, frozenset[int], frozenset[int]]] = set()
    ran: set[tuple[int, frozenset[int]]] = set()
    read: set[frozenset[int]] = set()

    class Noting(ShardSession):
        def __init__(self, shard: Any, graph: Any, parts: Any, threads: int, **options: Any) -> None:
            self.threads = threads
            made.add((threads, affinity(0), frozenset(options["cores"])))
            super().__init__(shard, graph, parts, threads, **options)

        def run(self, *arguments: Any) -> Any:
            ran.add((self.threads, affinity(0)))
            return super().run(*arguments)

    real = Storage.stream_weights

    def stream_weights(self: Storage, *arguments: Any, **options: Any) -> Iterator[int]:
        read.add(affinity(0))
        yield from real(self, *arguments, **options)

    monkeypatch.setattr(stopwatches, "ShardSession", Noting)
    monkeypatch.setattr(Storage, "stream_weights", stream_weights)
    before = {thread.native_id: affinity(thread.native_id or 0) for thread in threading.enumerate()}
    manifest = manifests.read(toy)
    found = measure_model(toy, manifest, dims=profile_dims(manifest, DIMS))
    both = frozenset({big, little})
    assert list(found.times) == [2, 1]
    assert made == {(1, frozenset({little}), frozenset({big})), (2, both, both)}
    assert ran == {(1, frozenset({big})), (2, both)}
    assert read == {frozenset({little}), both}
    assert found.core_capacities == {big: 1024, little: 400}
    assert {thread: affinity(thread or 0) for thread in before} == before


def test_the_number_of_big_cores_is_measured_too(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    class EndedError(Exception):
        pass

    def stopwatch(storage: object, manifest: object, threads: tuple[int, ...], *_: object) -> None:
        seen.append(threads)
        raise EndedError

    monkeypatch.setattr(profiler, "Stopwatch", stopwatch)
    monkeypatch.setattr(profiler, "measure_bandwidth", lambda *_: None)
    monkeypatch.setattr(profiler, "cores", lambda: 8)
    manifest = manifests.read(toy)
    for capacities in ({}, dict.fromkeys(range(8), 400), {core: 1024 if core > 4 else 400 for core in range(8)}):
        _capacities(monkeypatch, capacities)
        with pytest.raises(EndedError):
            measure_model(toy, manifest, dims=DIMS)
    assert seen == [(8, 7), (8, 7), (8, 7, 3)]


def test_a_profile_is_found_on_the_cores_that_it_was_measured_on(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}
    for capacities in ({}, {0: 1024, 1: 400}, {0: 1024, 1: 512}, {0: 400, 1: 400}, {2: 1024, 1: 400}):
        _capacities(monkeypatch, capacities)
        assert profile_store.find(toy, DIMS) is None
        path = profile_store.keep(toy, replace(PROFILE, dims=DIMS, core_capacities=capacities))
        assert path is not None
        found = profile_store.find(toy, DIMS)
        assert found is not None
        assert found.core_capacities == capacities
        kept[path] = capacities
    assert len(kept) == 5


def test_where_no_core_is_little_files_are_as_they_were(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _capacities(monkeypatch, {})
    path = profile_store.keep(toy, replace(PROFILE, dims=DIMS, core_capacities={}))
    assert path is not None
    content = json.loads(path.read_text())
    assert list(content) == ["format", "profile", "identity"]
    assert list(content["identity"]) == [
        *("architecture", "cpu", "cores", "memory_bytes", "device", "read_limits", "software", "model", "dims"),
    ]
    assert "core_capacities" not in content["profile"]


def test_capacities_that_no_machine_has_are_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    profile_store.write(replace(PROFILE, core_capacities={0: 0, 1: 5}), path)
    with pytest.raises(ConfigError, match="cores have the capacities"):
        profile_store.read(path)
