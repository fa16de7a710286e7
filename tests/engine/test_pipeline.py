"""The threads around real shards: what is loaded when, what happens when something fails or ends, what is left."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    PATIENCE_S,
    Background,
    Gate,
    agents,
    assert_close,
    assert_same,
    run_sequentially,
)

from pipeload import manifest as manifests
from pipeload import pipeline as pipelines
from pipeload.buffers import Buffer, page_ceil
from pipeload.errors import BudgetError, ClosedError, LoadError, ShardError
from pipeload.manifest import Manifest, Shard
from pipeload.pipeline import Pipeline
from pipeload.planner import SESSION_BYTES, Plan, make_plan
from pipeload.profile import Profile
from pipeload.session import ShardSession, to_array, to_value
from pipeload.storage import Storage

NAMES = ["prologue", *(f"block.{k:03d}" for k in range(6)), "epilogue"]
FAILURES = [OSError("disk"), MemoryError(), SystemExit(3), KeyboardInterrupt()]


class _Storage(Storage):
    """Notes what is read, and lets a test stand in the way."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        super().__init__(directory, manifest)
        self.read: list[str] = []
        self.before_read: Callable[[Shard], None] = _nothing

    def read_weights(self, shard: Shard, buffer: Buffer, cancelled: Callable[[], bool]) -> bool:
        self.before_read(shard)
        done = super().read_weights(shard, buffer, cancelled)
        if done:
            self.read.append(shard.name)
        return done


def _nothing(*_: Any) -> None:
    pass


def _plan(
    manifest: Manifest, *, resident: tuple[str, ...] = (), buffers: int = 2, loaders: int = 2, pass_bytes: int = 0
) -> Plan:
    streamed = [shard for shard in manifest.shards if shard.name not in resident]
    return Plan(
        budget_bytes=10**10,
        loaders=loaders,
        buffers=min(buffers, len(streamed)),
        buffer_bytes=max((page_ceil(shard.nbytes) for shard in streamed), default=0),
        resident=frozenset(resident),
        packed=False,
        threads=1,
        process_bytes=0,
        pass_bytes=pass_bytes,
        cache_bytes=0,
        streamed_bytes=sum(shard.nbytes for shard in streamed),
        peak_bytes=0,
    )


class _Rig:
    """A pipeline over the toy, with a storage that notes."""

    def __init__(self, directory: Path, *, replan: Callable[[int, int], Plan] | None = None, **options: Any) -> None:
        self.manifest = manifests.read(directory)
        self.storage = _Storage(directory, self.manifest)
        self.expected = run_sequentially(directory, toys.inputs(), threads=1)
        plan = _plan(self.manifest, **options)
        self.pipeline = Pipeline(self.manifest, self.storage, plan, replan or (lambda *_: plan))

    def run(self, *, pass_bytes: int = 0) -> dict[str, Any]:
        values = {name: to_value(array) for name, array in toys.inputs().items()}
        outputs = self.pipeline.run(values, pass_bytes=pass_bytes, cache_bytes=0, last_position=False)
        return {name: to_array(value) for name, value in outputs.items()}

    def check(self, passes: int = 1) -> None:
        for _ in range(passes):
            assert_same(self.run(), self.expected)


@contextmanager
def _rig(directory: Path, **options: Any) -> Iterator[_Rig]:
    rig = _Rig(directory, **options)
    try:
        yield rig
    finally:
        rig.pipeline.close()
        assert agents() == []


def _once(error: BaseException, at: str) -> Callable[[Shard], None]:
    armed = [True]

    def fail(shard: Shard) -> None:
        if armed and shard.name == at:
            armed.clear()
            raise error

    return fail


# Order, residence, prefetch


@pytest.mark.parametrize("buffers", [1, 2, 3, 8])
@pytest.mark.parametrize("loaders", [1, 2, 4])
@pytest.mark.parametrize("resident", [(), ("block.001", "block.004"), ("prologue", "epilogue"), tuple(NAMES)])
def test_streamed_passes_equal_sequential_ones_bit_for_bit(
    toy: Path, buffers: int, loaders: int, resident: tuple[str, ...]
) -> None:
    with _rig(toy, buffers=buffers, loaders=loaders, resident=resident) as rig:
        rig.check(passes=4)
        counts = Counter(rig.storage.read)
        # A pass more may have been begun ahead.
        assert {counts[name] for name in NAMES if name in resident} <= {1}
        assert {counts[name] for name in NAMES if name not in resident} <= {4, 5}
        assert rig.pipeline.stats.passes == 4


