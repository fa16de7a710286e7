"""Requests of every strange form get an answer below 500, and those beside them their own answers."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import PATIENCE_S
from tests.engine.serve.client import Client, settings, with_server
from tests.marks import slow

_BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "chat",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 2,
        "temperature": 0.5,
        "stop": ["x"],
        "logprobs": True,
        "top_logprobs": 1,
        "n": 2,
        "seed": 1,
        "stream": True,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logit_bias": {"5": 1.0},
    },
    "/v1/completions": {"model": "chat", "prompt": [5, 6], "max_tokens": 2, "top_p": 0.9, "top_k": 3, "logprobs": 1},
    "/v1/responses": {"model": "chat", "input": [{"role": "user", "content": "Hi"}], "max_output_tokens": 2},
    "/v1/embeddings": {"model": "embedder", "input": ["the cat", "dog"], "dimensions": 4, "encoding_format": "base64"},
    "/embed": {"inputs": ["the cat"], "truncate": True, "normalize": False, "dimensions": 3},
    "/v1/rerank": {"model": "embedder", "query": "cat", "documents": ["a", {"text": "b"}], "top_n": 1},
    "/rerank": {"query": "cat", "texts": ["a", "b"]},
    "/v1/classify": {"model": "chat", "input": [{"text": "a", "text_pair": "b"}], "top_k": 1},
    "/tokenize": {"model": "chat", "prompt": "the cat", "add_special_tokens": False},
}
_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, -(2**63), 1.5, 1e308, -1e308, "", "x", "\0", "\ud7ff", "🙂" * 50,
    [], {}, [[]], [None], [[1, -1]], [2**40], {"a": 1}, {"type": "json_object"}, {"type": "function"}, "auto",
    "x" * 5000,
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}},
]  # fmt: skip


def _strange(chance: random.Random, body: Any) -> Any:
    """A body with one to three parts replaced, dropped, doubled or added."""
    made = json.loads(json.dumps(body))
    for _ in range(chance.randint(1, 3)):
        place = made
        while isinstance(place, dict | list) and place:
            key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], dict | list) and place[key] and chance.random() < 0.5:
                place = place[key]
                continue
            match chance.randint(0, 3):
                case 0:
                    del place[key]
                case 1 if isinstance(place, dict):
                    place[f"{key}x"] = place[key]
                case _:
                    place[key] = chance.choice(_VALUES)
            break
    return made


def _damaged(chance: random.Random, data: bytes) -> bytes:
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        data = (
            data[:at]
            + bytes(chance.randrange(256) for _ in range(chance.randint(0, 3)))
            + data[at + chance.randint(0, 3) :]
        )
    return data


async def _all_below_500(client: Client, seed: int, count: int) -> None:
    chance = random.Random(seed)
    for _ in range(count):
        path = chance.choice(list(_BODIES))
        body = json.dumps(_strange(chance, _BODIES[path])).encode()
        if chance.random() < 0.2:
            body = _damaged(chance, body)
        answer = await client.post(path, None, raw=body)
        assert answer.status < 500, (path, body, answer.body)
        if answer.status >= 400:
            assert answer.json()["error"]["message"], (path, body)
        assert "Traceback" not in answer.body.decode(errors="replace")


@pytest.mark.timeout(900, func_only=True)
@pytest.mark.parametrize(("seed", "count"), [(1, 150), slow(2, 2000)])
def test_strange_requests_are_refused(chat_model: Path, embedder: Path, seed: int, count: int) -> None:
    async def ask(client: Client) -> None:
        await _all_below_500(client, seed, count)
        assert not client.application.desk.admission.places
        assert (await client.post("/v1/completions", _BODIES["/v1/completions"])).status == 200

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
