"""Answers over HTTP are those of the library, token for token."""

from __future__ import annotations

import base64
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.harness import smallest_budget
from tests.engine.serve.client import Client, settings, with_server

import pipeload
from pipeload.serve.routes.tokens import token_text
from pipeload.tasks.text.tokenizer import tokenizer_of

_MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
_CHAT = "/v1/chat/completions"

# Fields of a request, and the same for `generate`.
_CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": 7}, {"max_new_tokens": 7}),
    ({"max_completion_tokens": 6, "temperature": 0}, {"max_new_tokens": 6, "do_sample": False}),
    (
        {"max_tokens": 9, "temperature": 0.8, "top_p": 0.9, "seed": 4},
        {"max_new_tokens": 9, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 4},
    ),
    (
        {"max_tokens": 5, "top_k": 7, "min_p": 0.01, "seed": 1, "n": 3},
        {"max_new_tokens": 5, "do_sample": True, "top_k": 7, "min_p": 0.01, "seed": 1, "num_return_sequences": 3},
    ),
    ({"max_tokens": 6, "repetition_penalty": 1.4}, {"max_new_tokens": 6, "repetition_penalty": 1.4}),
]


near = partial(pytest.approx, abs=1e-4)
"""Equal, but for the rounding of weights that are packed meanwhile."""
_NOT_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}


def _listed(made: Any) -> list[pipeload.Generation]:
    return made if isinstance(made, list) else [made]