def test_one_loader_reads_in_plan_order_round_and_round(toy: Path) -> None:
    with _rig(toy, loaders=1, resident=("block.002",)) as rig:
        rig.check(passes=3)
        again = [name for name in NAMES if name != "block.002"]
        order = NAMES + again + again + again
        assert rig.storage.read == order[: len(rig.storage.read)]


def test_the_next_pass_is_read_before_anybody_calls(toy: Path) -> None:
    second = Gate(opened=True)
    with _rig(toy, loaders=1, buffers=2) as rig:
        rig.storage.before_read = lambda _: second.stop_here() if len(rig.storage.read) > len(NAMES) else None
        rig.check()
        second.wait_reached()
        assert rig.storage.read[len(NAMES)] == "prologue"


def test_reading_begins_before_the_first_call(toy: Path) -> None:
    gate = Gate()
    original = _Storage.read_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Storage, "read_weights", lambda *args: (gate.stop_here(), original(*args))[1])
        with _rig(toy) as rig:
            gate.wait_reached()
            gate.open()
            rig.check()


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_no_more_sessions_live_than_planned(toy: Path, monkeypatch: pytest.MonkeyPatch, buffers: int) -> None:
    lock, alive, most = threading.Lock(), [0], [0]

    class Counted(ShardSession):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            with lock:
                alive[0] += 1
                most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            with lock:
                alive[0] -= 1

    monkeypatch.setattr(pipelines, "ShardSession", Counted)
    with _rig(toy, loaders=3, buffers=buffers, resident=("block.001",)) as rig:
        rig.check(passes=5)
        assert 2 <= most[0] <= buffers + 1
    assert alive[0] == 0


def test_the_weights_never_exceed_what_the_plan_gives_them(toy: Path) -> None:
    with _rig(toy, loaders=4, buffers=3, resident=("block.003",)) as rig:
        budget = rig.pipeline._budget
        seen: list[int] = []
        rig.storage.before_read = lambda _: seen.append(budget.reserved_bytes)
        rig.check(passes=5)
        assert max(seen) <= budget._limit_bytes
    assert budget.reserved_bytes == 0


def test_threads_have_names(toy: Path) -> None:
    with _rig(toy, loaders=2):
        assert sorted(agents()) == ["pipeload-daemon", "pipeload-inference", "pipeload-loader-0", "pipeload-loader-1"]


# Everything fits


@pytest.mark.parametrize("loaders", [1, 2])
@pytest.mark.parametrize("last", [1, 2], ids=["a block is last", "the epilogue is last"])
def test_the_smallest_budget_for_packing_does_not_hang(toy: Path, loaders: int, last: int) -> None:
    manifest = manifests.read(toy)
    manifest = replace(manifest, shards=manifest.shards[: len(manifest.shards) - 2 + last])
    if last == 1:
        manifest = replace(manifest, outputs=tuple(e for e in manifest.edges if e.name == "hidden.6"))
    profile = Profile(process_bytes=10**6, cores=1)

    def plan(budget_bytes: int) -> Plan:
        return make_plan(manifest, profile, budget_bytes=budget_bytes, pass_bytes=0, loaders=loaders)

    exact = plan(plan(10**10).peak_bytes)
    assert exact.packed
    pipeline = Pipeline(manifest, Storage(toy, manifest), exact, lambda *_: exact)
    try:
        values = {name: to_value(array) for name, array in toys.inputs().items()}
        options: Any = {"pass_bytes": 0, "cache_bytes": 0, "last_position": False}
        call = Background(lambda: pipeline.run(values, **options))
        call.end()
        assert pipeline._budget.reserved_bytes <= pipeline._budget._limit_bytes
    finally:
        pipeline.close()


