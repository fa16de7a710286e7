"""Sessions: tokens that were computed before are not computed again, and the answers do not show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.tasks.generate.drafting import PROMPT, assert_counted, assert_same, load, steered, with_bytes
from tests.engine.tasks.generate.drafting import computed as computed  # a fixture

import pipeload

_NEW = [31, 32, 33]
_SAMPLED: dict[str, Any] = {"do_sample": True, "seed": 7, "temperature": 0.5}
_ROOMY_BYTES = 30_000_000


def _check_holds(session: Any, text: list[int]) -> None:
    """It holds a text, all but the last token at least. The tokens behind it may be drafts that were wrong."""
    held = list(session.token_ids)
    assert held[: len(text) - 1] == text[:-1]


def test_two_turns_are_what_one_long_prompt_gives(decoder: Path, computed: list[int]) -> None:
    with load(decoder) as model:
        for options in ({}, _SAMPLED, {"prompt_lookup_num_tokens": 4}, {**_SAMPLED, "logprobs": True, "top_k": 3}):
            every = {"max_new_tokens": 10, **options}
            with model.session() as session:
                assert session.token_ids == ()
                first = session.generate(PROMPT, **every)
                assert_same(first, model.generate(PROMPT, **every), options)
                _check_holds(session, [*PROMPT, *first.token_ids])
                whole = [*PROMPT, *first.token_ids, *_NEW]
                computed.clear()
                second = session.generate(whole, **every)
                # Those that are new, and perhaps the last one of before.
                assert computed[0] - len(_NEW) in (0, 1), options
                assert_same(second, model.generate(whole, **every), options)
                assert second.prompt_tokens == len(whole)
                assert_counted(second)
                _check_holds(session, [*whole, *second.token_ids])


def test_many_turns_of_different_kinds(toy_decoder: Path) -> None:
    """A conversation whose turns are greedy, sampled, drafted by a lookup and by an assistant."""
    kinds: list[dict[str, Any]] = [
        {},
        _SAMPLED,
        {"prompt_lookup_num_tokens": 6},
        {**_SAMPLED, "repetition_penalty": 1.5},
    ]
    with load(toy_decoder) as model, load(toy_decoder, _ROOMY_BYTES) as twin, model.session() as session:
        text = list(PROMPT)
        for turn, options in enumerate([*kinds, {"assistant_model": twin}, {}, *kinds]):
            every = {"max_new_tokens": 7, "logits_processor": [steered(3.0)], **options}
            made = session.generate(text, **every)
            assert_same(made, model.generate(text, **every), turn)
            text += [*made.token_ids, 20 + turn]


def _check_property(model: pipeload.Model) -> None:
    turn = st.tuples(
        st.lists(st.sampled_from([5, 6, 7]), min_size=1, max_size=16),
        st.booleans(),
        st.fixed_dictionaries(
            {
                "max_new_tokens": st.integers(1, 6),
                "do_sample": st.booleans(),
                "seed": st.integers(0, 99),
                "eos_token_id": st.sampled_from([[], [6]]),
            }
        ),
        st.sampled_from([None, 1, 5]),
    )

    @settings(max_examples=15, deadline=None, database=None, derandomize=True)
    @given(turns=st.lists(turn, min_size=2, max_size=4))
    def check(turns: list[tuple[list[int], bool, dict[str, Any], int | None]]) -> None:
        text: list[int] = []
        with model.session() as session:
            for prompt, goes_on, options, lookup in turns:
                text = [*text, *prompt] if goes_on else prompt
                options["logits_processor"] = [steered(9.0, (5, 6, 7))]
                made = session.generate(text, prompt_lookup_num_tokens=lookup, **options)
                assert_same(made, model.generate(text, **options))
                text = [*text, *made.token_ids]

    check()


@pytest.mark.slow
def test_whatever_the_turns_are(one_of_each: Path) -> None:
    with load(one_of_each) as model:
        _check_property(model)


def _turn(model: pipeload.Model, session: Any, prompt: list[int], computed: list[int]) -> int:
    """How many tokens of a prompt a session computes, whose answer is the right one."""
    computed.clear()
    made = session.generate(prompt, max_new_tokens=5)
    tokens = computed[0]
    assert_same(made, model.generate(prompt, max_new_tokens=5))
    _check_holds(session, [*prompt, *made.token_ids])
    return tokens


def test_only_what_two_texts_begin_with_is_kept(decoder: Path, computed: list[int]) -> None:
    long = list(range(10, 40))
    with load(decoder) as model, model.session() as session:
        assert _turn(model, session, long, computed) == 30
        changed = [*long[:12], 77, *long[13:25]]
        assert _turn(model, session, changed, computed) == 13
        # Nothing in common.
        assert _turn(model, session, [50, *changed], computed) == 26
        assert _turn(model, session, long, computed) == 30


def test_a_prompt_that_is_there_already_computes_its_last_token(decoder: Path, computed: list[int]) -> None:
    long = list(range(10, 40))
    with load(decoder) as model, model.session() as session:
        _turn(model, session, long, computed)
        assert _turn(model, session, long, computed) == 1
        assert _turn(model, session, long[:9], computed) == 1
        # The tokens behind it are forgotten: the answer of the turn before stands there.
        made = model.generate(long[:9], max_new_tokens=5)
        assert _turn(model, session, [*long[:9], *made.token_ids], computed) == 1
        assert _turn(model, session, long[:1], computed) == 1
        assert _turn(model, session, [*long[:1], 90], computed) == 1


def test_texts_are_prompts_of_a_conversation(exported_gpt2: Path, tmp_path: Path, computed: list[int]) -> None:
    with load(with_bytes(exported_gpt2, tmp_path / "model")) as model, model.session() as session:
        text = "the cat sat. " * 2
        for turn in range(3):
            pieces: list[str] = []
            options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "seed": turn, "temperature": 0.1}
            computed.clear()
            made = session.generate(text, streamer=pieces.append, **options)
            if turn:
                assert computed[0] < made.prompt_tokens
            assert_same(made, model.generate(text, **options))
            assert "".join(pieces) == made.text
            text += f" {turn} more."


def test_every_kind_of_ids_is_a_prompt_of_a_session(toy_decoder: Path) -> None:
    with load(toy_decoder) as model, model.session() as session:
        expected = model.generate(PROMPT, max_new_tokens=3)
        kinds: list[Any] = [tuple(PROMPT), np.array(PROMPT, np.int32), [np.int64(token) for token in PROMPT]]
        for prompt in kinds:
            assert_same(session.generate(prompt, max_new_tokens=3), expected)
        held: Any = session.token_ids
        assert isinstance(held, tuple)
        assert all(type(token) is int for token in held)


def test_sessions_do_not_disturb_each_other(decoder: Path) -> None:
    texts = [list(PROMPT), [9, 8, 7]]
    with load(decoder) as model, model.session() as one, model.session() as two:
        for turn in range(3):
            for session, text in zip((one, two), texts, strict=True):
                options: dict[str, Any] = {"max_new_tokens": 5, "prompt_lookup_num_tokens": 1 + turn}
                made = session.generate(text, **options)
                assert_same(made, model.generate(text, max_new_tokens=5))
                text += [*made.token_ids, 60 + turn]
