"""A stage tells what its calls are doing, and takes the times of passes whose sizes it knows."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Status
from tests.engine.harness import PATIENCE_S, Gate
from tests.engine.model.loading import gated_reads

import pipeload
from pipeload.cluster import stage as stages
from pipeload.cluster.messages import Job, Place, Text, TextLostError
from pipeload.cluster.offer import OFFER
from pipeload.cluster.stage import Stage
from pipeload.format import manifest as manifests
from pipeload.format.caches import past_symbols
from pipeload.measuring.example_inputs import example_inputs
from pipeload.measuring.profiler import profile_dims
from pipeload.tracing.stats import PassStats


class _Pace:
    def __init__(self) -> None:
        self.kinds: list[Hashable] = []
        self.run_s, self.read_s, self.slowness = 0.5, 0.25, (1.5, 1.0)

    def note(self, kind: Hashable, last: PassStats, expected_s: float) -> None:
        assert last.agents
        assert expected_s > 0
        self.kinds.append(kind)


@pytest.fixture
def node(toy: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(
        model=lambda _: (toy, b""),
        known_speed=lambda _: None,
        budget=pipeload.Budget("8GB"),
        stages={},
        paces=defaultdict(_Pace),
    )
    monkeypatch.setattr(stages, "get_worker", lambda: SimpleNamespace(extensions={OFFER: made}, status=Status.running))
    return made


def test_facts_of_a_stage(node: SimpleNamespace, toy: Path) -> None:
    manifest = manifests.read(toy)
    inputs = example_inputs(manifest, profile_dims(manifest))

    async def main() -> None:
        stage = Stage("hash", "toy", f"{manifest.shards[0].name}:{manifest.shards[-1].name}")
        (facts,) = node.stages.values()
        assert (facts["model"], facts["sha256"], facts["calls"], facts["slowness"]) == ("toy", "hash", 0, None)
        await stage.follow("way", None, [spec.name for spec in manifest.outputs])
        for number in range(3):
            await stage.run("way", str(number), inputs)
        assert (facts["calls"], facts["waiting"]) == (3, 0)
        assert (facts["run_s"], facts["read_s"], facts["slowness"]) == (0.5, 0.25, (1.5, 1.0))
        await stage.close()
        assert not node.stages

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    assert len(node.paces["hash"].kinds) == 3
    assert len({*node.paces["hash"].kinds}) == 1


def test_calls_of_other_sizes_at_once_are_not_timed(
    node: SimpleNamespace, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latest pass may have been any of theirs."""
    manifest = manifests.read(toy)
    dims = profile_dims(manifest)
    inputs = example_inputs(manifest, dims)
    others = example_inputs(manifest, {name: size + 1 for name, size in dims.items()})

    async def main() -> None:
        stage = Stage("hash", "toy", f"{manifest.shards[0].name}:{manifest.shards[-1].name}")
        (facts,) = node.stages.values()
        gate, run = Gate(), stage._model.run

        def stopping(arrays: dict[str, Any]) -> Any:
            if next(iter(arrays.values())).shape == next(iter(others.values())).shape:
                gate.stop_here()
            return run(arrays)

        monkeypatch.setattr(stage._model, "run", stopping)
        await stage.follow("way", None, [spec.name for spec in manifest.outputs])
        waiting = asyncio.ensure_future(stage.run("way", "other", others))
        await asyncio.to_thread(gate.wait_reached)
        assert facts["waiting"] == 1
        await stage.run("way", "own", inputs)
        assert node.paces["hash"].kinds == []
        gate.open()
        await waiting
        assert len(node.paces["hash"].kinds) == 1
        await stage.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_stage_that_left_a_ring_has_no_caches_of_it(
    toy_decoder: Path, node: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the ring that it still belongs to stay; a call that comes too late makes none."""
    monkeypatch.setattr(node, "model", lambda _: (toy_decoder, b""))
    manifest = manifests.read(toy_decoder)
    dims = profile_dims(manifest) | dict.fromkeys(past_symbols(manifest), 0)
    caches = manifest.cache_inputs
    inputs = {name: array for name, array in example_inputs(manifest, dims).items() if name not in caches}

    def job(state: str, step: int, past: int) -> Job:
        return Job(state=state, step=step, past=past, first=True, last=True, expected=8, positions=1, top=0)

    async def main() -> None:
        stage = Stage("hash", "toy", f"{manifest.shards[0].name}:{manifest.shards[-1].name}")
        for route in ("before", "after"):
            await stage.follow(route, None, [spec.name for spec in manifest.outputs])
            await stage.step(route, "", inputs, job(f"of {route}", 0, 0))
        assert {*stage._slots} == {"of before", "of after"}
        await stage.part("before")
        assert {*stage._slots} == {"of after"}
        with pytest.raises(pipeload.ClosedError):
            await stage.step("before", "", inputs, job("late", 0, 0))
        with pytest.raises(pipeload.ClosedError):
            await stage.run("before", "late", inputs)
        assert {*stage._slots} == {"of after"}
        await stage.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


@pytest.mark.parametrize("begun", [True, False], ids=["while it runs", "before it begins"])
def test_a_pass_ends_when_its_caller_has_left(
    node: SimpleNamespace, toy: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """It computes nothing more, and leaves no answer; other passes go on."""
    manifest = manifests.read(toy)
    inputs = example_inputs(manifest, profile_dims(manifest))
    gate = gated_reads(monkeypatch, at="block.001")

    async def main() -> None:
        stage = Stage("hash", "toy", f"{manifest.shards[0].name}:{manifest.shards[-1].name}")
        await stage.follow("way", None, [spec.name for spec in manifest.outputs])
        await asyncio.to_thread(gate.wait_reached)
        if not begun:
            await stage.forget("1")
        call = asyncio.ensure_future(stage.run("way", "1", inputs))
        asked = asyncio.ensure_future(stage.answer("1"))
        other = asyncio.ensure_future(stage.run("way", "2", inputs))
        if begun:
            while "1" not in stage._callers or not stage._callers["1"]._outcome:
                await asyncio.sleep(0)
            await stage.forget("1")
        with pytest.raises(pipeload.ClosedError, match="caller has left"):
            await call
        with pytest.raises((asyncio.CancelledError, pipeload.ClosedError)):
            await asked
        gate.open()
        await other
        assert {*await stage.answer("2")} == {spec.name for spec in manifest.outputs}
        # One that ends as its caller leaves keeps no answer.
        await stage.forget("3")
        await stage._pass_on("run", "way", "3", {})
        assert stage._answers == stage._callers == {}
        await stage.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_callers_that_have_left_cost_no_other_caller_its_answer(node: SimpleNamespace, toy: Path) -> None:
    """However many have left while a call waits: they are remembered apart."""
    assert node.stages == {}
    shards = manifests.read(toy).shards

    async def main() -> None:
        stage = Stage("hash", "toy", f"{shards[0].name}:{shards[-1].name}")
        await stage.follow("way", None, [])
        waiting = asyncio.ensure_future(stage.answer("waits"))
        await asyncio.sleep(0)
        for number in range(3 * stages._ANSWERS):
            await stage.forget(str(number))
        assert len(stage._left) == stages._ANSWERS
        await stage._pass_on("run", "way", "waits", {})
        assert await waiting == {}
        await stage.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_step_ends_when_its_caches_are_closed(
    toy_decoder: Path, node: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "model", lambda _: (toy_decoder, b""))
    manifest = manifests.read(toy_decoder)
    dims = profile_dims(manifest) | dict.fromkeys(past_symbols(manifest), 0)
    inputs = {
        name: array for name, array in example_inputs(manifest, dims).items() if name not in manifest.cache_inputs
    }
    gate = gated_reads(monkeypatch, at=manifest.shards[1].name)

    async def main() -> None:
        stage = Stage("hash", "toy", f"{manifest.shards[0].name}:{manifest.shards[-1].name}")
        await stage.follow("way", None, [spec.name for spec in manifest.outputs])
        job = Job(state="text", step=0, past=0, first=True, last=True, expected=8, positions=1, top=0)
        call = asyncio.ensure_future(stage.step("way", "1", inputs, job))
        await asyncio.to_thread(gate.wait_reached)
        while "text" not in stage._slots:
            await asyncio.sleep(0)
        await stage.end_state("text")
        with pytest.raises(pipeload.PipeloadError):
            await call
        gate.open()
        assert stage._model._decoding.cache_bytes() == 0
        await stage.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_caches_that_are_closed_while_they_are_copied_count_until_nothing_writes_into_them(
    toy_decoder: Path, node: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "model", lambda _: (toy_decoder, b""))
    manifest = manifests.read(toy_decoder)
    names = sorted(manifest.cache_inputs)
    text = Text(state="text", length=8, expected=8, dims=profile_dims(manifest))

    async def main() -> None:
        stage = Stage("hash", "toy", f"{manifest.shards[0].name}:{manifest.shards[-1].name}")
        await stage.follow("way", None, [])
        begun, counted = asyncio.Event(), []

        async def call(*_: object) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                counted.append(stage._model._decoding.cache_bytes())

        stage._worker.rpc = None
        monkeypatch.setattr(stages, "call", call)
        taking = asyncio.ensure_future(stage.take("way", text, [(Place(node="a", address="b", key="c"), names)]))
        await begun.wait()
        await stage.end_state("text")
        with pytest.raises(TextLostError, match="while they were copied"):
            await taking
        assert counted[0] > 0
        assert len(counted) == 1
        assert stage._model._decoding.cache_bytes() == 0
        assert stage._slots == {}
        await stage.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_cores_of_a_stage_where_one_is_little(node: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cores() -> Any:
        stage = Stage("hash", "toy", "prologue:epilogue")
        (facts,) = node.stages.values()
        await stage.close()
        return facts.get("cores")

    assert asyncio.run(asyncio.wait_for(cores(), PATIENCE_S)) is None
    # The kernel refuses to pin a thread to these, which is no error. Nothing was measured: the big core computes.
    monkeypatch.setattr("pipeload.measuring.profiler.core_capacities", lambda: {900: 1024, 901: 400})
    assert asyncio.run(asyncio.wait_for(cores(), PATIENCE_S)) == "computing on 900, reading on 901"
