"""Places of calls, clients that go away, fairness, and models that are closed when they are idle."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.harness import PATIENCE_S, Gate, smallest_budget, wait_for_calls
from tests.engine.serve.client import Answer, Client, running, settings, with_server
from tests.engine.serve.conftest import Sweeps

import pipeload

_ROOM_BYTES = 6_000_000
_LONG = {"prompt": [5, 6, 7], "max_tokens": 60}
_SHORT = {"prompt": [8, 9], "max_tokens": 1}
_PATH = "/v1/completions"


async def _reached(gate: Gate) -> None:
    await asyncio.to_thread(gate.wait_reached)


async def _wait_for_calls(client: Client, name: str, count: int) -> None:
    await asyncio.to_thread(wait_for_calls, client.application.desk.models.served[name].model, count)


async def _ended(*answers: Answer) -> None:
    await asyncio.wait_for(asyncio.gather(*(answer.task for answer in answers if answer.task)), PATIENCE_S)


def test_more_calls_than_places_are_told_to_come_again(chat_model: Path, sweeps: Sweeps) -> None:
    async def ask(client: Client) -> None:
        gate = sweeps.stop_at(1)
        calls = [client.begin("POST", _PATH, _SHORT)]
        await _reached(gate)
        calls.append(client.begin("POST", _PATH, _SHORT))
        await _wait_for_calls(client, "chat", 1)
        refused = await client.post(_PATH, _SHORT)
        assert refused.status == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert (await client.get("/ready")).json() == {"status": "busy"}
        assert (await client.get("/health")).status == 200
        gate.open()
        await _ended(*calls)
        assert [call.status for call in calls] == [200, 200]
        assert (await client.post(_PATH, _SHORT)).status == 200
        assert (await client.get("/ready")).status == 200

    with_server(settings(chat_model, max_waiting=2), ask)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_computes_in_no_further_sweep(chat_model: Path, sweeps: Sweeps, stream: bool) -> None:
    async def ask(client: Client) -> None:
        gate = sweeps.stop_at(3)
        call = client.begin("POST", _PATH, {**_LONG, "stream": stream})
        await _reached(gate)
        call.leave()
        if stream:
            # It hears of it by its own task, which runs before anything else here does.
            await asyncio.sleep(0)
        place = next(iter(client.application.desk.admission.places))
        while not place.left:
            await asyncio.sleep(0)
        gate.open()
        await _ended(call)
        assert not client.application.desk.admission.places
        assert sweeps.count == 3
        assert (await client.post(_PATH, _SHORT)).status == 200
        assert sweeps.count == 4

    with_server(settings(chat_model), ask)


def test_a_client_that_goes_away_while_it_waits_takes_no_part_in_the_next_sweep(
    chat_model: Path, sweeps: Sweeps
) -> None:
    async def ask(client: Client) -> None:
        gate = sweeps.stop_at(1)
        first = client.begin("POST", _PATH, {**_LONG, "max_tokens": 2})
        await _reached(gate)
        second = client.begin("POST", _PATH, _LONG)
        await _wait_for_calls(client, "chat", 1)
        second.leave()
        await _ended(second)
        assert second.status == 499
        gate.open()
        await _ended(first)
        assert sweeps.feeds == [1, 1]

    budget = smallest_budget(chat_model) + _ROOM_BYTES
    with_server(settings(chat_model, budget=budget), ask)


def test_a_short_call_waits_for_the_sweep_of_a_long_one_and_takes_the_next(chat_model: Path, sweeps: Sweeps) -> None:
    async def ask(client: Client) -> None:
        gate = sweeps.stop_at(5)
        long = client.begin("POST", _PATH, {**_LONG, "stream": True})
        await _reached(gate)
        short = client.begin("POST", _PATH, _SHORT)
        await _wait_for_calls(client, "chat", 1)
        stop = sweeps.stop_at(7)
        gate.open()
        await _ended(short)
        assert short.status == 200
        # The sixth is its own: the long one has not got beyond the gate of the seventh.
        assert sweeps.count in (6, 7)
        assert not long.ended
        long.leave()
        stop.open()
        await _ended(long)

    with_server(settings(chat_model), ask)


def test_a_short_answer_waits_for_two_passes_however_many_long_ones_go_on(chat_model: Path, sweeps: Sweeps) -> None:
    many = 5

    async def ask(client: Client) -> None:
        gates = [sweeps.stop_at(1)]
        long = []
        for count in range(many):
            long.append(client.begin("POST", _PATH, {**_LONG, "stream": True}))
            if not count:
                await _reached(gates[0])
        await _wait_for_calls(client, "chat", many - 1)
        # All of them have had passes when the short one comes, and wait beside the one that runs.
        gate = sweeps.stop_at(3 * many)
        gates[0].open()
        await _reached(gate)
        await _wait_for_calls(client, "chat", many - 1)
        short = client.begin("POST", _PATH, _SHORT)
        await _wait_for_calls(client, "chat", many)
        stop = sweeps.stop_at(3 * many + 3)
        gate.open()
        await _ended(short)
        assert short.status == 200
        assert sweeps.count <= 3 * many + 3
        assert not any(one.ended for one in long)
        for one in long:
            one.leave()
        stop.open()
        await _ended(*long)

    with_server(settings(chat_model), ask)


def test_another_models_generation_keeps_no_call_waiting(chat_model: Path, embedder: Path, sweeps: Sweeps) -> None:
    async def ask(client: Client) -> None:
        gate = sweeps.stop_at(1)
        long = client.begin("POST", _PATH, _LONG)
        await _reached(gate)
        assert (await client.post("/v1/embeddings", {"input": "the cat"})).status == 200
        assert not long.ended
        gate.open()
        await _ended(long)

    with_server(settings(chat_model, embedder), ask)


def test_a_generation_without_room_for_its_caches_waits_for_another_to_end(chat_model: Path, sweeps: Sweeps) -> None:
    """One has room for its caches; two have not."""
    asked = {"prompt": [[5, 6, 7]] * 16, "max_tokens": 100}

    async def ask(client: Client) -> None:
        gate = sweeps.stop_at(2)
        calls = [client.begin("POST", _PATH, asked)]
        await _reached(gate)
        calls.append(client.begin("POST", _PATH, asked))
        await _wait_for_calls(client, "chat", 1)
        served = client.application.desk.models.served["chat"]
        gate.open()
        await _ended(*calls)
        assert [call.status for call in calls] == [200, 200], [call.body for call in calls]
        assert calls[0].json()["choices"] == calls[1].json()["choices"]
        assert served.generating == 0
        # They were never in one sweep.
        assert set(sweeps.feeds) == {1}
        alone = await client.post(_PATH, {**asked, "prompt": [[5, 6, 7]] * 64})
        assert alone.status == 400
        assert alone.json()["error"]["code"] == "memory_budget_exceeded"

    with pipeload.load(chat_model, "8GB") as model:
        caches = model._decoding.full_cache_bytes(16, 128)
    with_server(settings(chat_model, budget=smallest_budget(chat_model) + round(1.5 * caches)), ask)


def test_an_idle_model_is_closed_and_opened_by_its_next_call(embedder: Path, chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        served = client.application.desk.models.served
        asked = {"input": "the cat"}

        async def closed(times: int) -> None:
            while served["embedder"].closed < times or served["embedder"].model is not None:
                await asyncio.wait_for(asyncio.sleep(0.001), PATIENCE_S)

        assert client.application.opening is not None
        await client.application.opening
        assert client.application.failure is None
        await closed(1)
        first = await client.post("/v1/embeddings", asked)
        assert first.status == 200, first.body
        await closed(2)
        models = (await client.get("/v1/models")).json()["data"]
        assert next(one["state"] for one in models if one["id"] == "embedder") == "closed"
        assert (await client.get("/health")).json() == {"status": "ok"}
        again = await client.post("/v1/embeddings", asked)
        assert again.json() == first.json()
        await closed(3)
        text = (await client.get("/metrics")).body.decode()
        assert 'pipeload_closed_total{model="embedder"} 3.0' in text
        assert 'pipeload_opened_total{model="embedder"} 3.0' in text
        assert 'pipeload_open{model="embedder"} 0.0' in text
        assert 'pipeload_sweeps_total{model="embedder"} 2.0' in text
        assert not [one.name for one in threading.enumerate() if one.name.startswith("pipeload-inference")]

    with_server(settings(embedder, chat_model, idle_s=0.0), ask)


def test_a_model_without_room_has_one_closed_that_no_call_has(
    chat_model: Path, embedder: Path, sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has room alone; together they have none."""
    load = pipeload.load

    def narrow(*arguments: Any, **options: Any) -> Any:
        if any(one.name == "pipeload-inference" for one in threading.enumerate()):
            raise pipeload.BudgetError("There is no room.", needed_bytes=2, budget_bytes=1)
        return load(*arguments, **options)

    monkeypatch.setattr(pipeload, "load", narrow)

    async def ask(client: Client) -> None:
        served = client.application.desk.models.served
        assert (await client.get("/health")).status == 200
        assert [one.model is not None for one in served.values()] == [False, True]
        for _ in range(2):
            assert (await client.post("/v1/embeddings", {"input": "the cat"})).status == 200
            assert [one.model is not None for one in served.values()] == [True, False]
            assert (await client.post(_PATH, _SHORT)).status == 200
            assert [one.model is not None for one in served.values()] == [False, True]
        gate = sweeps.stop_at(sweeps.count + 1)
        call = client.begin("POST", _PATH, _SHORT)
        await _reached(gate)
        refused = await client.post("/v1/embeddings", {"input": "the cat"})
        assert refused.status == 503
        assert refused.headers["retry-after"] == "5"
        assert refused.json()["error"]["code"] == "memory_budget_exceeded"
        gate.open()
        await _ended(call)
        assert call.status == 200

    with_server(settings(embedder, chat_model), ask)


