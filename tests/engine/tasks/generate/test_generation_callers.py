"""Many callers of one streamed model: each gets the answer that it would get alone, and they share the sweeps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import PATIENCE_S, Background
from tests.engine.tasks.generate.drafting import CYCLE, PROMPT, Failing, assert_same, load, steered, with_letters
from tests.engine.toy import make_toy

import pipeload
from pipeload.pipeline.requests import Calls

_TEXT = "the cat sat. the cat sat. the"
_CYCLE = [ord(letter) - 32 for letter in "abc. "]
_CALLS: list[tuple[Any, Mapping[str, Any]]] = [
    (_TEXT, {"max_new_tokens": 16}),
    (PROMPT, {"max_new_tokens": 20, "logits_processor": [steered(12.0)], "prompt_lookup_num_tokens": 4}),
    ([3, 1, 4, 1, 5], {"max_new_tokens": 16, "do_sample": True, "seed": 1, "logprobs": True}),
    (_TEXT, {"max_new_tokens": 16, "do_sample": True, "seed": 2, "prompt_lookup_num_tokens": 3}),
    ("abc.", {"max_new_tokens": 30, "stop_strings": "c. a", "logits_processor": [steered(30.0, _CYCLE)]}),
    (
        "abc. abc.",
        {"max_new_tokens": 16, "stop_strings": "b", "logits_processor": [steered(30.0, _CYCLE)]}
        | {"prompt_lookup_num_tokens": 5},
    ),
    ([*CYCLE] * 8, {"max_new_tokens": 12, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3}),
]


@pytest.fixture(scope="module")
def streamed_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights, 50 MB, are more than the caches of all callers together."""
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("streamed")
    return with_letters(make_toy(folder / "toy", blocks=2, width=2048, decoder=True), folder / "with letters")


_ROOM_BYTES = 26_000_000
"""For the caches of all callers, of 128 tokens each, and not for the weights that the smallest budget streams."""


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> Callable[[pipeload.Model], None]:
    """Callers that were served together are waited for, however slow they are, until they leave by this function."""
    expect = Calls.expect
    monkeypatch.setattr(Calls, "expect", lambda calls, count, _: expect(calls, count, PATIENCE_S))

    def leave(model: pipeload.Model) -> None:
        calls = model._pipeline._exchange.calls
        with calls._changed:
            calls._expected -= 1
            calls._changed.notify_all()

    return leave


@pytest.mark.slow
def test_callers_get_their_own_texts_and_share_the_sweeps(
    streamed_toy: Path, patient: Callable[[pipeload.Model], None]
) -> None:
    with load(streamed_toy, _ROOM_BYTES) as model:
        alone = [model.generate(prompt, **options) for prompt, options in _CALLS]
        assert alone[4].finish_reason == alone[5].finish_reason == "stop"
        assert alone[1].accepted_tokens > 0
        assert model.plan.streamed_bytes > 0
        before = model.stats.passes
        barrier = threading.Barrier(len(_CALLS) + 1)

        def call(prompt: Any, options: Mapping[str, Any]) -> pipeload.Generation:
            barrier.wait(PATIENCE_S)
            try:
                return model.generate(prompt, **options)
            finally:
                patient(model)

        callers = [Background(call, prompt, options) for prompt, options in _CALLS]
        failing = Background(call, _TEXT, {"max_new_tokens": 16, "streamer": Failing(BrokenPipeError("gone"), 3)})
        together = [caller.end() for caller in callers]
        assert isinstance(failing.wait(), BrokenPipeError)
        for made, expected, (prompt, _) in zip(together, alone, _CALLS, strict=True):
            assert_same(made, expected, prompt)
        sweeps = sum(one.sweeps for one in together) + 3
        assert model.plan.streamed_bytes > 0
        assert model.stats.passes - before < 0.6 * sweeps


@pytest.mark.slow
def test_callers_of_sessions_and_drafts_stay_apart(streamed_toy: Path, tmp_path: Path) -> None:
    """Conversations in threads of their own, with one assistant for all of them, and one that is closed midway."""
    small = with_letters(make_toy(tmp_path / "toy", blocks=1, width=64, decoder=True), tmp_path / "small")
    with load(streamed_toy, _ROOM_BYTES) as model, load(small, 60_000_000) as assistant:
        barrier = threading.Barrier(5)

        def talk(number: int) -> list[tuple[list[int], dict[str, Any], pipeload.Generation]]:
            turns, text = [], [number, *PROMPT]
            barrier.wait(PATIENCE_S)
            with model.session() as session:
                for turn in range(3):
                    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": bool(number % 2), "seed": turn}
                    drafts: dict[str, Any] = {"assistant_model": assistant} if number < 2 else {}
                    turns.append((list(text), options, session.generate(text, **options, **drafts)))
                    text += [*turns[-1][2].token_ids, 40 + number]
            return turns

        def leave() -> None:
            session = model.session()
            barrier.wait(PATIENCE_S)
            session.generate(PROMPT, max_new_tokens=3)
            session.close()

        callers = [Background(talk, number) for number in range(4)]
        leaving = Background(leave)
        talks = [caller.end() for caller in callers]
        leaving.end()
        for text, options, made in [turn for talk in talks for turn in talk]:
            assert_same(made, model.generate(text, **options), (text, options))


def test_closing_ends_all_callers(streamed_toy: Path) -> None:
    """Those in a sweep, and those between two of them."""
    with load(streamed_toy, _ROOM_BYTES) as model:
        begun, closed = threading.Barrier(5), threading.Event()

        def call(number: int) -> None:
            waits = iter([begun.wait, closed.wait])

            def wait(_: Any, logits: Any) -> Any:
                next(waits)(PATIENCE_S)
                return logits

            drafts: dict[str, Any] = {"prompt_lookup_num_tokens": 3} if number % 2 else {}
            with model.session() as session:
                every = {"max_new_tokens": 50, "logits_processor": [wait], "seed": number, **drafts}
                (session if number > 1 else model).generate(PROMPT, do_sample=True, top_k=0, temperature=9.0, **every)

        callers = [Background(call, number) for number in range(4)]
        begun.wait(PATIENCE_S)
    closed.set()
    for caller in callers:
        assert isinstance(caller.wait(), pipeload.ClosedError)
