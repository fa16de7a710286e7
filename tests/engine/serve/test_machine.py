"""`/machine`: memory under the budget, shards, and the lanes of the latest sweep."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.engine.harness import smallest_budget
from tests.engine.serve.client import Client, settings, with_server
from tests.engine.serve.conftest import Sweeps
from tests.engine.tasks.fakes import WORDS, write_bert_tokenizer, write_json

import pipeload
from pipeload.cluster.history import Reconfiguration
from pipeload.format import manifest as manifests
from pipeload.planning.placement import Placement, Segment
from pipeload.serve import machine as view
from pipeload.tracing.stats import Stats
from pipeload.tracing.trace import KINDS, Span, Trace, lane_order

_ASKED = {"prompt": [5, 6, 7], "max_tokens": 4}
_PATH = "/v1/completions"
_EMBED = "/v1/embeddings", {"input": "the cat"}
_ROOM_BYTES = 3_000_000
_PARTS = ("resident_bytes", "buffer_bytes", "cache_bytes", "activation_bytes", "packing_bytes")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedder with eight blocks of 1 MB."""
    pytest.importorskip("onnx")
    from tests.engine.toy import make_toy

    directory = make_toy(tmp_path_factory.mktemp("wide") / "wide", blocks=8, width=512)
    write_bert_tokenizer(directory)
    write_json(directory, "config.json", {"vocab_size": len(WORDS)})
    return directory


async def _machine(client: Client) -> Any:
    answer = await client.get("/machine")
    assert answer.status == 200, answer.body
    return answer.json()


def _granted(machine: Any) -> int:
    return sum(model["memory"][part] for model in machine["models"] if model["memory"] for part in _PARTS)


@pytest.mark.parametrize("streamed", [False, True])
def test_parts_of_the_memory_add_up_to_the_plan(wide: Path, streamed: bool) -> None:
    async def ask(client: Client) -> tuple[Any, pipeload.Plan]:
        assert (await client.post(*_EMBED)).status == 200
        model = client.application.desk.models.served["wide"].model
        assert model is not None
        return await _machine(client), model.plan

    given = settings(wide, budget=smallest_budget(wide) + _ROOM_BYTES if streamed else 8_000_000_000)
    machine, plan = with_server(given, ask)
    (model,) = machine["models"]
    assert machine["budget_bytes"] == given.budget
    assert 0 < machine["rss_bytes"] <= machine["peak_rss_bytes"]
    assert machine["process_bytes"] + _granted(machine) == plan.peak_bytes <= given.budget
    assert bool(model["memory"]["streamed_bytes"]) is bool(model["memory"]["buffer_bytes"]) is streamed
    states = {shard["name"]: shard for shard in model["shards"]}
    assert {name for name, shard in states.items() if shard["state"] == "resident"} == plan.resident
    assert {name for name, shard in states.items() if shard["state"] == "partly"} == plan.partly_resident.keys()
    assert sum(shard["nbytes"] for shard in states.values()) == model["weight_bytes"]
    # The plan counts whole pages.
    read = sum(shard["streamed_bytes"] for shard in states.values())
    assert read <= plan.streamed_bytes <= read + 2 * 4096 * len(states)


def test_two_models_lie_under_one_budget(chat_model: Path, embedder: Path) -> None:
    async def ask(client: Client) -> Any:
        await client.post(_PATH, _ASKED)
        await client.post("/v1/embeddings", {"input": "the cat"})
        return await _machine(client)

    machine = with_server(settings(chat_model, embedder, budget="4GB"), ask)
    assert [model["name"] for model in machine["models"]] == ["chat", "embedder"]
    assert machine["process_bytes"] + _granted(machine) <= machine["budget_bytes"] == 4_000_000_000
    assert [model["sweeps"] for model in machine["models"]] == [4, 1]
    chat, embeds = machine["models"]
    assert chat["tokens_per_s"] > 0
    assert embeds["tokens_per_s"] is None


def test_a_closed_model_is_not_opened_and_keeps_its_figures(chat_model: Path) -> None:
    async def ask(client: Client) -> Any:
        await client.post(_PATH, _ASKED)
        served = client.application.desk.models.served["chat"]
        await served.close()
        machine = await _machine(client)
        assert served.model is None
        return machine

    machine = with_server(settings(chat_model, budget="auto"), ask)
    (model,) = machine["models"]
    assert (model["state"], model["memory"], model["sweep"], model["shards"]) == ("closed", None, None, [])
    assert model["sweeps"] == 4
    assert machine["budget_bytes"] is None
    assert machine["process_bytes"] == machine["rss_bytes"]