def test_models_share_the_budget_instead_of_being_closed(chat_model: Path, embedder: Path) -> None:
    """The smallest budget of both: each call has what it needs, and no model is closed for it."""
    budget = pipeload.Budget(smallest_budget(chat_model))
    with pipeload.load(chat_model, budget), pytest.raises(pipeload.BudgetError) as caught:
        pipeload.load(embedder, budget)

    async def ask(client: Client) -> None:
        for _ in range(2):
            assert (await client.post("/v1/embeddings", {"input": "the cat"})).status == 200
            assert (await client.post(_PATH, _SHORT)).status == 200
        served = client.application.desk.models.served.values()
        assert [(one.opened, one.closed) for one in served] == [(1, 0), (1, 0)]

    with_server(settings(embedder, chat_model, budget=caught.value.needed_bytes), ask)


def test_a_model_that_has_calls_is_not_idle(chat_model: Path, sweeps: Sweeps) -> None:
    async def ask(client: Client) -> None:
        gate = sweeps.stop_at(2)
        served = client.application.desk.models.served["chat"]
        call = client.begin("POST", _PATH, {**_LONG, "max_tokens": 3})
        await _reached(gate)
        opened = served.opened
        await served.close()
        assert served.model is not None
        gate.open()
        await _ended(call)
        assert call.status == 200
        assert served.opened == opened

    with_server(settings(chat_model, idle_s=0.0), ask)


