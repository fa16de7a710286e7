"""Every shard is timed on the outputs of the shards before it, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import agents

from pipeload.errors import LoadError, ShardError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest, Shard
from pipeload.machine.memory import reset_peak_rss
from pipeload.measuring import stopwatch as stopwatches
from pipeload.measuring.example_inputs import example_inputs
from pipeload.measuring.stopwatch import Stopwatch
from pipeload.pipeline.session import ShardSession, to_value
from pipeload.planning.profile import ShardTimes
from pipeload.storage.buffers import Buffer
from pipeload.storage.weights import Storage

SIZES = {"batch_size": 1, "sequence_length": 4, "past_sequence_length": 3}


@pytest.fixture(autouse=True)
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as little as possible."""
    monkeypatch.setattr(stopwatches, "_RUNS", 1)
    monkeypatch.setattr(stopwatches, "_CHOSEN_S", 0.0)


def _inputs(manifest: Manifest) -> dict[str, Any]:
    return {name: to_value(array) for name, array in example_inputs(manifest, SIZES).items()}


def _run(directory: Path, threads: tuple[int, ...] = (1,), **told: Any) -> dict[int, dict[str, ShardTimes]]:
    manifest = manifests.read(directory)
    watch = Stopwatch(Storage(directory, manifest), manifest, threads, told.get("progress", lambda *_: None))
    return watch.run(_inputs(manifest))


def test_every_shard_has_every_time_for_every_number_of_threads(any_toy: Path) -> None:
    found = _run(any_toy, (2, 1))
    names = [shard.name for shard in manifests.read(any_toy).shards]
    assert list(found) == [2, 1]
    for times in found.values():
        assert list(times) == names
        for each in times.values():
            figures = (each.session_s, each.run_s, each.loading_run_s, each.pack_s, each.packed_run_s)
            assert all(figure > 0 for figure in figures)
    assert agents() == []


def test_shards_of_a_structure_share_what_only_some_are_timed_for(toy: Path) -> None:
    times = _run(toy)[1]
    blocks = [each for name, each in times.items() if name.startswith("block")]
    assert len({(each.loading_run_s, each.pack_s, each.packed_run_s) for each in blocks}) == 1
    assert len({each.run_s for each in blocks}) > 1


def test_the_first_the_middle_and_the_last_of_a_structure_are_chosen(toy: Path) -> None:
    names = {"prologue", "block.000", "block.003", "block.005", "epilogue"}
    assert stopwatches._chosen(manifests.read(toy).shards) == names


def test_progress_counts_shards(toy: Path) -> None:
    told: list[tuple[str, int, int]] = []
    _run(toy, progress=lambda *each: told.append(each))
    assert told == [("Running", done, 8) for done in range(9)]


@pytest.mark.skipif(not reset_peak_rss(), reason="the system does not tell a peak of memory")
def test_memory_of_a_shard_is_seen(toy_large: Path) -> None:
    manifest = manifests.read(toy_large)
    watch = Stopwatch(Storage(toy_large, manifest), manifest, (1,), lambda *_: None)
    watch.run({name: to_value(array) for name, array in example_inputs(manifest, SIZES).items()})
    assert watch.settled_bytes > 0
    # At least the inputs of a block.
    assert watch.activation_bytes is not None
    assert watch.activation_bytes >= 4 * 1024 * 4


def test_without_a_peak_of_memory_there_is_no_figure(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatches, "reset_peak_rss", lambda: False)
    manifest = manifests.read(toy)
    watch = Stopwatch(Storage(toy, manifest), manifest, (1,), lambda *_: None)
    watch.run(_inputs(manifest))
    assert watch.activation_bytes is None


def test_a_reader_that_fails_while_a_shard_runs_is_named(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Storage, shard: Shard, scratch: Buffer, *, direct: bool = True) -> Iterator[int]:
        raise ShardError(f"'{shard.name}' is gone.")
        yield 0

    monkeypatch.setattr(Storage, "stream_weights", fail)
    with pytest.raises(ShardError, match="is gone"):
        _run(toy)
    assert agents() == []


def test_a_shard_that_fails_beside_a_reader_ends_the_reader(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stopwatch._stream

    def fail(self: Stopwatch, *arguments: Any) -> Any:
        if agents():
            raise LoadError("The session was refused.")
        return stream(self, *arguments)

    monkeypatch.setattr(Stopwatch, "_stream", fail)
    with pytest.raises(LoadError, match="was refused"):
        _run(toy)
    assert agents() == []


def test_caches_of_finished_shards_are_not_kept(toy_decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifests.read(toy_decoder)
    made: list[list[int]] = []
    measure = Stopwatch._measure

    def noting(self: Stopwatch, shard: Shard, *arguments: Any) -> Any:
        results = measure(self, shard, *arguments)
        made.extend(
            list(value.shape())
            for name, value in zip(shard.outputs, results, strict=True)
            if name.startswith("present")
        )
        return results

    monkeypatch.setattr(Stopwatch, "_measure", noting)
    _run(toy_decoder)
    assert made == [[0]] * len(manifest.caches)


def test_a_model_of_one_shard_is_read_beside_itself(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifests.read(toy)
    watch = Stopwatch(Storage(toy, manifest), manifest, (1,), lambda *_: None)
    read: list[str] = []
    stream = Storage.stream_weights

    def noting(self: Storage, shard: Shard, scratch: Buffer, *, direct: bool = True) -> Iterator[int]:
        read.append(shard.name)
        return stream(self, shard, scratch, direct=direct)

    monkeypatch.setattr(Storage, "stream_weights", noting)
    only = manifest.shards[0]
    object.__setattr__(manifest, "shards", (only,))
    assert watch._beside_reader(only, lambda: [(1.0, 2.0)]) == [(1.0, 2.0)]
    assert set(read) == {only.name}
    watch._buffer.close()


def test_packed_and_streamed_sessions_are_made_as_the_engine_makes_them(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifests.read(toy)
    made: list[tuple[str, bool]] = []
    open_session = Stopwatch._open

    def noting(
        self: Stopwatch, shard: Shard, threads: int, *, packed: bool = False, arena: bool = True
    ) -> ShardSession:
        made.append((shard.name, packed))
        return open_session(self, shard, threads, packed=packed, arena=arena)

    monkeypatch.setattr(Stopwatch, "_open", noting)
    _run(toy)
    assert {name for name, packed in made if packed} == stopwatches._chosen(manifest.shards)
    assert {name for name, packed in made if not packed} == {shard.name for shard in manifest.shards}


def test_without_room_to_pack_nothing_is_gained_by_packing(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatches, "auto_budget_bytes", lambda: 0)
    monkeypatch.setattr(Stopwatch, "_pack", lambda *_: pytest.fail("it packed"))
    for each in _run(toy)[1].values():
        assert (each.pack_s, each.packed_run_s) == (each.session_s, each.run_s)
