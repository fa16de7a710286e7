"""Plans with fewer sessions than buffers: a shard that was read waits for its session, and every wait ends."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.harness import PATIENCE_S, Background, Gate, agents, assert_same, run_sequentially
from tests.engine.pipeline.rig import (
    FAILURES,
    NAMES,
    Rig,
    fail_once,
    failing_sessions,
    gated_packing,
    plan_by_hand,
    raising,
    rigged,
)

from pipeload.errors import ClosedError, LoadError, RunError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Shard
from pipeload.pipeline import loader, weights_memory
from pipeload.pipeline.reservations import Reservations
from pipeload.pipeline.session import ShardSession
from pipeload.planning.footprint import second_copy_bytes, session_bytes
from pipeload.planning.planner import Plan

FEWER = {"loaders": 2, "buffers": 2, "sessions": 1}


@pytest.fixture(scope="module")
def small(made_toys: Callable[[str], Path]) -> Path:
    return made_toys("toy-small")


class Asked:
    """The reservations that Loading Agents ask for, in the order in which they ask."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Reservations, int]] = queue.SimpleQueue()

    def note(self, budget: Reservations, ticket: int) -> None:
        self._asked.put((budget, ticket))

    def wait(self, rig: Rig, ticket: int) -> None:
        """Until the shard with this ticket was read, and asks for its session."""
        while self._asked.get(timeout=PATIENCE_S) != (rig.pipeline._memory.sessions, ticket):
            pass
        # The agent that asked holds the lock until it waits.
        rig.pipeline._memory.wake()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    seen = Asked()

    class Noting(Reservations):
        def reserve(self, nbytes: int, ticket: int, cancelled: Callable[[], bool]) -> bool:
            seen.note(self, ticket)
            return super().reserve(nbytes, ticket, cancelled)

    monkeypatch.setattr(weights_memory, "Reservations", Noting)
    return seen


def gated_runs(gate: Gate, at: str, error: Exception | None = None) -> type[ShardSession]:
    """Sessions of which one stops at a gate when it runs, once, and then fails."""
    armed = [True]

    class Gated(ShardSession):
        def run(self, *arguments: Any) -> Any:
            if self._name == at and armed:
                armed.clear()
                gate.stop_here()
                if error is not None:
                    raise error
            return super().run(*arguments)

    return Gated


