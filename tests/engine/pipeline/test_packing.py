"""Resident shards are packed behind the passes, streamed ones by the loaders, and a failed packing is no lost pass."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    PATIENCE_S,
    Background,
    Gate,
    assert_close,
    assert_same,
)
from tests.engine.pipeline.rig import (
    BLOCKS,
    FAILURES,
    NAMES,
    Scripted,
    failing_sessions,
    gated_packing,
    plan_by_hand,
    raising,
    rigged,
)

from pipeload.errors import LoadError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Shard
from pipeload.pipeline import loader as loaders
from pipeload.pipeline.loader import Loader
from pipeload.pipeline.messages import Task
from pipeload.pipeline.pipeline import Pipeline
from pipeload.pipeline.session import ShardSession, to_value
from pipeload.pipeline.sweep import Feed
from pipeload.planning.footprint import second_copy_bytes, session_bytes
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan, make_plan
from pipeload.planning.profile import Profile
from pipeload.storage.weights import Storage


@pytest.mark.parametrize("loaders", [1, 2])
@pytest.mark.parametrize("last", [1, 2], ids=["a block is last", "the epilogue is last"])
def test_the_smallest_budget_for_packing_does_not_hang(toy: Path, loaders: int, last: int) -> None:
    manifest = manifests.read(toy)
    manifest = replace(manifest, shards=manifest.shards[: len(manifest.shards) - 2 + last])
    if last == 1:
        manifest = replace(manifest, outputs=tuple(e for e in manifest.edges if e.name == "hidden.6"))
    profile = Profile(process_bytes=10**6, cores=1)

    def plan(budget_bytes: int) -> Plan:
        return make_plan(manifest, profile, budget_bytes=budget_bytes, needs=Needs(), loaders=loaders)

    # Two megabytes are not planned for.
    exact = plan(plan(10**10).peak_bytes + 2 * 10**6)
    assert exact.packed
    pipeline = Pipeline(manifest, Storage(toy, manifest), exact, Scripted(manifest, lambda *_: exact))
    try:
        values = {name: to_value(array) for name, array in toys.inputs().items()}
        for _ in range(3):
            pipeline.submit(Feed(pieces=[values]), Needs()).result()
        assert pipeline._memory.reservations.reserved_bytes <= pipeline._memory.reservations._limit_bytes
    finally:
        pipeline.close()


@pytest.mark.parametrize("resident", [tuple(NAMES), ("prologue", *BLOCKS[:3])], ids=["all", "some"])
def test_residents_are_packed_behind_the_passes_from_memory(toy: Path, resident: tuple[str, ...]) -> None:
    gate = Gate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "ShardSession", gated_packing(gate))
        with rigged(toy, resident=resident, packed=True) as rig:
            # Nothing is packed yet, so the answer is the sequential one's.
            rig.check()
            gate.wait_reached()
            rig.check()
            reserved = rig.pipeline._memory.reservations.reserved_bytes
            buffers = [shard.buffer for shard in rig.exchange.residents.shards.values()]
            assert len(buffers) == len(resident)
            gate.open()
            rig.wait_packed()
            for _ in range(3):
                assert_close(rig.run(), rig.expected, 1e-5)
            # The packed copies stand for the bytes, and the memory of the buffers is given back.
            rig.wait(lambda: all(buffer is not None and buffer._map.closed for buffer in buffers))
            if len(resident) == len(NAMES):
                assert rig.pipeline._memory.reservations.reserved_bytes == reserved
            counts = Counter(rig.storage.read)
            assert {counts[name] for name in resident} == {1}
            packs = [span.shard for span in rig.pipeline.trace.spans if span.kind == "pack"]
            assert sorted(packs) == sorted(resident)


def test_streamed_shards_that_are_packed_agree(toy: Path) -> None:
    with rigged(toy, packed_streamed=True) as rig:
        for _ in range(4):
            assert_close(rig.run(), rig.expected, 1e-5)
        kinds = Counter(span.kind for span in rig.pipeline.trace.spans)
        assert kinds["pack"] >= 4 * len(NAMES)
        assert kinds["session"] == 0


def test_each_loading_agent_that_packs_has_reserved_a_second_copy(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of them took 4 % more than the budget, where packing pays most: on slow cores."""
    packing, met = threading.Semaphore(0), threading.Event()

    class Met(ShardSession):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            packing.release()
            assert met.wait(PATIENCE_S)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(loaders, "ShardSession", Met)
    shards = manifests.read(toy).shards
    with rigged(toy, packed_streamed=True, loaders=3, buffers=4) as rig:
        asked = Background(rig.run)
        for _ in range(3):
            assert packing.acquire(timeout=PATIENCE_S)
        plan, reservations = rig.pipeline._memory.plan, rig.pipeline._memory.reservations
        taken = [2 * plan.buffer_bytes + session_bytes(shard, 1) + second_copy_bytes(shard) for shard in shards[:3]]
        assert reservations.reserved_bytes == sum(taken) <= plan.weights_bytes
        met.set()
        assert_close(asked.end(), rig.expected, 1e-5)
        rig.wait(lambda: len(rig.exchange._ready) == plan.buffers)
        taken = [2 * plan.buffer_bytes + session_bytes(shard, 1) for shard in shards[: plan.buffers]]
        assert reservations.reserved_bytes == sum(taken)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failed_packing_reaches_the_caller_once_and_is_not_tried_again(
    toy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(loaders, "ShardSession", failing_sessions("pack", error, "block.003"))
    with rigged(toy, resident=NAMES, packed=True) as rig:
        rig.check()
        rig.wait(lambda: rig.exchange.residents._error is not None)
        with raising(error, LoadError):
            rig.run()
        for _ in range(4):
            assert_close(rig.run(), rig.expected, 1e-5)
        assert not rig.exchange.residents.packing
        assert [name for name in NAMES if rig.exchange.residents.shards[NAMES.index(name)].buffer is None] == NAMES[:4]
        assert Counter(rig.storage.read) == dict.fromkeys(NAMES, 1)


def test_a_reset_waits_for_packing_and_forgets_what_comes_too_late(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr(loaders, "ShardSession", gated_packing(gate, "block.002"))
    manifest = manifests.read(toy)
    plans = [plan_by_hand(manifest, resident=NAMES, packed=True, loaders=1 + more, pass_bytes=more) for more in (0, 1)]
    with rigged(toy, resident=NAMES, packed=True, loaders=1, replan=lambda pass_bytes, _: plans[pass_bytes]) as rig:
        rig.check()
        gate.wait_reached()
        call = Background(lambda: rig.run(pass_bytes=1))
        rig.wait(lambda: rig.exchange.stopped)
        assert call.is_alive()
        gate.open()
        call.end()
        rig.wait_packed()
        assert_close(rig.run(pass_bytes=1), rig.expected, 1e-5)


def test_a_plan_without_packing_makes_packed_shards_leave(toy: Path) -> None:
    manifest = manifests.read(toy)
    plans = [plan_by_hand(manifest, resident=NAMES, packed=packed, pass_bytes=packed) for packed in (False, True)]
    with rigged(toy, resident=NAMES, replan=lambda pass_bytes, _: plans[pass_bytes]) as rig:
        rig.check()
        assert_close(rig.run(pass_bytes=1), rig.expected, 1e-5)
        rig.wait_packed()
        # Those that are not packed serve a plan that is: nothing is read again.
        assert Counter(rig.storage.read) == dict.fromkeys(NAMES, 1)
        rig.check(passes=2)
        assert Counter(rig.storage.read) == dict.fromkeys(NAMES, 2)


def test_packing_that_a_new_plan_finds_not_begun_makes_no_copy(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real, packed = Gate(), Loader._pack, []

    def late(self: Loader, task: Task, shard: Shard) -> None:
        gate.stop_here()
        real(self, task, shard)

    class Noted(ShardSession):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            packed.append(options.get("packed"))
            super().__init__(*arguments, **options)

    monkeypatch.setattr(Loader, "_pack", late)
    monkeypatch.setattr(loaders, "ShardSession", Noted)
    manifest = manifests.read(toy)
    plans = [plan_by_hand(manifest, resident=NAMES, packed=not more, pass_bytes=more) for more in (0, 1)]
    with rigged(toy, resident=NAMES, packed=True, replan=lambda pass_bytes, _: plans[pass_bytes]) as rig:
        rig.check()
        gate.wait_reached()
        call = Background(lambda: rig.run(pass_bytes=1))
        rig.wait(lambda: rig.exchange.stopped)
        gate.open()
        assert_same(call.end(), rig.expected)
        assert not any(packed)
        assert Counter(rig.storage.read) == dict.fromkeys(NAMES, 1)