def test_the_lanes_are_those_of_the_latest_sweep_that_has_ended(wide: Path, sweeps: Sweeps) -> None:
    async def ask(client: Client) -> None:
        first = await _machine(client)
        assert first["models"][0]["sweep"] is None
        for _ in range(2):
            assert (await client.post(*_EMBED)).status == 200
        gate = sweeps.stop_at(3)
        call = client.begin("POST", *_EMBED)
        await asyncio.to_thread(gate.wait_reached)
        machine = await _machine(client)
        gate.open()
        await call.task  # type: ignore[misc]
        assert machine["calls"] == 1
        (model,) = machine["models"]
        sweep = model["sweep"]
        assert (sweep["number"], sweep["callers"], sweep["left_out"]) == (2, 1, 0)
        agents = [lane["agent"] for lane in sweep["lanes"]]
        assert agents == sorted(agents, key=lane_order)
        assert agents[0] == "inference"
        assert any(agent.startswith("loader-") for agent in agents)
        runs = [span for span in sweep["lanes"][0]["spans"] if span["kind"] == "run"]
        assert [span["shard"] for span in runs] == [shard["name"] for shard in model["shards"]]
        for one, other in pairwise(runs):
            assert one["end_s"] <= other["begin_s"]
        for lane in sweep["lanes"]:
            assert lane["busy_s"] <= sweep["seconds"]
            for span in lane["spans"]:
                assert span["kind"] in KINDS
                assert 0 <= span["begin_s"] < span["end_s"] <= sweep["seconds"]

    with_server(settings(wide, budget=smallest_budget(wide) + _ROOM_BYTES), ask)


def _filled(runs: int, later: int = 0) -> Trace:
    """A sweep of this many runs, of 1, 2, 3 ... ms, and these many spans of the next one."""
    trace, end_s = Trace(10_000), 10.0
    for number in range(1, runs + later + 1):
        begin_s, end_s = end_s, end_s + number / 1000
        trace.add(
            Span(
                agent="inference",
                kind="run",
                shard=f"block.{number:03}",
                begin_s=begin_s,
                end_s=end_s,
                pass_number=1 if number <= runs else 2,
            )
        )
    return trace


def test_a_long_sweep_leaves_its_shortest_spans_out_and_says_so() -> None:
    trace = _filled(500)
    lanes, left_out = view._lanes(trace.spans_since(0.0, trace.count - view._NEWEST), 1)
    (lane,) = lanes
    assert left_out == 500 - view._MOST_SPANS
    assert [span.shard for span in lane.spans] == [f"block.{number:03}" for number in range(left_out + 1, 501)]
    # Its share of the time counts all of them.
    assert lane.busy_s == pytest.approx(sum(range(1, 501)) / 1000)


def test_a_sweep_whose_record_has_gone_has_no_lanes() -> None:
    trace = _filled(10, later=view._NEWEST)
    assert view._lanes(trace.spans_since(0.0, trace.count - view._NEWEST), 1) == ([], 0)
    assert view._lanes([], 1) == ([], 0)


def test_the_latest_changes_of_a_placement_on_a_cluster_are_shown(toy: Path) -> None:
    """As the model tells them: when, from where, to where, why, and how long calls waited."""
    manifest = manifests.read(toy)
    names = [shard.name for shard in manifest.shards]

    def placed(node: str) -> Placement:
        segment = Segment(node=node, begin=0, end=len(names), run_s=0.0, read_s=0.0, send_s=0.0)
        return Placement(segments=(segment,))

    changes = [
        Reconfiguration(
            at=datetime.fromtimestamp(number, UTC),
            before=placed(f"node-{number}"),
            after=placed(f"node-{number + 1}") if number < 11 else None,
            why=f"reason {number}",
            waited_s=number / 4,
        )
        for number in range(12)
    ]
    there = SimpleNamespace(stats=Stats(), replacements=1, placement=placed("node-11"), reconfigurations=tuple(changes))
    served: Any = SimpleNamespace(
        name="toy", manifest=manifest, model=there, here=None, there=there, sweeps=0, read_bytes=0
    )
    found = msgspec.to_builtins(view._model(served, None))
    assert [one["at_s"] for one in found["reconfigurations"]] == [*range(2, 12)]
    first, *_, last = found["reconfigurations"]
    assert first == {
        "at_s": 2.0,
        "before": [{"node": "node-2", "first": names[0], "last": names[-1]}],
        "after": [{"node": "node-3", "first": names[0], "last": names[-1]}],
        "why": "reason 2",
        "waited_s": 0.5,
    }
    assert last["after"] is None