class Living:
    """Sessions of always packed shards that exist at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = self.most = 0

    def change(self, by: int) -> None:
        with self._lock:
            self.now += by
            self.most = max(self.most, self.now)


def counted(living: Living) -> type[ShardSession]:
    class Counted(ShardSession):
        def __init__(self, shard: Shard, *arguments: Any, **options: Any) -> None:
            self._counts = shard.packed and not options["copied"]
            living.change(self._counts)
            super().__init__(shard, *arguments, **options)

        def __del__(self) -> None:
            living.change(-self._counts)

    return Counted


@pytest.mark.parametrize(
    ("resident", "partly"),
    [
        ((), {}),
        (("block.001", "block.004"), {}),
        (("prologue", "epilogue", "block.005"), {}),
        ((), {"block.000": (0, 1024), "block.003": (1024, 1792)}),
    ],
    ids=["streamed", "some resident", "small ones resident", "partly"],
)
@pytest.mark.parametrize(("loaders", "buffers", "sessions"), [(1, 2, 1), (2, 2, 1), (2, 3, 1), (4, 5, 2), (4, 3, 1)])
def test_answers_are_the_same_bits_and_no_more_sessions_exist_than_planned(
    small: Path, monkeypatch: pytest.MonkeyPatch, loaders: int, buffers: int, sessions: int,
    resident: tuple[str, ...], partly: dict[str, tuple[int, int]],
) -> None:  # fmt: skip
    living = Living()
    monkeypatch.setattr(loader, "ShardSession", counted(living))
    expected = run_sequentially(small, toys.inputs(), threads=1)
    options: dict[str, Any] = {"loaders": loaders, "buffers": buffers, "sessions": sessions}
    with rigged(small, resident=resident, partly=partly, **options) as rig:
        for _ in range(4):
            assert_same(rig.run(), expected)
        plan = rig.pipeline.plan
        assert 0 < plan.sessions_bytes < plan.weights_bytes
    assert 1 <= living.most <= sessions
    assert living.now == 0


def test_the_next_shard_is_read_while_one_is_packed(small: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr(loader, "ShardSession", gated_packing(gate, "block.001"))
    with rigged(small, resident=("prologue", "epilogue"), **FEWER) as rig:
        call = rig.submit()
        gate.wait_reached()
        asked.wait(rig, 3)
        assert rig.storage.read.count("block.002") == 1
        memory, block = rig.pipeline._memory, rig.manifest.shards[1]
        # One packs, with the second copy; the other one has its buffer only.
        assert memory.sessions.reserved_bytes == session_bytes(block, 1) + second_copy_bytes(block)
        assert memory.reserved_bytes <= rig.pipeline.plan.weights_bytes
        assert memory._pool.used == 2
        gate.open()
        call.result()
        rig.check()


def test_a_later_shard_that_was_read_first_waits_for_the_earlier_one(small: Path, asked: Asked) -> None:
    gate = Gate()

    def before(shard: Shard) -> None:
        if shard.name == "prologue":
            gate.stop_here()

    with rigged(small, before_read=before, **FEWER) as rig:
        call = rig.submit()
        gate.wait_reached()
        asked.wait(rig, 1)
        assert rig.storage.read == ["block.000"]
        assert rig.pipeline._memory.sessions.reserved_bytes == 0
        assert not rig.exchange._ready
        gate.open()
        assert_same({name: value.numpy() for name, value in call.result().items()}, rig.expected)
        rig.check(passes=2)


def test_resident_shards_that_are_read_late_keep_no_session_waiting(small: Path, asked: Asked) -> None:
    gate = Gate()

    def before(shard: Shard) -> None:
        if shard.name == "prologue":
            gate.stop_here()

    with rigged(small, before_read=before, resident=("prologue",), **FEWER) as rig:
        call = rig.submit()
        gate.wait_reached()
        asked.wait(rig, 1)
        rig.wait(lambda: 1 in rig.exchange._ready)
        gate.open()
        call.result()
        rig.check()


def test_closing_while_a_shard_waits_for_its_session(
    small: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr(loader, "ShardSession", gated_runs(gate, "block.000"))
    with rigged(small, **FEWER) as rig:
        call = rig.submit()
        gate.wait_reached()
        asked.wait(rig, 2)
        closing = Background(rig.pipeline.close)
        rig.wait(lambda: rig.exchange.closed)
        gate.open()
        closing.end()
        with pytest.raises(ClosedError):
            call.result()
        assert agents() == []
        assert rig.pipeline._memory.reserved_bytes == 0


def test_a_pass_that_fails_while_a_shard_waits_for_its_session(
    small: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr(loader, "ShardSession", gated_runs(gate, "block.000", RunError("no")))
    with rigged(small, **FEWER) as rig:
        call = rig.submit()
        gate.wait_reached()
        asked.wait(rig, 2)
        gate.open()
        with pytest.raises(RunError, match="no"):
            call.result()
        rig.check(passes=3)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("method", ["make", "run"])
def test_failures_give_all_back(
    small: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, method: str
) -> None:
    monkeypatch.setattr(loader, "ShardSession", failing_sessions(method, error, "block.002"))
    with rigged(small, **FEWER) as rig:
        with raising(error, LoadError if method == "make" else RunError):
            rig.check()
        rig.check(passes=3)


def test_a_call_that_fails_in_a_sweep_keeps_no_session_while_the_others_go_on(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    living, gate, armed = Living(), Gate(), [False]

    class Failing(counted(living)):  # type: ignore[misc]
        def run(self, *arguments: Any) -> Any:
            if armed[0] and self._name == "block.001":
                armed[0] = False
                raise RunError("no")
            return super().run(*arguments)

    monkeypatch.setattr(loader, "ShardSession", Failing)
    with rigged(small, **FEWER) as rig:
        rig.pipeline._progress = lambda progress: gate.stop_here() if progress.index == len(NAMES) else None
        first = rig.submit()
        gate.wait_reached()
        calls = [rig.submit() for _ in range(3)]
        armed[0] = True
        gate.open()
        first.result()
        errors = [call.outcome.exception(PATIENCE_S) for call in calls]
        assert [type(error) for error in errors] == [RunError, type(None), type(None)]
        assert rig.pipeline.stats.passes == 2
    assert living.most == 1


@pytest.mark.parametrize("at", NAMES)
def test_a_read_that_fails_keeps_no_session_waiting(small: Path, at: str) -> None:
    with rigged(small, before_read=fail_once(OSError("disk"), at), loaders=3, buffers=3, sessions=1) as rig:
        with pytest.raises(LoadError, match="disk"):
            rig.check(passes=2)
        rig.check(passes=2)


def _plans(small: Path) -> list[Plan]:
    manifest = manifests.read(small)
    return [
        plan_by_hand(manifest, pass_bytes=0, **FEWER),
        plan_by_hand(manifest, pass_bytes=1, loaders=2, buffers=2),
        plan_by_hand(manifest, pass_bytes=2, resident=("block.001", "prologue"), loaders=3, buffers=4, sessions=2),
        plan_by_hand(manifest, pass_bytes=3, resident=NAMES),
        plan_by_hand(manifest, pass_bytes=4, partly={"block.000": (0, 1024)}, loaders=3, buffers=3, sessions=1),
    ]


def test_plans_with_and_without_fewer_sessions_follow_one_another(small: Path) -> None:
    plans = _plans(small)
    with rigged(small, replan=lambda pass_bytes, _: plans[pass_bytes], **FEWER) as rig:
        for number in (0, 1, 0, 2, 4, 3, 4, 2, 1, 3, 0):
            for _ in range(2):
                assert_same(rig.run(pass_bytes=number), rig.expected)
            memory = rig.pipeline._memory
            assert memory.plan.layout == plans[number].layout
            assert memory.reservations._limit_bytes + memory.sessions._limit_bytes == plans[number].weights_bytes
            assert memory.sessions.reserved_bytes <= memory.sessions._limit_bytes == plans[number].sessions_bytes
            assert memory.reservations.reserved_bytes <= memory.reservations._limit_bytes


def test_a_new_plan_ends_the_wait_for_a_session_of_the_old_one(small: Path, asked: Asked) -> None:
    plans = _plans(small)
    with rigged(small, replan=lambda pass_bytes, _: plans[pass_bytes], **FEWER) as rig:
        # There is no call: the first shard is ready, and the second one waits for its session.
        asked.wait(rig, 1)
        rig.wait(lambda: set(rig.exchange._ready) == {0})
        for number in (1, 0, 2):
            assert_same(rig.run(pass_bytes=number), rig.expected)


def test_the_heap_is_given_back_unless_all_of_a_session_may_miss_its_holes(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read and widened beside the packing splits them, and the plan has no memory for another session."""
    trims: list[str] = []
    with rigged(small, loaders=3, buffers=3, sessions=1) as rig:
        memory, block = rig.pipeline._memory, rig.manifest.shards[1]
        monkeypatch.setattr(weights_memory, "trim", lambda: trims.append("trim"))
        most = memory.plan.peak_bytes - 3 * second_copy_bytes(block) - session_bytes(block, 1)
        for rss, trimmed in ((0, None), (most, False), (most + 1, True)):
            monkeypatch.setattr(weights_memory, "rss_bytes", lambda rss=rss: rss)
            trims.clear()
            memory.fit_heap(block, streamed=True)
            assert trimmed is None or bool(trims) == trimmed