def test_health_tells_when_all_models_are_open(embedder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, load = Gate(), pipeload.load

    def gated(*arguments: Any, **options: Any) -> Any:
        gate.stop_here()
        return load(*arguments, **options)

    monkeypatch.setattr(pipeload, "load", gated)

    async def main() -> None:
        async with running(settings(embedder), opened=False) as client:
            await _reached(gate)
            for path in ("/health", "/ready"):
                answer = await client.get(path)
                assert (answer.status, answer.json()) == (503, {"status": "loading"})
            call = client.begin("POST", "/v1/embeddings", {"input": "the cat"})
            gate.open()
            await _ended(call)
            assert call.status == 200
            await asyncio.wait_for(client.application.opening, PATIENCE_S)  # type: ignore[arg-type]
            assert (await client.get("/health")).json() == {"status": "ok"}

    asyncio.run(main())


def test_the_server_ends_calls_that_run_when_it_ends(chat_model: Path, sweeps: Sweeps) -> None:
    async def ask(client: Client) -> Answer:
        gate = sweeps.stop_at(2)
        call = client.begin("POST", _PATH, _LONG)
        await _reached(gate)
        asyncio.get_running_loop().call_soon(gate.open)
        return call

    call = with_server(settings(chat_model), ask)
    assert sweeps.count <= 4
    assert call.status in (0, 499, 503)


def test_figures_are_told(chat_model: Path) -> None:
    async def ask(client: Client) -> str:
        await client.post(_PATH, {**_SHORT, "max_tokens": 3})
        await client.post(_PATH, {"prompt": []})
        await client.get("/somewhere")
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        return answer.body.decode()

    text = with_server(settings(chat_model), ask)
    for line in (
        'pipeload_requests_total{route="/v1/completions",status="200"} 1.0',
        'pipeload_requests_total{route="/v1/completions",status="400"} 1.0',
        'pipeload_requests_total{route="other",status="404"} 1.0',
        'pipeload_generated_tokens_total{model="chat"} 3.0',
        'pipeload_prompt_tokens_total{model="chat"} 2.0',
        'pipeload_first_token_seconds_count{model="chat"} 1.0',
        'pipeload_sweeps_total{model="chat"} 3.0',
        'pipeload_sweep_callers{model="chat"} 1.0',
        'pipeload_budget_bytes{model="chat"} 8e+09',
        "pipeload_calls 0.0",
    ):
        assert line in text.splitlines(), line
    for name in ("rss_bytes", "resident_bytes", "streamed_bytes", "cache_bytes", "read_bytes_total"):
        assert f"pipeload_{name}" in text


def test_embeddings_that_wait_share_a_batch_and_equal_those_of_the_library(embedder: Path, sweeps: Sweeps) -> None:
    texts = ["the cat", "a dog sat", "the mat"]

    async def ask(client: Client) -> None:
        model = client.application.desk.models.served["embedder"].model
        vectors = [model.embed(text) for text in texts]
        gate = sweeps.stop_at(sweeps.count + 1)
        calls = [client.begin("POST", "/embed", {"inputs": "the cat"})]
        await _reached(gate)
        for count, text in enumerate(texts):
            embed, ours = ("/embed", {"inputs": text, "normalize": False}), ("/v1/embeddings", {"input": text})
            calls.append(client.begin("POST", *(embed if count == 1 else ours)))
            await _wait_for_calls(client, "embedder", count + 1)
        before = sweeps.count
        gate.open()
        await _ended(*calls)
        got = [calls[2].json()[0], *(calls[place].json()["data"][0]["embedding"] for place in (1, 3))]
        np.testing.assert_array_equal(np.float32(got), np.stack([vectors[place] for place in (1, 0, 2)]))
        assert (sweeps.count, sweeps.feeds[-1]) == (before + 1, 1)
        assert 'pipeload_sweep_callers{model="embedder"} 3.0' in (await client.get("/metrics")).body.decode()

    with_server(settings(embedder), ask)
