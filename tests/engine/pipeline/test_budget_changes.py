"""Budgets that change, and memory that becomes short, while passes run and while none does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.engine.harness import (
    EMULATED,
    PATIENCE_S,
    Background,
    Gate,
    assert_close,
)
from tests.engine.pipeline.budgets import budgeted, budgets_of, profile_of
from tests.engine.pipeline.rig import (
    nothing,
    rigged,
)
from tests.engine.still_machine import PROCESS_BYTES

from pipeload.errors import BudgetError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest
from pipeload.machine.memory import rss_bytes
from pipeload.pipeline import pipeline as pipelines
from pipeload.pipeline import weights_memory
from pipeload.pipeline.requests import Call
from pipeload.pipeline.session import to_value
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile
from pipeload.planning.replanner import Replanner


def test_a_smaller_budget_gives_memory_back_before_it_returns(toy_large: Path) -> None:
    with budgeted(toy_large, 2) as (rig, budgets, _):
        rig.check(passes=2)
        assert len(rig.exchange.residents.shards) == 10
        buffers = {index: shard.buffer for index, shard in rig.exchange.residents.shards.items()}
        before = rss_bytes()
        rig.pipeline.set_budget(budgets[0])
        plan = rig.pipeline.plan
        assert plan.peak_bytes <= plan.budget_bytes == budgets[0]
        assert set(rig.exchange.residents.shards) <= {
            index for index, shard in enumerate(rig.manifest.shards) if shard.name in plan.resident
        }
        gone = [buffer for index, buffer in buffers.items() if index not in rig.exchange.residents.shards]
        assert len(gone) >= 8
        assert all(buffer is not None and buffer._map.closed for buffer in gone)
        # Reading may have begun anew, into as many buffers as the plan has.
        dropped = sum(buffer.nbytes for buffer in gone if buffer)
        assert EMULATED or before - rss_bytes() > 0.8 * (dropped - plan.buffers * plan.buffer_bytes)
        rig.check(passes=2)


def test_a_larger_budget_is_used(toy_large: Path) -> None:
    with budgeted(toy_large, 0) as (rig, budgets, _):
        rig.check(passes=2)
        residents = set(rig.exchange.residents.shards)
        for budget in budgets[1:]:
            rig.pipeline.set_budget(budget)
            rig.check(passes=2)
            assert residents < set(rig.exchange.residents.shards)
            residents = set(rig.exchange.residents.shards)
        assert len(residents) == 10
        rig.storage.read.clear()
        rig.check(passes=2)
        assert rig.storage.read == []


def test_a_budget_that_cannot_work_is_refused_and_the_old_one_stays(toy_large: Path) -> None:
    with budgeted(toy_large, 1) as (rig, budgets, _):
        rig.check()
        before = rig.pipeline.plan
        with pytest.raises(BudgetError) as caught:
            rig.pipeline.set_budget(budgets[0] - 5_000_000)
        assert caught.value.needed_bytes == pytest.approx(budgets[0], abs=2e6)
        assert rig.pipeline.plan == before
        rig.check(passes=2)
        assert rig.pipeline.plan.layout == before.layout
        assert rig.pipeline.plan.budget_bytes == budgets[1]


def test_budgets_change_while_passes_run(toy_large: Path) -> None:
    with budgeted(toy_large, 2) as (rig, budgets, _):
        calls = [Background(rig.check, 12) for _ in range(2)]
        for number in range(12):
            rig.pipeline.set_budget(budgets[number % 3])
            assert rig.pipeline.plan.budget_bytes == budgets[number % 3]
        for call in calls:
            call.end()
        assert rig.pipeline.stats.passes <= 24


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy-large", "toy-large-common"])
@pytest.mark.parametrize("seed", range(4))
def test_everything_at_once(
    made_toys: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, seed: int, name: str
) -> None:
    """Callers, changing needs and budgets, memory that comes and goes, withdrawn calls, learning and packing."""
    monkeypatch.setattr(pipelines, "_WATCH_S", 0.001)
    directory = made_toys(name)
    manifest = manifests.read(directory)
    least, _, everything = budgets_of(manifest, profile_of(manifest))
    budgets = [least + 3_000_000, (least + everything) // 2, everything, everything + 60_000_000]
    random = np.random.default_rng(seed)
    free = [10**12]

    def replanner(_: Manifest) -> tuple[Plan, Replanner]:
        made = Replanner(
            manifest, Profile(process_bytes=PROCESS_BYTES, cores=1), budget_bytes=budgets[2], free_bytes=lambda: free[0]
        )
        return made.plan(Needs(pass_bytes=10**6)), made

    with rigged(directory, replanner=replanner) as rig:

        def call(needs: list[int]) -> None:
            for need in needs:
                assert_close(rig.run(pass_bytes=10**6 + need), rig.expected, 1e-5)

        def set_budgets(order: list[int]) -> None:
            for which in order:
                rig.pipeline.set_budget(budgets[which])

        def swing(amounts: list[int]) -> None:
            for amount in amounts:
                free[0] = amount
                rig.run()

        def give_up(times: int) -> None:
            for _ in range(times):
                waiting = rig.submit()
                waiting.withdraw()

        threads = [
            Background(call, random.choice([0, 10**6], 8).tolist()),
            Background(call, random.choice([0, 10**6], 8).tolist()),
            Background(set_budgets, random.integers(0, 4, 8).tolist()),
            Background(swing, random.choice([budgets[0], budgets[1], 10**12], 8).tolist()),
            Background(give_up, 8),
        ]
        for thread in threads:
            thread.end()
        free[0] = 10**12
        plan = rig.pipeline.plan
        assert plan.peak_bytes <= plan.budget_bytes
        assert rig.pipeline._memory.reservations.reserved_bytes <= rig.pipeline._memory.reservations._limit_bytes


def test_an_idle_model_plans_anew_when_memory_becomes_short(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "_WATCH_S", 0.001)
    with budgeted(toy, 2) as (rig, budgets, free):
        rig.check()
        replanner = rig.replanner
        assert replanner.asked.acquire(timeout=PATIENCE_S)
        free[0] = budgets[0]
        # No call has come: this is the Daemon's doing.
        assert replanner.asked.acquire(timeout=PATIENCE_S)
        rig.pipeline.call(Call(nothing)).result()
        assert rig.pipeline.plan.peak_bytes <= rig.pipeline.plan.budget_bytes <= budgets[0]
        rig.check()


@pytest.mark.slow
def test_an_idle_model_gives_memory_back_when_it_becomes_short(
    toy_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "_WATCH_S", 0.001)
    with budgeted(toy_large, 2) as (rig, budgets, free):
        rig.check(passes=2)
        replanner = rig.replanner
        # One for each call: whatever comes now is the Daemon's doing.
        assert [replanner.asked.acquire(timeout=PATIENCE_S) for _ in range(2)] == [True, True]
        free[0] = budgets[0]
        assert replanner.asked.acquire(timeout=PATIENCE_S)
        rig.pipeline.call(Call(nothing)).result()
        plan = rig.pipeline.plan
        assert plan.peak_bytes <= plan.budget_bytes <= budgets[0]
        assert len(rig.exchange.residents.shards) <= len(plan.resident) < 10
        rig.check(passes=20)
        assert rig.pipeline.plan.budget_bytes <= budgets[0], "memory is still short"
        free[0] = 10**12
        rig.check(passes=20)
        assert len(rig.exchange.residents.shards) == 10


def test_an_idle_model_with_memory_to_spare_is_left_alone(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "_WATCH_S", 0.001)
    watched = Gate(opened=True)
    with budgeted(toy, 2) as (rig, _, _):
        real = rig.replanner.limit_bytes
        monkeypatch.setattr(rig.replanner, "limit_bytes", lambda plan: (watched.stop_here(), real(plan))[1])
        rig.check()
        plan = rig.pipeline.plan
        for _ in range(5):
            watched.wait_reached()
        assert rig.pipeline.plan is plan


def test_a_budget_that_fails_for_outputs_that_a_caller_keeps_is_refused_and_the_old_one_stays(toy_large: Path) -> None:
    """The new budget is enough for a pass alone, but not beside the outputs that callers still hold."""
    with budgeted(toy_large, 2) as (rig, budgets, _):
        rig.check()
        rig.pipeline.set_budget(budgets[0])
        rig.pipeline.set_budget(budgets[2])
        lent = to_value(np.zeros(10_000_000, np.uint8))
        rig.pipeline._lent.add([lent])
        with pytest.raises(BudgetError):
            rig.pipeline.set_budget(budgets[0])
        assert rig.replanner._budget_bytes == budgets[2]
        rig.check()
        assert rig.pipeline.plan.budget_bytes == budgets[2]
        del lent
        rig.pipeline.set_budget(budgets[0])
        rig.check()


def test_auto_is_checked_against_what_is_free_and_not_against_the_old_budget(toy_large: Path) -> None:
    with budgeted(toy_large, 2) as (rig, budgets, free):
        rig.check()
        free[0] = budgets[0] // 2
        with pytest.raises(BudgetError) as caught:
            rig.pipeline.set_budget(None)
        assert caught.value.budget_bytes == budgets[0] // 2
        assert rig.replanner._budget_bytes == budgets[2]
        free[0] = 10**12
        rig.check()
        assert rig.pipeline.plan.budget_bytes == budgets[2]


def test_what_the_heap_keeps_is_given_back_before_it_counts_as_growth_of_the_host(
    toy_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [100_000_000]
    monkeypatch.setattr(weights_memory, "rss_bytes", lambda: PROCESS_BYTES + kept[0])
    monkeypatch.setattr(weights_memory, "trim", lambda: kept.__setitem__(0, 0))
    with budgeted(toy_large, 2) as (rig, _, _):
        kept[0] = 0
        rig.check(passes=2)
        before = rig.pipeline.plan
        # Beside the weights, which are loaded.
        kept[0] = rig.pipeline._memory.occupied_bytes + 100_000_000
        rig.check()
        assert kept[0] == 0
        assert rig.pipeline.plan.process_bytes == before.process_bytes
        monkeypatch.setattr(weights_memory, "trim", nothing)
        kept[0] = rig.pipeline._memory.occupied_bytes + 30_000_000
        rig.check()
        assert rig.pipeline.plan.process_bytes > before.process_bytes + 5_000_000
