"""Requests of every strange form get an answer below 500, and those beside them their own answers."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest
from tests.engine.harness import PATIENCE_S
from tests.engine.serve.client import Client, settings, with_server
from tests.engine.serve.strange import BODIES, damaged, strange
from tests.marks import slow


async def _all_below_500(client: Client, seed: int, count: int) -> None:
    chance = random.Random(seed)
    for _ in range(count):
        path = chance.choice(list(BODIES))
        body = json.dumps(strange(chance, BODIES[path])).encode()
        if chance.random() < 0.2:
            body = damaged(chance, body)
        answer = await client.post(path, None, raw=body)
        assert answer.status < 500, (path, body, answer.body)
        if answer.status >= 400:
            assert answer.json()["error"]["message"], (path, body)
        assert "Traceback" not in answer.body.decode(errors="replace")


@pytest.mark.timeout(900, func_only=True)
@pytest.mark.parametrize(("seed", "count"), [(1, 150), slow(2, 600)])
def test_strange_requests_are_refused(chat_model: Path, embedder: Path, seed: int, count: int) -> None:
    async def ask(client: Client) -> None:
        await _all_below_500(client, seed, count)
        assert not client.application.desk.admission.places
        assert (await client.post("/v1/completions", BODIES["/v1/completions"])).status == 200

    with_server(settings(chat_model, embedder), ask)


@pytest.mark.timeout(900, func_only=True)
@pytest.mark.parametrize("clients", [20, slow(1000)])
def test_clients_that_vanish_disturb_no_other(chat_model: Path, clients: int) -> None:
    asked = {"prompt": [5, 6, 7], "max_tokens": 6, "temperature": 1, "seed": 5}

    async def ask(client: Client) -> None:
        chance = random.Random(1)
        expected = (await client.post("/v1/completions", asked)).json()["choices"]

        async def vanish() -> None:
            call = client.begin("POST", "/v1/completions", asked | {"max_tokens": 40, "stream": chance.random() < 0.5})
            for _ in range(chance.randint(0, 60)):
                await asyncio.sleep(0)
            call.leave()
            await asyncio.wait_for(call.task, PATIENCE_S)  # type: ignore[arg-type]
            assert call.status in (0, 200, 429, 499)

        async def stay() -> None:
            answer = await client.post("/v1/completions", asked)
            assert answer.status in (200, 429)
            if answer.status == 200:
                assert answer.json()["choices"] == expected

        for _ in range(clients // 10):
            await asyncio.gather(*(vanish() for _ in range(10)), stay(), stay())
        assert not client.application.desk.admission.places
        assert client.application.desk.models.served["chat"].users == 0
        assert client.application.desk.models.served["chat"].generating == 0

    with_server(settings(chat_model, max_waiting=12), ask)