def test_the_heap_is_given_back_unless_every_agent_may_miss_the_holes_of_other_arenas(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that were there before the model have made arenas, and agents share these: memory freed in one is lost to
    agents that use another one.
    """
    trims: list[str] = []
    with rigged(small, loaders=3, buffers=3, sessions=2) as rig:
        memory, block = rig.pipeline._memory, rig.manifest.shards[1]
        monkeypatch.setattr(weights_memory, "is_scattered", lambda: True)
        monkeypatch.setattr(weights_memory, "trim", lambda: trims.append("trim"))
        # One misses what reading has split, two what lies in other arenas.
        most = memory.plan.peak_bytes - 3 * second_copy_bytes(block) - 3 * session_bytes(block, 1)
        for rss, trimmed in ((0, None), (most, False), (most + 1, True)):
            monkeypatch.setattr(weights_memory, "rss_bytes", lambda rss=rss: rss)
            trims.clear()
            memory.fit_heap(block, streamed=True)
            assert trimmed is None or bool(trims) == trimmed


@pytest.mark.parametrize("seed", range(6))
def test_calls_failures_and_plans_in_any_order(small: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Callers, plans that change, reads and sessions that fail, calls that are withdrawn, and at last a close."""
    choose, lock, plans = random.Random(seed), threading.Lock(), _plans(small)

    def perhaps(share: float) -> bool:
        with lock:
            return choose.random() < share

    def before(_: Shard) -> None:
        if perhaps(0.01):
            raise OSError("disk")

    class Failing(ShardSession):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            if perhaps(0.01):
                raise OSError("memory")
            super().__init__(*arguments, **options)

    monkeypatch.setattr(loader, "ShardSession", Failing)

    def call(rig: Rig) -> int:
        done = 0
        for _ in range(15):
            with lock:
                number = choose.randrange(len(plans))
            with suppress(LoadError):
                assert_same(rig.run(pass_bytes=number), rig.expected)
                done += 1
        return done

    def give_up(rig: Rig) -> None:
        for _ in range(10):
            rig.submit().withdraw()

    with rigged(small, before_read=before, replan=lambda pass_bytes, _: plans[pass_bytes], **FEWER) as rig:
        threads = [Background(call, rig), Background(call, rig), Background(give_up, rig)]
        assert sum(thread.end() or 0 for thread in threads) > 0
        memory = rig.pipeline._memory
        assert memory.sessions.reserved_bytes <= memory.sessions._limit_bytes
        assert memory.reservations.reserved_bytes <= memory.reservations._limit_bytes
