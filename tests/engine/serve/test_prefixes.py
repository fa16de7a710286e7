"""Requests that begin as an earlier text do not compute the beginning again, and nothing else changes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import PATIENCE_S, smallest_budget
from tests.engine.serve.client import Client, settings, with_server
from tests.engine.serve.conftest import Sweeps

import pipeload
from pipeload.decode import Decoding
from pipeload.format import manifest as manifests
from pipeload.pipeline.sweep import Feed, Sweep
from pipeload.serve import prefixes

_PATH = "/v1/completions"
_FIRST = [5, 6, 7, 8, 9, 10, 11, 12]
_OTHER = [21, 22, 23, 24, 25, 26, 27, 28]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of each feed of each sweep."""
    tokens: list[int] = []
    run = Sweep.run

    def noted(self: Sweep, feeds: list[Feed], *arguments: Any, **options: Any) -> None:
        tokens.extend(sum(piece["input_ids"].shape()[1] for piece in feed.pieces) for feed in feeds)
        run(self, feeds, *arguments, **options)

    monkeypatch.setattr(Sweep, "run", noted)
    return tokens


def _served(client: Client) -> Any:
    return client.application.desk.models.served["chat"]


async def _answer(client: Client, prompt: Any, **fields: Any) -> tuple[str, int]:
    """An answer, and the number of the prompt's tokens that were not computed again."""
    answer = await client.post(_PATH, {"prompt": prompt, "max_tokens": 6, **fields})
    assert answer.status == 200, answer.body
    body = answer.json()
    return body["choices"][0]["text"], body["usage"]["prompt_tokens_details"]["cached_tokens"]


def _expected(client: Client, prompt: list[int], **options: Any) -> pipeload.Generation:
    made = _served(client).model.generate(prompt, max_new_tokens=6, **options)
    assert isinstance(made, pipeload.Generation)
    return made


def test_a_conversation_computes_only_its_new_tokens_and_says_the_same(chat_model: Path, computed: list[int]) -> None:
    async def ask(client: Client) -> None:
        text = list(_FIRST)
        for turn in range(4):
            wanted = _expected(client, text)
            computed.clear()
            answer, cached = await _answer(client, text)
            assert answer == wanted.text
            # The last token of an answer is chosen, and not computed.
            assert cached == (len(text) - 4 if turn else 0)
            assert computed[0] == len(text) - cached
            text += [*wanted.token_ids, 40 + turn, 50 + turn, 60 + turn]
        lines = (await client.get("/metrics")).body.decode().splitlines()
        reused = (8 + 5) + (8 + 9 + 5) + (8 + 18 + 5)
        for line in (
            'pipeload_prefix_hits_total{model="chat"} 3.0',
            f'pipeload_prefix_reused_tokens_total{{model="chat"}} {float(reused)}',
            'pipeload_prefix_entries{model="chat"} 1.0',
        ):
            assert line in lines
        assert f'pipeload_prefix_bytes{{model="chat"}} {float(_served(client).prefixes.nbytes)}' in lines
        assert _served(client).prefixes.nbytes > 0

    with_server(settings(chat_model), ask)


