"""How sessions end, and that they survive errors, Ctrl-C, readers that leave, prompts that cannot work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import EMULATED, Background, Gate
from tests.engine.tasks.generate.drafting import PROMPT, Failing, assert_same, load, steered, with_letters
from tests.engine.tasks.generate.drafting import computed as computed  # a fixture

import pipeload
from pipeload.pipeline.session import ShardSession

_NEW = [31, 32, 33]
_SAMPLED: dict[str, Any] = {"do_sample": True, "seed": 7, "temperature": 0.5}


def test_a_session_lives_on_after_a_text_that_was_interrupted(decoder: Path) -> None:
    with load(decoder) as model:
        expected = model.generate(PROMPT, max_new_tokens=8)
        sampled = model.generate([*PROMPT, 3], max_new_tokens=8, **_SAMPLED)
        for drafts in ({}, {"prompt_lookup_num_tokens": 4}):
            for calls in (1, 5):
                with model.session() as session:
                    for error in (ValueError("no"), KeyboardInterrupt(), SystemExit()):
                        failing = Failing(error, calls)
                        with pytest.raises(type(error)):
                            session.generate(PROMPT, max_new_tokens=8, logits_processor=[failing], **drafts)
                        assert list(session.token_ids[: len(PROMPT)]) == PROMPT
                    assert_same(session.generate(PROMPT, max_new_tokens=8, **drafts), expected)
                    assert_same(session.generate([*PROMPT, 3], max_new_tokens=8, **_SAMPLED, **drafts), sampled)


def test_a_session_lives_on_after_a_reader_that_failed(toy_decoder: Path, tmp_path: Path) -> None:
    with load(with_letters(toy_decoder, tmp_path / "model")) as model, model.session() as session:
        options: dict[str, Any] = {"max_new_tokens": 12, "logits_processor": [steered()]}
        for drafts in ({}, {"prompt_lookup_num_tokens": 4}):
            with pytest.raises(BrokenPipeError):
                session.generate(PROMPT, streamer=Failing(BrokenPipeError(), 3), **options, **drafts)
            assert_same(session.generate([*PROMPT, 7], **options, **drafts), model.generate([*PROMPT, 7], **options))
            with pipeload.TextStream() as stream:
                stream.close()
                assert session.generate(PROMPT, streamer=stream, **options, **drafts).finish_reason == "abort"
            assert_same(session.generate(PROMPT, **options, **drafts), model.generate(PROMPT, **options))


def test_a_step_that_failed_is_taken_again(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ShardSession.run
    with load(decoder) as model, model.session() as session:
        first = session.generate(PROMPT, max_new_tokens=6)
        whole = [*PROMPT, *first.token_ids, *_NEW]
        runs = 0

        def fail(shard: ShardSession, *given: Any, **more: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 13:
                raise pipeload.RunError("Shard 'block' failed: test")
            return run(shard, *given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(ShardSession, "run", fail)
            with pytest.raises(pipeload.RunError):
                session.generate(whole, max_new_tokens=6)
        assert_same(session.generate(whole, max_new_tokens=6), model.generate(whole, max_new_tokens=6))


@contextmanager
def _interrupted_at(gate: Gate) -> Iterator[None]:
    """Ctrl-C, once, when a thread has come to the gate."""
    heard = threading.Event()

    def hear(number: int, frame: Any) -> None:
        if not heard.is_set():
            heard.set()
            signal.default_int_handler(number, frame)

    def interrupt() -> None:
        gate.wait_reached()
        # Again and again: CPython does not wake a wait by a signal that comes just before it.
        while not heard.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            heard.wait(0.1)

    before = signal.signal(signal.SIGINT, hear)
    interrupting = Background(interrupt)
    try:
        yield
        interrupting.end()
    finally:
        heard.set()
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(EMULATED, reason="signals do not interrupt waits reliably under qemu")
@pytest.mark.parametrize("turn", [0, 1])
def test_a_session_lives_on_after_ctrl_c(decoder: Path, monkeypatch: pytest.MonkeyPatch, turn: int) -> None:
    """While a shard runs that goes on afterwards, for a text without a reader."""
    run, gate, block = ShardSession.run, Gate(), "block.001"
    with load(decoder) as model, model.session() as session:
        text = list(PROMPT)
        if turn:
            text += [*session.generate(text, max_new_tokens=6).token_ids, *_NEW]

        def stop(shard: ShardSession, *given: Any, **more: Any) -> Any:
            if shard._name == block:
                gate.stop_here()
            return run(shard, *given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(ShardSession, "run", stop)
            with _interrupted_at(gate), pytest.raises(KeyboardInterrupt):
                session.generate(text, max_new_tokens=6)
            answer = Background(lambda: session.generate([*text[:-2], 4, 5], max_new_tokens=6))
            gate.open()
            made = answer.end()
        assert_same(made, model.generate([*text[:-2], 4, 5], max_new_tokens=6))
        assert_same(session.generate(text, max_new_tokens=6), model.generate(text, max_new_tokens=6))


def test_a_session_is_for_one_thread_at_a_time(toy_decoder: Path) -> None:
    gate = Gate()

    def wait(_: Any, logits: Any) -> Any:
        gate.stop_here()
        return logits

    with load(toy_decoder) as model, model.session() as session:
        first = Background(lambda: session.generate(PROMPT, max_new_tokens=3, logits_processor=[wait]))
        gate.wait_reached()
        with pytest.raises(pipeload.ConfigError):
            session.generate(PROMPT, max_new_tokens=3)
        gate.open()
        assert_same(first.end(), session.generate(PROMPT, max_new_tokens=3))


def test_a_session_that_is_closed_while_it_generates(toy_decoder: Path) -> None:
    """The text ends with an error, and the memory is given back all the same."""
    with load(toy_decoder, 120_000_000) as model:
        session = model.session(capacity=10_000)

        def close(_: Any, logits: Any) -> Any:
            session.close()
            return logits

        with pytest.raises(pipeload.ClosedError):
            session.generate(PROMPT, max_new_tokens=3, logits_processor=[close])
        with pytest.raises(pipeload.ClosedError):
            session.generate(PROMPT, max_new_tokens=3)
        for turn in range(20):
            model.generate([turn], max_new_tokens=1)
        assert model.plan.cache_bytes < 10_000 * 64 * 4


def test_a_session_takes_the_keywords_of_generate_and_no_others(toy_decoder: Path) -> None:
    with load(toy_decoder) as model, model.session() as session:
        wrong: Any = {"max_tokens": 3}
        with pytest.raises((pipeload.ConfigError, TypeError)):
            session.generate(PROMPT, **wrong)
        several: Any = {"num_return_sequences": 2, "do_sample": True}
        with pytest.raises((pipeload.ConfigError, TypeError)):
            session.generate(PROMPT, **several)


def test_a_closed_session_is_refused(toy_decoder: Path) -> None:
    with load(toy_decoder) as model:
        with model.session() as session:
            session.generate(PROMPT, max_new_tokens=2)
        session.close()
        assert session.token_ids == ()
        with pytest.raises(pipeload.ClosedError, match=r"The session is closed\. Make a new one with model\.session"):
            session.generate(PROMPT, max_new_tokens=2)
        never_used = model.session()
        never_used.close()
        never_used.close()
        with pytest.raises(pipeload.ClosedError):
            never_used.generate(PROMPT, max_new_tokens=2)
        # Sessions know nothing of each other.
        with model.session() as another:
            assert len(another.generate(PROMPT, max_new_tokens=2).token_ids) == 2


def test_a_session_of_a_closed_model_is_refused(toy_decoder: Path) -> None:
    with load(toy_decoder) as model:
        session, unused = model.session(), model.session()
        session.generate(PROMPT, max_new_tokens=2)
    for one in (session, unused):
        with pytest.raises(pipeload.ClosedError):
            one.generate(PROMPT, max_new_tokens=2)
        one.close()
        with pytest.raises(pipeload.ClosedError):
            one.generate(PROMPT, max_new_tokens=2)
    with pytest.raises(pipeload.ClosedError):
        model.session()


def test_models_without_caches_have_no_sessions(toy: Path) -> None:
    with load(toy) as model, pytest.raises(pipeload.ConfigError):
        with model.session() as session:
            session.generate(PROMPT)


def test_the_caches_of_sessions_are_counted_until_they_are_closed(toy_decoder: Path) -> None:
    with load(toy_decoder, 120_000_000) as model:
        sessions = [model.session(capacity=10_000) for _ in range(2)]
        for session in sessions:
            session.generate(PROMPT, max_new_tokens=2)
        both = model.plan.cache_bytes
        assert both >= 2 * 4 * 10_000 * 64 * 4
        sessions[0].close()
        # Memory that was needed lately may be needed again soon: the plan counts it for some more passes.
        for turn in range(20):
            sessions[1].generate([turn], max_new_tokens=1)
        assert both // 2 <= model.plan.cache_bytes < 0.6 * both
        sessions[1].close()
        for turn in range(20):
            model.generate([turn], max_new_tokens=1)
        assert model.plan.cache_bytes < 0.1 * both


def test_a_text_that_is_too_long_changes_nothing(exported_gpt2: Path, computed: list[int]) -> None:
    with load(exported_gpt2) as model, model.session() as session:
        first = session.generate(PROMPT, max_new_tokens=4)
        held = session.token_ids
        wrongs: list[tuple[Any, dict[str, Any]]] = [
            ([7] * 125, {"max_new_tokens": 4}),
            ([*PROMPT, *range(100, 230)], {"max_new_tokens": 1}),
            ([], {}),
            ([1000], {}),
            ([-1], {}),
            (PROMPT, {"max_new_tokens": 0}),
            (PROMPT, {"prompt_lookup_num_tokens": -1}),
            ([PROMPT, PROMPT], {}),
            ("a text without tokenizer", {}),
        ]
        for prompt, options in wrongs:
            with pytest.raises(pipeload.ConfigError):
                session.generate(prompt, **options)
            assert session.token_ids == held
        whole = [*PROMPT, *first.token_ids, 3]
        computed.clear()
        assert_same(session.generate(whole, max_new_tokens=4), model.generate(whole, max_new_tokens=4))
        assert computed[0] == len(whole) - len(held)


def test_what_a_session_was_refused_hinders_nobody(toy_decoder: Path) -> None:
    with load(toy_decoder) as model, model.session() as session:
        made = session.generate(PROMPT, max_new_tokens=2)
        with pytest.raises(pipeload.BudgetError):
            session.generate(PROMPT, max_new_tokens=100_000)
        assert model.generate(PROMPT, max_new_tokens=2).token_ids == made.token_ids
        assert session.generate(PROMPT, max_new_tokens=2).token_ids == made.token_ids


def test_what_a_text_might_have_become_is_not_kept_free_for_it(toy_decoder: Path) -> None:
    with load(toy_decoder, 100_000_000) as model, model.session() as session:
        first = model.generate(PROMPT, max_new_tokens=1).token_ids
        session.generate(PROMPT, max_new_tokens=20_000, eos_token_id=first)
        for turn in range(20):
            model.generate([turn], max_new_tokens=1)
        assert model.plan.cache_bytes < 1_000_000


def test_a_draft_model_reads_a_conversation_once(toy_decoder: Path, computed: list[int]) -> None:
    with load(toy_decoder) as model, load(toy_decoder, 40_000_000) as twin, model.session() as session:
        text = list(PROMPT)
        for _ in range(3):
            text += [*session.generate(text, max_new_tokens=4, assistant_model=twin).token_ids, 3]
        # Both models have read the prompt, and after it little more than the new tokens.
        assert sum(computed) < 2 * (len(text) + 40)