def test_packed_shards_are_read_once_and_agree(toy: Path) -> None:
    manifest = manifests.read(toy)
    plan = replace(_plan(manifest, resident=tuple(NAMES)), packed=True)
    with _rig(toy, resident=tuple(NAMES), replan=lambda *_: plan) as rig:
        rig.check()
        # The same residents, but packed: they are made anew.
        assert_close(rig.run(pass_bytes=1), rig.expected, 1e-5)
        assert_close(rig.run(pass_bytes=1), rig.expected, 1e-5)


# Failures


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", ["prologue", "block.003", "epilogue"])
@pytest.mark.parametrize("resident", [(), ("block.003",)])
def test_a_failed_read_reaches_the_caller_and_the_next_call_works(
    toy: Path, error: BaseException, at: str, resident: tuple[str, ...]
) -> None:
    with _rig(toy, resident=resident) as rig:
        rig.storage.before_read = _once(error, at)
        with pytest.raises(type(error)) as caught:
            rig.check(passes=3)
        assert caught.value is error
        rig.check(passes=2)


def _failing_sessions(method: str, error: BaseException, at: str) -> type[ShardSession]:
    fail = _once(error, at)

    class Failing(ShardSession):
        def __init__(self, shard: Shard, *arguments: Any) -> None:
            if method == "make":
                fail(shard)
            super().__init__(shard, *arguments)
            self._shard = shard

        def run(self, *arguments: Any) -> Any:
            if method == "run":
                fail(self._shard)
            return super().run(*arguments)

    return Failing


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("method", ["make", "run"])
@pytest.mark.parametrize("at", ["prologue", "block.003", "epilogue"])
def test_a_failed_session_reaches_the_caller_and_the_next_call_works(
    toy: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException, at: str
) -> None:
    monkeypatch.setattr(pipelines, "ShardSession", _failing_sessions(method, error, at))
    with _rig(toy) as rig:
        with pytest.raises(type(error)) as caught:
            rig.check(passes=3)
        assert caught.value is error
        rig.check(passes=2)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failure_while_freeing_closes_with_its_cause(
    toy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    armed = [True]
    with _rig(toy) as rig:
        pool = rig.pipeline._pool

        def give(buffer: Buffer) -> None:
            if armed and threading.current_thread().name == "pipeload-daemon":
                armed.clear()
                raise error
            buffer.close()

        monkeypatch.setattr(pool, "give", give)
        for _ in range(2):
            with pytest.raises(ClosedError) as caught:
                rig.check(passes=3)
            assert caught.value.__cause__ is error


def test_a_model_that_vanished_is_not_tried_again_until_somebody_calls(toy_copy: Path) -> None:
    tries: list[str] = []
    with _rig(toy_copy, loaders=2) as rig:
        rig.check()
        rig.storage.before_read = lambda shard: tries.append(shard.name)
        (toy_copy / "shards").rename(toy_copy / "away")
        for _ in range(3):
            with pytest.raises(ShardError, match="cannot be read"):
                rig.check(passes=3)
        (toy_copy / "away").rename(toy_copy / "shards")
        with suppress(ShardError):
            # What was tried ahead, before the files came back, may fail once more.
            rig.check()
        rig.check()
    assert len(tries) < 60


def test_a_load_that_fails_gives_its_reservation_back(toy_copy: Path) -> None:
    with _rig(toy_copy, buffers=1) as rig:
        path = toy_copy / "shards" / "block.002.safetensors"
        content = path.read_bytes()
        for _ in range(10):
            path.write_bytes(content[:-1])
            with pytest.raises(ShardError, match=r"block\.002\.safetensors"):
                rig.check(passes=2)
            path.write_bytes(content)
            with suppress(ShardError):
                rig.check()
            rig.check()


def test_a_thread_that_cannot_start_leaves_none_behind(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start
    calls = iter(range(10))

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("pipeload-") and next(calls) == 2:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        _Rig(toy)
    assert agents() == []


# Closing


def test_closing_without_a_call_ends_all_threads(toy: Path) -> None:
    with _rig(toy) as rig:
        rig.pipeline.close()
        assert agents() == []
        rig.pipeline.close()
        with pytest.raises(ClosedError):
            rig.run()


def test_closing_while_a_shard_is_read_ends_the_call(toy: Path) -> None:
    gate = Gate()
    with _rig(toy) as rig:
        rig.storage.before_read = lambda shard: gate.stop_here() if shard.name == "block.003" else None
        calls = [Background(rig.check, 5) for _ in range(3)]
        gate.wait_reached()
        closing = Background(rig.pipeline.close)
        with pytest.raises(ClosedError):
            calls[0].end()
        assert all(isinstance(call.wait(), ClosedError) for call in calls)
        assert closing.is_alive(), "a thread still reads"
        gate.open()
        closing.end()
        assert agents() == []


def test_closing_while_a_shard_runs_ends_the_call(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    class Gated(ShardSession):
        def run(self, *arguments: Any) -> Any:
            gate.stop_here()
            return super().run(*arguments)

    monkeypatch.setattr(pipelines, "ShardSession", Gated)
    with _rig(toy) as rig:
        calls = [Background(rig.check) for _ in range(3)]
        gate.wait_reached()
        closing = Background(rig.pipeline.close)
        while not rig.pipeline._exchange.closed:
            rig.pipeline._exchange.notify()
        gate.open()
        closing.end()
        assert all(isinstance(call.wait(), ClosedError) for call in calls)


def test_closing_while_all_wait_for_budget_ends_all_threads(toy: Path) -> None:
    with _rig(toy, buffers=1, loaders=4) as rig:
        rig.check()


@pytest.mark.parametrize("seed", range(8))
def test_closing_at_any_moment_leaves_nothing(toy: Path, seed: int) -> None:
    """The n-th time that anything is read, the pipeline is closed from another thread."""
    moment = Gate()
    reads = iter(range(1000))
    with _rig(toy, buffers=1 + seed % 3) as rig:
        rig.storage.before_read = lambda _: moment.stop_here() if next(reads) == 3 * seed else None
        calls = [Background(rig.check, 10) for _ in range(2)]
        moment.wait_reached()
        closing = Background(rig.pipeline.close)
        moment.open()
        closing.end()
        assert all(isinstance(call.wait(), ClosedError) for call in calls)
    assert rig.pipeline._budget.reserved_bytes == 0


def test_several_may_close_at_once(toy: Path) -> None:
    with _rig(toy) as rig:
        rig.check()
        barrier = threading.Barrier(4)

        def close() -> list[str]:
            barrier.wait(PATIENCE_S)
            rig.pipeline.close()
            return agents()

        for call in [Background(close) for _ in range(4)]:
            assert call.end() == [], "close returned before the threads had ended"


# Stop and resume


def test_the_daemon_stops_and_resumes_the_loaders_when_memory_is_short(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[bool] = []
    trims: list[str] = []
    with _rig(toy) as rig:
        exchange = rig.pipeline._exchange
        real = exchange.signal_memory
        monkeypatch.setattr(exchange, "signal_memory", lambda *, short: (signals.append(short), real(short=short)))
        monkeypatch.setattr(pipelines, "trim", lambda: trims.append(threading.current_thread().name))
        rig.check(passes=2)
        assert signals == []
        monkeypatch.setattr(pipelines, "rss_bytes", lambda: rig.pipeline.plan.budget_bytes)
        rig.check(passes=2)
        assert "pipeload-daemon" in trims
        assert True in signals
        monkeypatch.setattr(pipelines, "rss_bytes", lambda: 0)
        rig.check(passes=2)
    assert not exchange._short


# Other plans


def test_a_pass_that_needs_more_makes_residents_leave(toy: Path) -> None:
    manifest = manifests.read(toy)
    small, large = ("block.001", "block.003", "block.005"), ("block.003",)

    def replan(pass_bytes: int, _: int) -> Plan:
        return _plan(manifest, resident=large if pass_bytes else small, pass_bytes=pass_bytes)

    with _rig(toy, resident=small, replan=replan) as rig:
        rig.check(passes=2)
        assert_same(rig.run(pass_bytes=5), rig.expected)
        assert rig.pipeline.plan.resident == {"block.003"}
        assert set(rig.pipeline._residents) == {4}
        rig.storage.read.clear()
        rig.check(passes=2)
        counts = Counter(rig.storage.read)
        assert "block.003" not in counts
        assert counts["block.001"] >= 2
        # What was needed once may be needed again: the plan stays.
        assert rig.pipeline.plan.pass_bytes == 5
    assert rig.pipeline._budget.reserved_bytes == 0


def test_other_buffer_sizes_take_effect(toy: Path) -> None:
    manifest = manifests.read(toy)
    blocks = tuple(name for name in NAMES if name.startswith("block"))

    def replan(pass_bytes: int, _: int) -> Plan:
        resident = (blocks, (), ("prologue", *blocks[:3]))[pass_bytes]
        return _plan(manifest, resident=resident, pass_bytes=pass_bytes, buffers=1 + pass_bytes)

    with _rig(toy, resident=blocks, buffers=1, replan=replan) as rig:
        rig.check(passes=2)
        for pass_bytes in (1, 2):
            for _ in range(2):
                assert_same(rig.run(pass_bytes=pass_bytes), rig.expected)
            plan = rig.pipeline.plan
            kept = [page_ceil(s.nbytes) for s in manifest.shards if s.name in plan.resident]
            limit = sum(kept) + plan.buffers * plan.buffer_bytes + (len(kept) + plan.buffers) * SESSION_BYTES
            assert rig.pipeline._budget.reserved_bytes <= limit


def test_a_pass_that_does_not_fit_is_refused_and_the_next_works(toy: Path) -> None:
    def replan(*_: int) -> Plan:
        raise BudgetError("too large", needed_bytes=2, budget_bytes=1)

    with _rig(toy, replan=replan) as rig:
        rig.check()
        for _ in range(2):
            with pytest.raises(BudgetError, match="too large"):
                rig.run(pass_bytes=5)
            rig.check(passes=2)
        assert rig.pipeline.plan.pass_bytes == 0


def test_what_was_needed_once_gives_way_when_it_is_in_the_way(toy: Path) -> None:
    manifest = manifests.read(toy)

    def replan(pass_bytes: int, cache_bytes: int) -> Plan:
        if pass_bytes + cache_bytes > 10:
            raise BudgetError("too large", needed_bytes=pass_bytes + cache_bytes, budget_bytes=10)
        return replace(_plan(manifest), pass_bytes=pass_bytes, cache_bytes=cache_bytes)

    with _rig(toy, replan=replan) as rig:
        values = {name: to_value(array) for name, array in toys.inputs().items()}
        rig.pipeline.run(values, pass_bytes=8, cache_bytes=0, last_position=False)
        rig.pipeline.run(values, pass_bytes=2, cache_bytes=6, last_position=False)
        assert (rig.pipeline.plan.pass_bytes, rig.pipeline.plan.cache_bytes) == (2, 6)


def test_statistics_add_up(toy: Path) -> None:
    with _rig(toy) as rig:
        assert rig.pipeline.stats.passes == 0
        assert rig.pipeline.stats.first_pass_s is None
        rig.check(passes=3)
        stats = rig.pipeline.stats
        assert stats.passes == 3
        assert stats.first_pass_s is not None
        assert stats.last_pass_s is not None
        assert stats.read_bytes >= 3 * rig.manifest.weight_bytes
        assert stats.peak_bytes > 0
    read = rig.pipeline.stats.read_bytes
    sizes = {shard.name: shard.nbytes for shard in rig.manifest.shards}
    assert read <= sum(sizes[name] for name in rig.storage.read)


def test_a_shard_that_onnxruntime_refuses_is_named(toy_copy: Path) -> None:
    manifest = manifests.read(toy_copy)
    graph = toy_copy / manifest.shards[2].graph.path
    with _rig(toy_copy) as rig:
        rig.check()
        # Same size, so only onnxruntime can notice; its hash was checked at the first load.
        graph.write_bytes(b"\xff" * graph.stat().st_size)
        with pytest.raises(LoadError, match=r"refused shard 'block\.001'"):
            rig.check(passes=2)
        np.testing.assert_equal(rig.pipeline._budget.reserved_bytes, 0)