def test_other_routes_tell_the_tokens_that_were_not_computed(chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        messages = [{"role": "user", "content": "the cat sat"}]
        asked = {"messages": messages, "max_tokens": 2}
        first = (await client.post("/v1/chat/completions", asked)).json()
        again = (await client.post("/v1/chat/completions", asked)).json()
        assert again["choices"] == first["choices"]
        prompt = first["usage"]["prompt_tokens"]
        assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": prompt - 1}
        made = (await client.post("/v1/responses", {"input": "the cat sat", "max_output_tokens": 2})).json()
        assert made["usage"]["input_tokens_details"] == {"cached_tokens": prompt - 1}

    with_server(settings(chat_model), ask)


def test_conversations_keep_their_own_texts(chat_model: Path) -> None:
    """A prompt that has little in common with a text leaves it to its conversation."""

    async def ask(client: Client) -> None:
        for prompt in (_FIRST, _OTHER, [*_FIRST[:2], 30, 31, 32]):
            answer, cached = await _answer(client, prompt)
            assert (answer, cached) == (_expected(client, prompt).text, 0)
        assert _served(client).prefixes.entries == 3
        for prompt in (_FIRST, _OTHER):
            assert await _answer(client, prompt) == (_expected(client, prompt).text, len(prompt) - 1)
        assert _served(client).prefixes.entries == 3

    with_server(settings(chat_model), ask)


@pytest.mark.parametrize("fields", [{"prompt": [_FIRST, _FIRST]}, {"n": 2, "temperature": 1.0, "seed": 1}])
def test_several_answers_at_once_take_no_part(chat_model: Path, fields: dict[str, Any]) -> None:
    async def ask(client: Client) -> None:
        await _answer(client, _FIRST)
        _, cached = await _answer(client, **{"prompt": _FIRST, **fields})
        assert cached == 0
        assert _served(client).prefixes.entries == 1

    with_server(settings(chat_model), ask)


def test_drawn_answers_are_those_of_the_library(chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        for cached in (0, len(_FIRST) - 1):
            drawn = {"do_sample": True, "seed": 7, "temperature": 0.8}
            wanted = _expected(client, _FIRST, **drawn)
            assert await _answer(client, _FIRST, seed=7, temperature=0.8) == (wanted.text, cached)

    with_server(settings(chat_model), ask)


def test_the_texts_that_were_used_the_longest_time_ago_go_first(chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        texts = _served(client).prefixes
        await _answer(client, _FIRST)
        one = texts.nbytes
        texts._most_bytes = 2 * one
        await _answer(client, _OTHER)
        await _answer(client, _FIRST)
        await _answer(client, [31, 32, 33, 34, 35, 36, 37, 38])
        assert (texts.entries, texts.nbytes) == (2, 2 * one)
        assert (await _answer(client, _FIRST))[1] == len(_FIRST) - 1
        assert (await _answer(client, _OTHER))[1] == 0

    with_server(settings(chat_model), ask)


@pytest.mark.parametrize("most_bytes", [0, 1])
def test_no_text_is_kept_without_room_under_the_limit(chat_model: Path, most_bytes: int) -> None:
    async def ask(client: Client) -> None:
        for _ in range(2):
            assert (await _answer(client, _FIRST))[1] == 0
        assert _served(client).prefixes.entries == 0

    with_server(settings(chat_model, prefix_cache_bytes=most_bytes), ask)


@pytest.mark.parametrize("more_bytes", [500_000, 30_000_000])
def test_weights_never_leave_memory_for_kept_texts(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, more_bytes: int
) -> None:
    """After the same calls, as many weights stay as without kept texts: streamed, and with all weights in memory."""
    full_cache_bytes = Decoding.full_cache_bytes
    # A text counts megabytes, as one of a large model.
    monkeypatch.setattr(Decoding, "full_cache_bytes", lambda *sizes: 100 * full_cache_bytes(*sizes))
    monkeypatch.setattr(prefixes, "_BUDGET_SHARE", 1.0)
    long = [place % 90 + 5 for place in range(120)]
    asked = [*([place + 5, *_FIRST] for place in range(12)), long, *([place + 25, *_FIRST] for place in range(12))]
    budget = smallest_budget(chat_model, sizes={"sequence_length": 160}) + 14_000_000 + more_bytes
    kept = []

    async def ask(client: Client) -> list[tuple[int, int, bool]]:
        found = []
        for prompt in asked:
            assert (await client.post(_PATH, {"prompt": prompt, "max_tokens": 40})).status == 200
            plan = _served(client).model.plan
            found.append((plan.resident_bytes, plan.streamed_bytes, plan.packed))
            kept.append(_served(client).prefixes.entries)
        return found

    kept_plans = with_server(settings(chat_model, budget=budget), ask)
    most_kept = max(kept)
    assert kept_plans == with_server(settings(chat_model, budget=budget, prefix_cache_bytes=0), ask)
    assert 1 <= most_kept < 12


def test_while_weights_are_streamed_a_generation_has_no_kept_text_beside_it(chat_model: Path, sweeps: Sweeps) -> None:
    async def ask(client: Client) -> None:
        texts = _served(client).prefixes
        await _answer(client, _FIRST)
        assert _served(client).model.plan.streamed_bytes
        assert texts.entries == 1
        gate = sweeps.stop_at(sweeps.count + 3)
        other = client.begin("POST", _PATH, {"prompt": _OTHER, "max_tokens": 6})
        await asyncio.to_thread(gate.wait_reached)
        assert texts.entries == 0
        short = client.begin("POST", _PATH, {"prompt": _FIRST, "max_tokens": 1})
        gate.open()
        await asyncio.wait_for(asyncio.gather(other.task, short.task), PATIENCE_S)  # type: ignore[arg-type]
        # The one that ended while another went on is not kept.
        assert texts.entries == 1

    with_server(settings(chat_model, budget=smallest_budget(chat_model) + 1_000_000), ask)


def test_kept_texts_go_before_a_generation_waits_for_room(chat_model: Path, sweeps: Sweeps) -> None:
    asked = {"prompt": [[5, 6, 7]] * 16, "max_tokens": 8}

    async def ask(client: Client) -> None:
        model, texts = _served(client).model, _served(client).prefixes
        await _answer(client, _FIRST)
        plan = model.plan
        # The plan has as much room as the sixteen take without the one that is kept.
        spare = plan.budget_bytes - plan.peak_bytes + plan.cache_bytes
        assert texts.entries == 1
        model._pipeline._memory.follow(replace(plan, budget_bytes=plan.budget_bytes - spare))
        assert (await client.post(_PATH, asked)).status == 200
        assert texts.entries == 0

    with_server(settings(chat_model), ask)


def test_an_idle_model_keeps_no_text(chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        served = _served(client)
        await _answer(client, _FIRST)
        while served.prefixes.entries or served.model is not None:
            await asyncio.wait_for(asyncio.sleep(0.001), PATIENCE_S)
        answer, cached = await _answer(client, _FIRST)
        assert answer
        assert cached == 0

    with_server(settings(chat_model, idle_s=0.0), ask)


def test_a_text_whose_client_has_gone_is_not_kept(chat_model: Path, sweeps: Sweeps) -> None:
    async def ask(client: Client) -> None:
        gate = sweeps.stop_at(3)
        call = client.begin("POST", _PATH, {"prompt": _FIRST, "max_tokens": 60})
        await asyncio.to_thread(gate.wait_reached)
        call.leave()
        place = next(iter(client.application.desk.admission.places))
        while not place.left:
            await asyncio.sleep(0)
        gate.open()
        await asyncio.wait_for(call.task, PATIENCE_S)  # type: ignore[arg-type]
        assert _served(client).prefixes.entries == 0
        assert await _answer(client, _FIRST) == (_expected(client, _FIRST).text, 0)
        assert _served(client).model._decoding.cache_bytes() > 0
        _served(client).prefixes.give_back(1)
        assert _served(client).model._decoding.cache_bytes() == 0

    with_server(settings(chat_model), ask)


def test_models_that_cannot_go_on_from_a_beginning_keep_none(chat_model: Path) -> None:
    manifest = manifests.read(chat_model)
    assert Decoding(manifest).keeps_beginnings
    assert not Decoding(replace(manifest, quantised_dynamically=True)).keeps_beginnings
    assert not Decoding(replace(manifest, caches=())).keeps_beginnings