@pytest.mark.parametrize(("fields", "options"), _CASES)
def test_a_chat_answers_as_generate_does(chat_model: Path, fields: dict[str, Any], options: dict[str, Any]) -> None:
    async def ask(client: Client) -> tuple[Any, Any]:
        asked = {"model": "chat", "messages": _MESSAGES, "logprobs": True, "top_logprobs": 2, **fields}
        plain = await client.post(_CHAT, asked)
        streamed = await client.post(_CHAT, {**asked, "stream": True, "stream_options": {"include_usage": True}})
        assert (plain.status, streamed.status) == (200, 200), plain.body
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.body.endswith(b"data: [DONE]\n\n")
        return plain.json(), streamed.events()

    plain, events = with_server(settings(chat_model), ask)
    with pipeload.load(chat_model, "8GB") as model:
        made = _listed(model.generate(model.chat_prompt(_MESSAGES), logprobs=True, top_logprobs=2, **options))
        tokenizer = tokenizer_of(model)
        for choice, one in zip(plain["choices"], made, strict=True):
            assert choice["message"] == {"role": "assistant", "content": one.text, "refusal": None}
            assert choice["finish_reason"] == ("length" if one.finish_reason == "length" else "stop")
            told = choice["logprobs"]["content"]
            assert [token["token"] for token in told] == [token_text(tokenizer, each) for each in one.token_ids]
            assert [token["logprob"] for token in told] == near(one.logprobs)
            for token, likeliest in zip(told, one.top_logprobs or (), strict=True):
                assert [each["logprob"] for each in token["top_logprobs"]] == near([value for _, value in likeliest])
                assert token["top_logprobs"][0]["token"] == token_text(tokenizer, likeliest[0][0])
        tokens = sum(len(one.token_ids) for one in made)
        usage = {"prompt_tokens": made[0].prompt_tokens, "completion_tokens": tokens}
        assert plain["usage"] == usage | {"total_tokens": sum(usage.values()), **_NOT_CACHED}
    for choice in plain["choices"]:
        own = [each for event in events for each in event["choices"] if each["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(each["delta"].get("content", "") for each in own) == choice["message"]["content"]
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == [choice["finish_reason"]]
        logprobs = [token for each in own if each["logprobs"] for token in each["logprobs"]["content"]]
        told = choice["logprobs"]["content"]
        assert [(token["token"], token["bytes"]) for token in logprobs] == [
            (one["token"], one["bytes"]) for one in told
        ]
        assert [token["logprob"] for token in logprobs] == near([token["logprob"] for token in told])
    assert events[-1]["choices"] == []
    # The second request begins as the first one.
    assert events[-1]["usage"] | _NOT_CACHED == plain["usage"]
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)


def test_completions_answer_as_generate_does(chat_model: Path) -> None:
    prompts = ["The capital of France is", "Zwölf"]

    async def ask(client: Client) -> list[Any]:
        asked = {"prompt": prompts, "max_tokens": 5, "temperature": 0.9, "seed": 2, "n": 2, "logprobs": 2}
        ids = [[5, 6, 7], [8, 9, 10, 11]]
        return [
            (await client.post("/v1/completions", asked)).json(),
            (await client.post("/v1/completions", {**asked, "stream": True})).events(),
            (await client.post("/v1/completions", {"prompt": ids, "max_tokens": 4})).json(),
            (await client.post("/v1/completions", {"prompt": ids[0], "max_tokens": 4})).json(),
        ]

    plain, events, by_ids, by_one = with_server(settings(chat_model), ask)
    with pipeload.load(chat_model, "8GB") as model:
        options: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "seed": 2, "num_return_sequences": 2}
        made = model.generate(prompts, max_new_tokens=5, logprobs=True, **options)
        ids = model.generate([[5, 6, 7], [8, 9, 10, 11]], max_new_tokens=4)
    assert [choice["text"] for choice in plain["choices"]] == [one.text for one in made]
    for choice, one in zip(plain["choices"], made, strict=True):
        assert choice["logprobs"]["token_logprobs"] == near(one.logprobs)
    for choice in plain["choices"]:
        own = [each for event in events for each in event["choices"] if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        offsets = [offset for each in own for offset in each["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    assert [choice["text"] for choice in by_ids["choices"]] == [one.text for one in ids]
    assert by_one["choices"][0]["text"] == ids[0].text


def test_copies_of_an_answer_that_is_not_drawn_are_equal(chat_model: Path) -> None:
    async def ask(client: Client) -> tuple[Any, Any]:
        asked = {"prompt": "The capital", "max_tokens": 4, "n": 2, "logprobs": 1}
        streamed = await client.post("/v1/completions", {**asked, "stream": True})
        return (await client.post("/v1/completions", asked)).json(), streamed.events()

    plain, events = with_server(settings(chat_model), ask)
    one, other = plain["choices"]
    assert {**one, "index": 1} == other
    assert plain["usage"]["completion_tokens"] == 8
    for index in (0, 1):
        own = [each["text"] for event in events for each in event["choices"] if each["index"] == index]
        assert "".join(own) == one["text"]


def test_an_answer_ends_before_its_stop_string(chat_model: Path) -> None:
    with pipeload.load(chat_model, "8GB") as model:
        whole = model.generate("The capital", max_new_tokens=12, do_sample=True, seed=3, temperature=1.0).text or ""
    place = next(place for place in range(4, len(whole) - 3) if whole.find(whole[place : place + 3]) == place)
    stop = whole[place : place + 3]

    async def ask(client: Client) -> tuple[Any, Any]:
        asked: dict[str, Any] = {"prompt": "The capital", "max_tokens": 12, "seed": 3, "temperature": 1}
        asked["stop"] = [stop, "never there"]
        streamed = await client.post("/v1/completions", {**asked, "stream": True})
        return (await client.post("/v1/completions", asked)).json(), streamed.events()

    plain, events = with_server(settings(chat_model), ask)
    assert plain["choices"][0]["text"] == whole[:place]
    assert plain["choices"][0]["finish_reason"] == "stop"
    assert "".join(event["choices"][0]["text"] for event in events) == whole[:place]


def test_tokens_are_ruled_out_and_made_less_likely(chat_model: Path) -> None:
    prompt = [5, 6, 7]
    with pipeload.load(chat_model, "8GB") as model:
        first = model.generate(prompt, max_new_tokens=1).token_ids[0]

        def penalize(token_ids: Any, logits: Any) -> Any:
            for token in token_ids[0, len(prompt) :]:
                logits[0, token] -= 0.5
            for token in set(token_ids[0, len(prompt) :].tolist()):
                logits[0, token] -= 1.5
            return logits

        def rule_out(_: Any, logits: Any) -> Any:
            logits[0, first] = -np.inf
            return logits

        penalized = model.generate(prompt, max_new_tokens=8, logits_processor=[penalize])
        without = model.generate(prompt, max_new_tokens=4, logits_processor=[rule_out])

    async def ask(client: Client) -> list[Any]:
        asked = {"prompt": prompt, "max_tokens": 8}
        penalties = {"presence_penalty": 1.5, "frequency_penalty": 0.5}
        bias = {"max_tokens": 4, "logit_bias": {str(first): -100}}
        return [(await client.post("/v1/completions", asked | more)).json() for more in (penalties, bias)]

    one, other = with_server(settings(chat_model), ask)
    assert one["choices"][0]["text"] == penalized.text
    assert other["choices"][0]["text"] == without.text
    assert first not in without.token_ids


def test_vectors_are_those_of_embed(embedder: Path) -> None:
    texts = ["the cat sat", "a dog"]
    budget = smallest_budget(embedder) + 1_000_000

    async def ask(client: Client) -> list[Any]:
        bodies = [
            {"input": texts},
            {"input": texts[0]},
            {"input": texts, "encoding_format": "base64"},
            {"input": texts, "dimensions": 8, "model": "embedder"},
            {"input": [[2, 6, 3], [2, 7, 3]]},
            {"input": [2, 6, 3], "encoding_format": "float", "user": "me"},
        ]
        answers = [await client.post("/v1/embeddings", body) for body in bodies]
        assert [answer.status for answer in answers] == [200] * len(bodies), [answer.body for answer in answers]
        return [answer.json() for answer in answers]

    plain, single, coded, cut, ids, one = with_server(settings(embedder, budget=budget), ask)
    with pipeload.load(embedder, budget) as model:
        vectors = model.embed(texts)
        short = model.embed(texts, truncate_dim=8, normalize=True)
        by_ids = model.embed([[2, 6, 3], [2, 7, 3]])
        tokens = sum(len(tokenizer_of(model).encode(text).ids) for text in texts)

    def numbers(answer: Any) -> Any:
        assert [each["index"] for each in answer["data"]] == list(range(len(answer["data"])))
        return np.array([each["embedding"] for each in answer["data"]], np.float32)

    np.testing.assert_array_equal(numbers(plain), vectors)
    np.testing.assert_array_equal(numbers(single), vectors[:1])
    found = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in coded["data"]]
    np.testing.assert_array_equal(found, vectors)
    np.testing.assert_array_equal(numbers(cut), short)
    np.testing.assert_array_equal(numbers(ids), by_ids)
    np.testing.assert_array_equal(numbers(one), by_ids[:1])
    assert plain["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert plain["model"] == "embedder"


def test_tei_clients_get_bare_vectors(embedder: Path) -> None:
    budget = smallest_budget(embedder) + 1_000_000

    async def ask(client: Client) -> list[Any]:
        bodies = [{"inputs": "the cat"}, {"inputs": ["the cat", "a dog"], "normalize": False, "truncate": True}]
        return [(await client.post("/embed", body)).json() for body in bodies]

    one, several = with_server(settings(embedder, budget=budget), ask)
    with pipeload.load(embedder, budget) as model:
        np.testing.assert_array_equal(np.array(one, np.float32), model.embed(["the cat"], normalize=True))
        np.testing.assert_array_equal(np.array(several, np.float32), model.embed(["the cat", "a dog"]))
