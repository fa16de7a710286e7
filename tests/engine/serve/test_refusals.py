"""Requests that cannot be answered get an error in OpenAI's shape, which names the field and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.engine.serve.client import Answer, Client, settings, with_server

from pipeload.serve.settings import LIMITS

_CHAT = "/v1/chat/completions"
_ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}

# Path, fields, status, words of the message, the field that is wrong.
_CASES: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    (_CHAT, {"model": "gpt-9"}, 404, "There is no model 'gpt-9' here, only chat, embedder.", "model"),
    (_CHAT, {"colour": "red"}, 400, "unknown field `colour`", "colour"),
    (_CHAT, {"temperature": "hot"}, 400, "Expected `float", "temperature"),
    (_CHAT, {"messages": []}, 400, "at least one message", "messages"),
    (_CHAT, {"messages": [{"role": "pirate", "content": "Arr"}]}, 400, "'pirate'", "messages[0].role"),
    (
        _CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        400,
        "type 'image_url'",
        "messages",
    ),
    (_CHAT, {"reasoning_effort": "high"}, 400, 'reasoning_effort is "high"', "reasoning_effort"),
    (_CHAT, {"audio": {"voice": "x"}}, 400, "audio is", "audio"),
    (_CHAT, {"modalities": ["audio"]}, 400, "modalities is", "modalities"),
    (_CHAT, {"top_logprobs": 2}, 400, "needs logprobs", "top_logprobs"),
    (_CHAT, {"top_logprobs": 21, "logprobs": True}, 400, "from 0 to 20", "top_logprobs"),
    (_CHAT, {"n": 0}, 400, "n is 0", "n"),
    (_CHAT, {"n": 17}, 400, "from 1 to 16", "n"),
    (_CHAT, {"stop": ["x"] * 17}, 400, "from 0 to 16", "stop"),
    (_CHAT, {"stop": ""}, 400, "from 1 to", "stop"),
    (_CHAT, {"presence_penalty": 3}, 400, "from -2 to 2", "presence_penalty"),
    (_CHAT, {"logit_bias": {"the": 1}}, 400, "no token id", "logit_bias"),
    (_CHAT, {"max_tokens": 0}, 400, "max_new_tokens must be", None),
    (_CHAT, {"max_completion_tokens": 3}, 400, "differ", "max_tokens"),
    (_CHAT, {"max_tokens": 10**9}, 400, "positions", None),
    (_CHAT, {"temperature": -1}, 400, "temperature must be", None),
    (_CHAT, {"seed": -1}, 400, "seed must be", None),
    (_CHAT, {"model": "embedder"}, 400, "", None),
    ("/v1/completions", {"echo": True, "prompt": "x"}, 400, "echo is true", "echo"),
    ("/v1/completions", {"best_of": 2, "prompt": "x"}, 400, "best_of is 2", "best_of"),
    ("/v1/completions", {"prompt": []}, 400, "empty list", "prompt"),
    ("/v1/completions", {"prompt": [1, "x"]}, 400, "numbers beside texts", "prompt"),
    ("/v1/completions", {"prompt": [10**6]}, 400, "outside the model's vocabulary", None),
    ("/v1/embeddings", {"input": "cat", "model": "chat"}, 400, "", None),
    ("/v1/embeddings", {"input": []}, 400, "empty list", "input"),
    ("/v1/embeddings", {"input": "the cat " * 20}, 400, "Text 0 has more than the 16 tokens", "input"),
    ("/v1/embeddings", {"input": "cat", "dimensions": 65}, 400, "vectors have 64", "dimensions"),
    ("/v1/embeddings", {"input": "cat", "dimensions": 0}, 400, "truncate_dim must be", None),
    ("/v1/embeddings", {"input": [[10**6]]}, 400, "token ids from 0 to", None),
    ("/v1/embeddings", {"input": [[2**64 - 1]]}, 400, "token ids from 0 to", None),
    ("/v1/embeddings", {"input": [[10**30]]}, 400, "token ids from 0 to", None),
    ("/v1/embeddings", {"input": "cat", "encoding_format": "hex"}, 400, "'hex'", "encoding_format"),
    ("/v1/embeddings", {"input": ["cat"] * (LIMITS.inputs + 1)}, 400, "entries; this server takes 2048", "input"),
    ("/embed", {"inputs": "cat", "truncation_direction": "Left"}, 400, "Only the end", "truncation_direction"),
]


def _checked(answer: Answer, status: int) -> dict[str, Any]:
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error


def test_what_the_server_cannot_do_is_refused_by_name(chat_model: Path, embedder: Path) -> None:
    async def ask(client: Client) -> None:
        for path, fields, status, words, param in _CASES:
            body = {**_ASKED, **fields} if path == _CHAT else fields
            error = _checked(await client.post(path, body), status)
            assert words in error["message"], (path, fields)
            assert error["param"] == param, (path, fields, error)
            assert error["type"] == "invalid_request_error"

    with_server(settings(chat_model, embedder), ask)


def test_a_stream_that_fails_before_its_first_token_has_a_status(chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        _checked(await client.post(_CHAT, {**_ASKED, "stream": True, "max_tokens": 10**9}), 400)
        assert not client.application.desk.admission.places

    with_server(settings(chat_model), ask)


def test_values_that_ask_for_nothing_are_taken(chat_model: Path) -> None:
    neutral = {
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "audio": None,
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "logprobs": False,
        "stream": False,
        "stop": None,
    }

    async def ask(client: Client) -> None:
        assert (await client.post(_CHAT, _ASKED | neutral)).status == 200
        body = {"prompt": "x", "max_tokens": 1, "echo": False, "best_of": 1, "suffix": None}
        assert (await client.post("/v1/completions", body)).status == 200

    with_server(settings(chat_model), ask)


def test_a_request_that_is_no_body_is_refused(embedder: Path) -> None:
    deep = b'{"input": ' + b"[" * 70 + b"]" * 70 + b"}"

    async def ask(client: Client) -> None:
        path = "/v1/embeddings"
        cases = [
            ({"raw": b"{"}, 400, "no JSON"),
            ({"raw": b"\xff\xfe"}, 400, "no JSON"),
            ({"raw": b""}, 400, "no JSON"),
            ({"raw": deep}, 400, "deeper than 64"),
            ({"raw": b'{"input": "\\ud800"}'}, 400, ""),
            ({"raw": b"{}", "headers": {"content-type": "text/plain"}}, 415, "send application/json"),
            ({"raw": b" " * (LIMITS.body_bytes + 1)}, 413, "more than"),
            ({"raw": b"{}", "headers": {"content-length": "9" * 30}}, 413, "more than"),
        ]
        for options, status, words in cases:
            answer = await client.post(path, None, **options)
            assert words in _checked(answer, status)["message"], options
        brackets = json.dumps({"input": "[{" * 40 + '"' + "[" * 100}).encode()
        assert "tokens that the model takes" in _checked(await client.post(path, None, raw=brackets), 400)["message"]
        assert _checked(await client.get("/nothing"), 404)["message"] == "/nothing is no route of this server."
        refused = await client.get(path)
        assert _checked(refused, 405)["message"] == "/v1/embeddings takes no GET."
        assert refused.headers["allow"] == "POST"

    with_server(settings(embedder), ask)


def test_a_browser_that_was_led_here_under_another_name_is_refused(embedder: Path) -> None:
    async def ask(client: Client) -> None:
        for host, status in (
            ("evil.example", 403),
            ("evil.example:8080", 403),
            ("", 403),
            ("localhost:1", 200),
            ("127.0.0.1", 200),
            ("[::1]:8080", 200),
        ):
            assert (await client.get("/v1/models", headers={"host": host})).status == status, host

    with_server(settings(embedder), ask)


def test_a_key_is_asked_for(embedder: Path) -> None:
    async def ask(client: Client) -> None:
        for header, status in (
            (None, 401),
            ("Bearer wrong", 401),
            ("Basic secret", 401),
            ("Bearer ", 401),
            ("Bearer secret", 200),
            ("bearer other", 200),
        ):
            headers = {"host": "board.example"} | ({"authorization": header} if header is not None else {})
            answer = await client.get("/v1/models", headers=headers)
            assert answer.status == status, header
            if status == 401:
                assert _checked(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ready"):
            assert (await client.get(path, headers={"host": "10.0.0.1"})).status == 200
        assert (await client.get("/metrics")).status == 401

    with_server(settings(embedder, host="0.0.0.0", keys=(b"secret", b"other")), ask)


@pytest.mark.parametrize(("origins", "allowed"), [((), None), (("https://page.example",), "https://page.example")])
def test_pages_may_call_only_if_they_are_named(embedder: Path, origins: tuple[str, ...], allowed: str | None) -> None:
    async def ask(client: Client) -> None:
        headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
        answer = await client.send("OPTIONS", "/v1/embeddings", headers=headers)
        assert answer.headers.get("access-control-allow-origin") == allowed
        other = await client.send("OPTIONS", "/v1/embeddings", headers=headers | {"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers

    with_server(settings(embedder, cors_origins=origins), ask)
