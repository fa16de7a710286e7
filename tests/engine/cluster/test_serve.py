"""A server of a cluster's models answers as a server of the same models does, also while nodes are lost."""

from __future__ import annotations

import asyncio
import threading
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.cluster.conftest import BUDGETS, CHAT, EMBEDDER
from tests.engine.cluster.processes import Cluster
from tests.engine.harness import PATIENCE_S, Gate
from tests.engine.serve import client as clients
from tests.engine.serve.client import Client, with_server

import pipeload
from pipeload.cluster import watch as watches
from pipeload.cluster.model import ClusterModel
from pipeload.serve.settings import Settings

REQUESTS = {
    "/v1/completions": {"model": CHAT, "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0},
    "/v1/chat/completions": {"model": CHAT, "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 8},
    "/v1/responses": {"model": CHAT, "input": "the cat", "max_output_tokens": 8},
    "/tokenize": {"model": CHAT, "prompt": "the cat"},
    "/v1/embeddings": {"model": EMBEDDER, "input": ["the cat", "the dog sat"]},
}
STREAM = {"model": CHAT, "prompt": [5, 6, 7], "max_tokens": 24, "temperature": 0, "stream": True}


def settings(cluster: Cluster, *names: str, **options: Any) -> Settings:
    return Settings(**{"directories": {}, "aliases": {}, "cluster": cluster.address, "names": names, **options})


async def _answers(client: Client) -> dict[str, Any]:
    found = {}
    for path, body in REQUESTS.items():
        answer = await client.post(path, body)
        assert answer.status == 200, answer.body
        # Identities and times differ.
        found[path] = {
            name: value
            for name, value in answer.json().items()
            if name not in {"id", "created", "created_at", "completed_at"}
        }
    return found


def test_answers_are_those_of_the_same_models_here(cluster: Cluster, models: Path) -> None:
    here = with_server(clients.settings(models / CHAT, models / EMBEDDER, prefix_cache_bytes=0), _answers)
    there = with_server(settings(cluster, CHAT, EMBEDDER), _answers)
    for found in (here, there):
        # Rounding differs by what is computed together, and item ids are new each time.
        found["vectors"] = [one.pop("embedding") for one in found["/v1/embeddings"]["data"]]
        for item in found["/v1/responses"]["output"]:
            item.pop("id")
    np.testing.assert_allclose(here.pop("vectors"), there.pop("vectors"), atol=1e-5)
    for path in REQUESTS:
        assert there[path] == here[path], path


def test_all_models_of_the_nodes_are_served_and_shown(cluster: Cluster, models: Path) -> None:
    async def ask(client: Client) -> tuple[Any, Any, str, int]:
        listed, machine = await client.get("/v1/models"), await client.get("/machine")
        figures, unknown = (
            await client.get("/metrics"),
            await client.post("/v1/embeddings", {"model": "x", "input": "a"}),
        )
        return listed.json(), machine.json(), figures.body.decode(), unknown.status

    listed, machine, figures, unknown = with_server(settings(cluster, aliases={"gpt": CHAT}), ask)
    names = {path.name for path in models.iterdir()}
    assert {one["id"] for one in listed["data"]} == names | {"gpt"}
    assert {one["state"] for one in listed["data"]} == {"open"}
    for one in machine["models"]:
        assert one["memory"] is None
        assert {stage["node"] for stage in one["stages"]} <= BUDGETS.keys()
        assert one["stages"]
    assert f'pipeload_open{{model="{CHAT}"}} 1.0' in figures
    assert unknown == 404


def test_a_stream_goes_on_where_a_node_is_lost(cluster: Cluster, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, steps, step = Gate(), count(1), ClusterModel._step

    def gated(self: ClusterModel, *arguments: Any) -> Any:
        if next(steps) == 5:
            gate.stop_here()
        return step(self, *arguments)

    async def text(client: Client, *, lose: bool) -> tuple[str, int]:
        answer = client.begin("POST", "/v1/completions", STREAM)
        if lose:
            await asyncio.to_thread(gate.wait_reached)
            (model,) = (await client.get("/machine")).json()["models"]
            await asyncio.to_thread(cluster.kill, model["stages"][0]["node"])
            gate.open()
        await answer.until(lambda: answer.ended)
        (model,) = (await client.get("/machine")).json()["models"]
        changes = model["reconfigurations"]
        lost = [change for change in changes if "was lost" in change["why"]]
        assert len(lost) == model["replacements"]
        assert all(change["waited_s"] > 0 for change in lost)
        assert not lose or changes[-1]["after"] == model["stages"]
        return "".join(event["choices"][0]["text"] for event in answer.events()), model["replacements"]

    expected = with_server(clients.settings(models / CHAT), lambda client: text(client, lose=False))
    monkeypatch.setattr(ClusterModel, "_step", gated)
    found = with_server(settings(cluster, CHAT), lambda client: text(client, lose=True))
    assert (found[0], found[1]) == (expected[0], 1)


def test_calls_are_refused_without_a_node_and_go_on_when_nodes_are_back(cluster: Cluster, models: Path) -> None:
    async def ask(client: Client) -> None:
        body = REQUESTS["/v1/completions"]
        before = await client.post("/v1/completions", body)
        for name in [*cluster.nodes]:
            await asyncio.to_thread(cluster.kill, name)
        for _ in range(2):
            refused = await client.post("/v1/completions", body)
            assert (refused.status, refused.json()["error"]["code"]) == (503, "cluster_unavailable")
            assert refused.headers["retry-after"]
        await asyncio.to_thread(cluster.start, BUDGETS)
        after = await client.post("/v1/completions", body)
        assert after.status == 200, after.body
        assert after.json()["choices"] == before.json()["choices"]

    with_server(settings(cluster, CHAT), ask)


def test_what_cannot_be_served_is_told_at_the_start(cluster: Cluster) -> None:
    async def never(_: Client) -> None:
        raise AssertionError("it serves")

    with pytest.raises(pipeload.ClusterError, match="no-such-model"):
        with_server(settings(cluster, "no-such-model"), never)
    with pytest.raises(pipeload.ConfigError, match="An alias is of other"):
        with_server(settings(cluster, CHAT, aliases={"gpt": "other"}), never)


@pytest.mark.survey
def test_calls_go_on_when_the_scheduler_is_back(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost one ends the nodes, and Dask's own connections."""
    monkeypatch.setattr(watches, "_SILENT_S", 1.0)
    lost = threading.Event()

    async def ask(client: Client) -> None:
        body = REQUESTS["/v1/completions"]
        before = await client.post("/v1/completions", body)
        nodes = client.application.desk.models._nodes
        assert nodes is not None
        connection = nodes.connection()
        connection._watch.listeners.add(lambda told: lost.set() if isinstance(told, pipeload.ClusterError) else None)
        await asyncio.to_thread(cluster.lose_scheduler)
        assert await asyncio.to_thread(lost.wait, PATIENCE_S)
        refused = await client.post("/v1/completions", body)
        assert (refused.status, refused.json()["error"]["code"]) == (503, "cluster_unavailable")
        await asyncio.to_thread(cluster.start_scheduler)
        await asyncio.to_thread(cluster.start, {"node": "400MB"})
        answer = await client.post("/v1/completions", body)
        while answer.status == 503:
            answer = await client.post("/v1/completions", body)
        assert answer.json()["choices"] == before.json()["choices"]

    with Cluster(models, tmp_path) as cluster:
        cluster.start({"node": "400MB"})
        with_server(settings(cluster, CHAT), ask)
