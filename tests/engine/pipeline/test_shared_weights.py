"""Resident shards with the same weights share one buffer: read once, reserved once, and given back with the last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.engine.harness import Background, Gate, agents, assert_close, assert_same
from tests.engine.pipeline.budgets import budgeted
from tests.engine.pipeline.rig import (
    BLOCKS,
    FAILURES,
    NAMES,
    Rig,
    failing_sessions,
    gated_packing,
    nothing,
    plan_by_hand,
    rigged,
)
from tests.marks import slow

from pipeload.errors import ClosedError, LoadError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Shard
from pipeload.format.pages import memory_ceil
from pipeload.pipeline import loader as loaders
from pipeload.pipeline import shared_weights
from pipeload.planning.footprint import session_bytes
from pipeload.storage.buffers import Buffer

SOME = ("prologue", "block.001", "block.002", "block.005")
"""Not even the first block; plans by hand need not keep all of them."""


def _buffers(rig: Rig) -> set[int]:
    """The memory of the resident blocks."""
    shards = rig.exchange.residents.shards
    return {id(shard.buffer) for index, shard in shards.items() if NAMES[index] in BLOCKS}


def _reserved(rig: Rig) -> int:
    return rig.pipeline._memory.reservations.reserved_bytes


def _stopping(gate: Gate) -> Callable[[Shard], None]:
    """Stops the loader that reads the first block."""
    return lambda shard: gate.stop_here() if shard.name == "block.000" else None


@pytest.mark.parametrize("count", [1, 2, slow(3), 4])
@pytest.mark.parametrize("resident", [BLOCKS, tuple(NAMES), SOME], ids=["blocks", "all", "some"])
def test_they_are_read_once_and_reserved_once(toy_common: Path, resident: tuple[str, ...], count: int) -> None:
    with rigged(toy_common, resident=resident, loaders=count) as rig:
        rig.check(passes=3)
        read = Counter(name for name in rig.storage.read if name in resident)
        first = next(name for name in resident if name in BLOCKS)
        assert read == Counter([first, *(name for name in resident if name not in BLOCKS)])
        assert len(_buffers(rig)) == 1
        # The next pass is being read ahead, until the buffers are full.
        rig.wait(lambda: rig.pipeline.stats.read_bytes == sum(nbytes for _, nbytes in rig.storage.read_bytes))
        if not rig.pipeline.plan.streamed_bytes:
            assert rig.pipeline.stats.read_bytes == rig.manifest.weight_bytes == rig.pipeline.plan.resident_bytes
            assert _reserved(rig) == rig.pipeline.plan.weights_bytes


def test_streamed_shards_of_the_same_weights_are_read_each(toy_common: Path) -> None:
    with rigged(toy_common, buffers=2, loaders=2) as rig:
        rig.check(passes=3)
        assert all(count >= 3 for count in Counter(rig.storage.read).values())
        assert len(set(rig.storage.read)) == len(NAMES)


def test_those_who_need_the_weights_wait_while_they_are_read(toy_common: Path) -> None:
    gate = Gate()
    with rigged(toy_common, resident=NAMES, loaders=4, before_read=_stopping(gate)) as rig:
        call = Background(rig.check)
        gate.wait_reached()
        # The agents are idle, and hold no memory that the reader could need.
        with rig.exchange._changed:
            assert not rig.exchange._may_draw()
        sessions = sum(session_bytes(shard, 1) for shard in rig.manifest.shards[:2])
        weights = sum(memory_ceil(shard.nbytes) for shard in rig.manifest.shards[:2])
        rig.wait(lambda: _reserved(rig) == weights + sessions)
        gate.open()
        call.end()


def test_two_callers_at_once(toy_common: Path) -> None:
    for resident in (BLOCKS, tuple(NAMES)):
        with rigged(toy_common, resident=resident) as rig:
            for call in [Background(rig.check, 5) for _ in range(2)]:
                call.end()
            assert Counter(rig.storage.read)["block.000"] == 1


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_a_read_that_fails_reaches_all_callers_and_leaves_nothing_reserved(
    toy_common: Path, error: BaseException
) -> None:
    gate = Gate()
    stop = _stopping(gate)

    def fail(shard: Shard) -> None:
        stop(shard)
        if shard.name == "block.000":
            raise error

    with rigged(toy_common, resident=BLOCKS, loaders=4, before_read=fail) as rig:
        calls = [Background(rig.check) for _ in range(2)]
        gate.wait_reached()
        gate.open()
        for call in calls:
            # Each caller gets a copy.
            with pytest.raises(LoadError if isinstance(error, Exception) else type(error)):
                call.end()
        assert _reserved(rig) == rig.pipeline._memory.shared.reserved_bytes == 0
        rig.storage.before_read = nothing
        rig.check(passes=2)
        assert Counter(rig.storage.read)["block.000"] == 1


@pytest.mark.parametrize("at", ["block.000", "block.003"])
def test_a_session_that_fails_leaves_the_weights_to_the_others(
    toy_common: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    for packed in (False, True):
        monkeypatch.setattr(loaders, "ShardSession", failing_sessions("make", MemoryError(), at))
        with rigged(toy_common, resident=NAMES, packed=packed) as rig:
            with pytest.raises(LoadError):
                rig.check()
            assert_close(rig.run(), rig.expected, 1e-5)
            assert Counter(rig.storage.read)["block.000"] == 1 + (at == "block.000")


def test_a_buffer_that_the_system_refuses_leaves_nothing_reserved(
    toy_common: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [LoadError("no memory")]

    def refuse(nbytes: int) -> Buffer:
        if refusals:
            raise refusals.pop()
        return Buffer(nbytes)

    monkeypatch.setattr(shared_weights, "Buffer", refuse)
    with rigged(toy_common, resident=BLOCKS) as rig:
        with pytest.raises(LoadError, match="no memory"):
            rig.check()
        assert _reserved(rig) == 0
        rig.check(passes=2)
        assert len(_buffers(rig)) == 1


@pytest.mark.parametrize("count", [1, 4])
def test_closing_while_others_wait_for_the_weights_ends_all(toy_common: Path, count: int) -> None:
    gate = Gate()
    with rigged(toy_common, resident=NAMES, loaders=count, before_read=_stopping(gate)) as rig:
        calls = [Background(rig.check, 3) for _ in range(2)]
        gate.wait_reached()
        closing = Background(rig.pipeline.close)
        for call in calls:
            assert isinstance(call.wait(), ClosedError)
        gate.open()
        closing.end()
        assert agents() == []
        assert rig.pipeline._memory.shared.reserved_bytes == 0


@pytest.mark.parametrize("resident", [BLOCKS, tuple(NAMES)], ids=["blocks", "all"])
def test_packed_copies_are_made_from_the_weights_that_were_read_once(
    toy_common: Path, monkeypatch: pytest.MonkeyPatch, resident: tuple[str, ...]
) -> None:
    gate = Gate()
    monkeypatch.setattr(loaders, "ShardSession", gated_packing(gate))
    with rigged(toy_common, resident=resident, packed=True) as rig:
        memory, weights = rig.pipeline._memory, rig.manifest.shards[1].nbytes
        rig.check()
        gate.wait_reached()
        assert len(_buffers(rig)) == 1
        # What is reserved for later copies is no memory of the process yet, and no figure to learn from.
        assert memory.shared.unused_bytes == (len(BLOCKS) - 1) * memory_ceil(weights)
        assert memory.occupied_bytes == _reserved(rig) + memory._pool.idle_bytes - memory.shared.unused_bytes
        assert not memory.complete
        gate.open()
        rig.wait_packed()
        for _ in range(2):
            assert_close(rig.run(), rig.expected, 1e-5)
        assert memory.shared.unused_bytes == memory.shared.reserved_bytes == 0
        assert memory.complete
        assert Counter(rig.storage.read)["block.000"] == 1
        if resident == tuple(NAMES):
            assert _reserved(rig) == rig.pipeline.plan.weights_bytes


@pytest.mark.parametrize("order", [(0, 1, 0, 2, 0, 3, 1, 4, 0), (4, 3, 4, 2, 1, 4, 0, 3, 3)])
def test_they_follow_each_other_through_any_plans(toy_common: Path, order: tuple[int, ...]) -> None:
    manifest = manifests.read(toy_common)
    plans = [
        plan_by_hand(manifest, resident=resident, packed=packed, pass_bytes=number)
        for number, (resident, packed) in enumerate(
            [(BLOCKS, False), ((), False), (SOME, False), (NAMES, True), (NAMES, False)]
        )
    ]
    first = plans[order[0]]
    with rigged(
        toy_common, resident=tuple(first.resident), packed=first.packed, replan=lambda number, _: plans[number]
    ) as rig:
        reservations = rig.pipeline._memory.reservations
        for number in order:
            for _ in range(2):
                answer = rig.run(pass_bytes=number)
                assert_close(answer, rig.expected, 1e-5)
                if not plans[number].packed:
                    assert_same(answer, rig.expected)
            assert {NAMES[index] for index in rig.exchange.residents.shards} == plans[number].resident
            assert _reserved(rig) <= reservations._limit_bytes == plans[number].weights_bytes
            if not plans[number].streamed_bytes:
                assert _reserved(rig) == plans[number].weights_bytes
            if not plans[number].packed and plans[number].resident:
                assert len(_buffers(rig)) == 1


def test_budgets_between(toy_large_common: Path) -> None:
    """From one buffer to everything resident: the range stays as a whole, and leaves as a whole."""
    with budgeted(toy_large_common, 0) as (rig, (least, _, everything), _):
        weights = rig.manifest.shards[1].nbytes
        # A buffer for streaming is as large as the range, which can stay instead: all else is small.
        assert everything - least < 2 * weights
        for budget in [*range(least, everything, 700_000), everything, least, everything]:
            rig.pipeline.set_budget(budget)
            rig.check()
            plan = rig.pipeline.plan
            blocks = {shard.name for shard in rig.manifest.shards if shard.role == "block"}
            assert not plan.resident & blocks or plan.resident >= blocks
            assert plan.peak_bytes <= plan.budget_bytes == budget
            assert _reserved(rig) <= plan.weights_bytes
        assert not rig.pipeline.plan.streamed_bytes
        assert rig.pipeline.plan.resident_bytes == rig.manifest.weight_bytes


def test_a_lower_budget_gives_the_range_back_and_a_higher_one_reads_it_once(toy_large_common: Path) -> None:
    with budgeted(toy_large_common, 2) as (rig, budgets, _):
        rig.check(passes=2)
        (buffer,) = {id(s.buffer): s.buffer for k, s in rig.exchange.residents.shards.items() if 1 <= k <= 8}.values()
        assert buffer is not None
        rig.pipeline.set_budget(budgets[0])
        assert buffer._map.closed
        assert rig.pipeline._memory.shared.reserved_bytes == 0
        rig.check()
        rig.storage.read.clear()
        rig.pipeline.set_budget(budgets[2])
        rig.check(passes=2)
        assert sum(name.startswith("block") for name in rig.storage.read) == 1
