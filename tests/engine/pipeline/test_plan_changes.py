"""Plans that change between passes take effect: residents leave and come, buffers and loaders change."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import (
    PATIENCE_S,
    Gate,
    agents,
    assert_same,
)
from tests.engine.pipeline.rig import (
    BLOCKS,
    NAMES,
    Scripted,
    nothing,
    plan_by_hand,
    rigged,
)

from pipeload.errors import BudgetError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest, Shard
from pipeload.format.pages import page_ceil
from pipeload.pipeline import weights_memory
from pipeload.pipeline.requests import Call
from pipeload.pipeline.session import to_array
from pipeload.planning.footprint import session_bytes
from pipeload.planning.planner import Plan
from pipeload.planning.replanner import Replanner


def test_the_daemon_stops_and_resumes_the_loaders_when_memory_is_short(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[bool] = []
    trims: list[str] = []
    with rigged(toy) as rig:
        exchange = rig.pipeline._exchange
        real = exchange.signal_memory
        monkeypatch.setattr(exchange, "signal_memory", lambda *, short: (signals.append(short), real(short=short)))
        monkeypatch.setattr(weights_memory, "trim", lambda: trims.append(threading.current_thread().name))
        rig.check(passes=2)
        assert signals == []
        monkeypatch.setattr(weights_memory, "rss_bytes", lambda: rig.pipeline.plan.budget_bytes)
        rig.check(passes=2)
        assert "pipeload-daemon" in trims
        assert True in signals
        monkeypatch.setattr(weights_memory, "rss_bytes", lambda: 0)
        rig.check(passes=2)
    assert not exchange._short


def test_a_pass_that_needs_more_makes_residents_leave(toy: Path) -> None:
    manifest = manifests.read(toy)
    small, large = ("block.001", "block.003", "block.005"), ("block.003",)

    def replan(pass_bytes: int, _: int) -> Plan:
        return plan_by_hand(manifest, resident=large if pass_bytes else small, pass_bytes=pass_bytes)

    with rigged(toy, resident=small, replan=replan) as rig:
        rig.check(passes=2)
        for _ in range(2):
            assert_same(rig.run(pass_bytes=5), rig.expected)
        assert rig.pipeline.plan.resident == {"block.003"}
        assert set(rig.exchange.residents.shards) == {4}
        rig.storage.read.clear()
        assert_same(rig.run(pass_bytes=5), rig.expected)
        counts = Counter(rig.storage.read)
        assert "block.003" not in counts
        rig.check(passes=2)
        assert set(rig.exchange.residents.shards) == {2, 4, 6}


def test_other_buffer_sizes_take_effect(toy: Path) -> None:
    manifest = manifests.read(toy)

    def replan(pass_bytes: int, _: int) -> Plan:
        resident = (BLOCKS, (), ("prologue", *BLOCKS[:3]))[pass_bytes]
        return plan_by_hand(manifest, resident=resident, pass_bytes=pass_bytes, buffers=1 + pass_bytes)

    with rigged(toy, resident=BLOCKS, buffers=1, replan=replan) as rig:
        rig.check(passes=2)
        for pass_bytes in (1, 2):
            for _ in range(2):
                assert_same(rig.run(pass_bytes=pass_bytes), rig.expected)
            plan = rig.pipeline.plan
            sessions = {shard.name: session_bytes(shard, 1) for shard in manifest.shards}
            limit = sum(page_ceil(s.nbytes) + sessions[s.name] for s in manifest.shards if s.name in plan.resident)
            limit += plan.buffers * (plan.buffer_bytes + max(sessions.values()))
            assert plan.weights_bytes == limit
            assert rig.pipeline._memory.reservations.reserved_bytes <= limit


def test_loading_agents_come_when_a_plan_wants_more_and_wait_when_it_wants_fewer(toy: Path) -> None:
    manifest = manifests.read(toy)
    plans = [plan_by_hand(manifest, loaders=loaders, buffers=4, pass_bytes=k) for k, loaders in enumerate((1, 3, 2))]
    lock, now, most = threading.Lock(), [0], [0]

    def before(_: Shard) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.stop_here()
        with lock:
            now[0] -= 1

    def start(*arguments: Any) -> None:
        nonlocal together
        together, most[0] = Gate(), 0
        real_start(*arguments)
        started.release()

    together, started = Gate(opened=True), threading.Semaphore(0)
    with rigged(toy, loaders=1, buffers=4, replan=lambda pass_bytes, _: plans[pass_bytes]) as rig:
        rig.check()
        assert {name for name in agents() if "loader" in name} == {"pipeload-loader-0"}
        rig.storage.before_read = before
        real_start, rig.exchange.start = rig.exchange.start, start  # type: ignore[method-assign]
        # All agents that may read at the same time do, and no others, until the gate opens.
        for number, loaders in ((1, 3), (2, 2), (0, 1), (1, 3)):
            call = rig.submit(pass_bytes=number)
            assert started.acquire(timeout=PATIENCE_S)
            for _ in range(loaders):
                together.wait_reached()
            with rig.exchange._changed:
                assert not rig.exchange._may_draw(), "another one would begin"
            together.open()
            result = {name: to_array(value) for name, value in call.result().items()}
            assert_same(result, rig.expected)
            assert most[0] <= loaders
        assert len([name for name in agents() if "loader" in name]) == 3


def test_a_pass_that_does_not_fit_is_refused_and_the_next_works(toy: Path) -> None:
    manifest = manifests.read(toy)

    def replan(pass_bytes: int, _: int) -> Plan:
        if pass_bytes:
            raise BudgetError("too large", needed_bytes=2, budget_bytes=1)
        return plan_by_hand(manifest)

    with rigged(toy, replan=replan) as rig:
        rig.check()
        for _ in range(2):
            with pytest.raises(BudgetError, match="too large"):
                rig.run(pass_bytes=5)
            rig.check(passes=2)
        assert rig.pipeline.plan.pass_bytes == 0


def test_what_passes_teach_is_taken_from_their_own_spans(toy: Path) -> None:
    with rigged(toy, resident=("block.001",)) as rig:
        rig.check(passes=3)
        # A call that runs no shard teaches nothing.
        rig.pipeline.set_budget(10**11)
        rig.pipeline.call(Call(nothing)).result()
        learned = rig.replanner.taught
        assert len(learned) == 3
        for number, (plan, spans, seconds) in enumerate(learned, start=1):
            assert plan.resident == {"block.001"}
            runs = [span for span in spans if span.kind == "run" and span.pass_number == number]
            assert [span.shard for span in runs] == NAMES
            assert seconds >= runs[-1].end_s - runs[0].begin_s


def test_a_lesson_may_change_the_plan_before_the_next_call(toy: Path) -> None:
    manifest = manifests.read(toy)
    plans = [plan_by_hand(manifest), plan_by_hand(manifest, resident=BLOCKS)]

    class Learning(Scripted):
        def after_pass(self, *arguments: Any) -> bool:
            super().after_pass(*arguments)
            return len(self.taught) == 1

    def replanner(_: Manifest) -> tuple[Plan, Replanner]:
        made = Learning(manifest, lambda *_: plans[len(made.taught) > 0])
        return plans[0], made

    with rigged(toy, replanner=replanner) as rig:
        rig.check()
        # Without a caller, the agents begin to read the shards that will stay.
        rig.wait(lambda: rig.pipeline.plan is plans[1])
        rig.check(passes=2)
        assert set(rig.exchange.residents.shards) == set(range(1, 7))
