"""Bodies of all requests together hold what the budget keeps for them, or what weights give way for."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.engine.serve.client import Client, settings, with_server
from tests.engine.serve.strange import BODIES

from pipeload.serve.bodies.chat import ChatRequest
from pipeload.serve.bodies.completions import CompletionRequest
from pipeload.serve.bodies.embeddings import EmbeddingsRequest
from pipeload.serve.intake import Intake
from pipeload.serve.reading import decoded_bytes
from pipeload.serve.settings import LIMITS

_PATH = "/v1/completions"
_LARGE = LIMITS.bodies_bytes + 1


def _intake(client: Client) -> Intake:
    return client.application.work.intake


def _large() -> dict[str, str]:
    return {"content-length": str(_LARGE)}


def test_a_body_within_what_is_kept_takes_nothing_from_weights(chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        intake = _intake(client)
        begun = b"{" + b" " * 400_000
        slow = [client.begin("POST", _PATH, raw=begun, unfinished=True) for _ in range(2)]
        ok = await client.post(_PATH, {"prompt": "x", "max_tokens": 1})
        assert ok.status == 200
        # Without a length, as much again may come before more is asked for.
        assert (intake.free_bytes, intake.taken_bytes) == (LIMITS.bodies_bytes - 4 * len(begun), 0)
        for one in slow:
            one.leave()
            await one.task  # type: ignore[misc]
        assert intake.free_bytes == LIMITS.bodies_bytes

    with_server(settings(chat_model), ask)


@pytest.mark.parametrize("ending", ["answered", "left"])
def test_a_larger_one_takes_memory_from_weights_until_its_answer_has_ended(chat_model: Path, ending: str) -> None:
    async def ask(client: Client) -> None:
        intake = _intake(client)
        shares = client.application.desk.models.budget()._shares
        before = shares.opened
        body = json.dumps({"prompt": "x", "max_tokens": 1}).encode() + b" " * 1000
        slow = client.begin("POST", _PATH, raw=body, headers=_large(), unfinished=ending == "left")
        if ending == "left":
            while intake.taken_bytes < _LARGE or len(shares.opened) == len(before):
                await client.get("/health")
            (share,) = {*shares.opened} - {*before}
            assert share.counted_bytes == _LARGE
            slow.leave()
        await slow.task  # type: ignore[misc]
        assert (intake.free_bytes, intake.taken_bytes) == (LIMITS.bodies_bytes, 0)
        assert shares.opened == before
        assert slow.status == (499 if ending == "left" else 200)

    with_server(settings(chat_model), ask)


def test_where_weights_cannot_give_way_it_is_told_to_come_again_and_small_ones_go_on(chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        intake = _intake(client)
        most = LIMITS.body_bytes
        # The budget's part for bodies has room for a few of the largest.
        slow = [
            client.begin("POST", _PATH, raw=b"{", headers={"content-length": str(most)}, unfinished=True)
            for _ in range(40)
        ]
        while sum(one.status == 503 for one in slow) + intake.taken_bytes // most < len(slow):
            await client.get("/health")
        budget = client.application.desk.models.budget().budget_bytes
        assert budget is not None
        assert intake.taken_bytes <= budget // 4
        refused = [one for one in slow if one.status == 503]
        assert refused
        for one in refused:
            assert one.headers["retry-after"] == "1"
            assert one.json()["error"]["code"] == "no_memory_for_request"
        assert (await client.post(_PATH, {"prompt": "x", "max_tokens": 1})).status == 200
        for one in slow:
            one.leave()
            await one.task  # type: ignore[misc]
        assert (intake.free_bytes, intake.taken_bytes) == (LIMITS.bodies_bytes, 0)

    with_server(settings(chat_model, budget="400MB"), ask)


_MANY = 20_000
_NASTY: list[tuple[Any, bytes]] = [
    (ChatRequest, b'{"messages": [], "functions": [' + b"[]," * _MANY + b"[]]}"),
    (ChatRequest, b'{"messages": [], "functions": [' + b"{}," * _MANY + b"{}]}"),
    (ChatRequest, b'{"messages": [], "functions": [' + b'{"a":1},' * _MANY + b"1]}"),
    (ChatRequest, b'{"messages": [' + b'{"role":"user"},' * _MANY + b'{"role":"user"}]}'),
    (ChatRequest, b'{"messages": [' + b'{"role":"user","content":[{"type":"x"}]},' * _MANY + b'{"role":"user"}]}'),
    (ChatRequest, b'{"messages": [], "logit_bias": {' + b",".join(b'"%d":1' % i for i in range(_MANY)) + b"}}"),
    (ChatRequest, b'{"messages": [], "functions": {' + b",".join(b'"%d":[]' % i for i in range(_MANY)) + b"}}"),
    (CompletionRequest, b'{"prompt": [' + b"[]," * _MANY + b"[]]}"),
    (CompletionRequest, b'{"prompt": [' + b"1234567," * _MANY + b"1]}"),
    (EmbeddingsRequest, b'{"input": [' + b'"ab",' * _MANY + b'""]}'),
    (EmbeddingsRequest, ('{"input": "' + "a" * 10**6 + '🙂"}').encode()),
    (EmbeddingsRequest, b'{"input": "' + b"a" * 10**6 + b'\\ud83d\\ude42"}'),
    (EmbeddingsRequest, b'{"input": "' + b"a" * 10**6 + b'\\n"}'),
    (EmbeddingsRequest, b'{"input": "' + b"a" * 10**6 + b'"}'),
]


@pytest.mark.parametrize(("kind", "data"), _NASTY, ids=[str(number) for number in range(len(_NASTY))])
def test_objects_take_no_more_than_was_reserved_for_them(kind: Any, data: bytes) -> None:
    decoder = msgspec.json.Decoder(kind)
    text = bytearray(data)
    tracemalloc.start()
    try:
        made = decoder.decode(text)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert made is not None
    assert most_bytes <= decoded_bytes(text)


def test_usual_requests_reserve_little() -> None:
    for body in BODIES.values():
        assert decoded_bytes(bytearray(json.dumps(body).encode())) < 10_000


def test_a_request_with_too_many_headers_is_refused(chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        headers = {f"x-{number}": "1" for number in range(LIMITS.headers)}
        answer = await client.post(_PATH, {"prompt": "x"}, headers=headers)
        assert (answer.status, answer.headers["connection"]) == (431, "close")

    with_server(settings(chat_model), ask)
