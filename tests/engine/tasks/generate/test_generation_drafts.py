"""Drafts change no token: a prompt lookup or an assistant guesses, the model alone decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.engine.tasks.generate.drafting import (
    PROMPT,
    Processor,
    Recorder,
    assert_counted,
    assert_same,
    load,
    steered,
    with_bytes,
)
from tests.engine.toy import make_toy

import pipeload

_SAMPLED: Mapping[str, Any] = {"do_sample": True, "seed": 3, "top_k": 0}
_CASES: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "greedy, processed": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 7},
    "sampled": _SAMPLED,
    "hot": {**_SAMPLED, "temperature": 1.6},
    "top_k": {**_SAMPLED, "top_k": 3, "temperature": 2.5},
    "top_p": {**_SAMPLED, "top_p": 0.9, "seed": 4},
    "min_p": {**_SAMPLED, "min_p": 0.05, "temperature": 3.0, "repetition_penalty": 1.2},
    "never the same seven": {**_SAMPLED, "no_repeat_ngram_size": 7},
    "the end within a draft": {"eos_token_id": 8},
    "the end within a draft, sampled": {**_SAMPLED, "eos_token_id": [7, 9], "seed": 1},
    "no end yet": {"eos_token_id": 8, "min_new_tokens": 9},
    "no end yet, sampled": {**_SAMPLED, "eos_token_id": 8, "min_new_tokens": 9, "seed": 6},
    "the last token within a draft": {"max_new_tokens": 4},
    "a single token": {"max_new_tokens": 1},
}
_NEW_TOKENS = 16


@pytest.fixture(scope="module")
def half_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two blocks of the decoder that is a toy: often of its opinion."""
    pytest.importorskip("onnx")
    return make_toy(tmp_path_factory.mktemp("half") / "toy", blocks=2, width=64, decoder=True)


def test_lookups_change_nothing(decoder: Path) -> None:
    accepted = 0
    with load(decoder) as model:
        for case, options in _CASES.items():
            found = []
            for drafts in ({}, {"prompt_lookup_num_tokens": 5}):
                recorder = Recorder()
                processors = [steered(), recorder]
                every = {"max_new_tokens": _NEW_TOKENS, "logprobs": True, **options, **drafts}
                found.append((model.generate(PROMPT, logits_processor=processors, **every), recorder.seen))
            (plain, seen), (made, seen_again) = found
            assert_same(made, plain, case)
            assert seen_again == seen, case
            assert_counted(made, case)
            accepted += made.accepted_tokens
    assert accepted > 0


@pytest.mark.slow
def test_lookups_change_nothing_of_what_the_model_itself_wants(decoder: Path) -> None:
    variants: list[dict[str, Any]] = [{}, {"do_sample": True, "temperature": 0.05, "seed": 2, "logprobs": True}]
    with load(decoder) as model:
        for prompt in (PROMPT, [3], [11, 12, 11, 12, 40, 11]):
            for options in variants:
                plain = model.generate(prompt, max_new_tokens=_NEW_TOKENS, **options)
                for drafts in ({"prompt_lookup_num_tokens": 1}, {"prompt_lookup_num_tokens": 30}):
                    made = model.generate(prompt, max_new_tokens=_NEW_TOKENS, **options, **drafts)
                    assert_same(made, plain, (prompt, options, drafts))
                    assert_counted(made)


@pytest.mark.slow
def test_assistants_change_nothing(decoder: Path, half_toy: Path, exported_llama: Path) -> None:
    """Neither one that is often wrong, nor one that is always right."""
    stranger = half_toy if decoder.name == "toy-decoder" else exported_llama
    cases: list[Mapping[str, Any]] = [
        {},
        {**_SAMPLED, "temperature": 0.05},
        {**_SAMPLED, "top_k": 8, "logprobs": True},
        {"max_new_tokens": 3},
    ]
    with load(decoder) as model, load(stranger, 30_000_000) as other, load(decoder, 30_000_000) as twin:
        for options in cases:
            every = {"max_new_tokens": _NEW_TOKENS, **options}
            plain = model.generate(PROMPT, **every)
            for assistant in (other, twin):
                made = model.generate(PROMPT, assistant_model=assistant, **every)
                assert_same(made, plain, options)
                assert_counted(made, options)


@pytest.mark.slow
def test_processors_see_nothing_of_what_an_assistant_guesses(toy_decoder: Path, half_toy: Path) -> None:
    """They may count their calls: those are the same, whatever was guessed."""
    with load(toy_decoder) as model, load(half_toy, 30_000_000) as assistant:
        for options in ({}, {**_SAMPLED, "repetition_penalty": 1.2}):
            recorders = [Recorder(), Recorder()]
            every = {"max_new_tokens": _NEW_TOKENS, **options}
            plain = model.generate(PROMPT, logits_processor=[recorders[0]], **every)
            made = model.generate(PROMPT, logits_processor=[recorders[1]], assistant_model=assistant, **every)
            assert_same(made, plain, options)
            assert recorders[1].seen == recorders[0].seen
            assert made.drafted_tokens > 0


@pytest.mark.slow
def test_all_logits_and_the_largest_ones_give_the_same(decoder: Path) -> None:
    """A processor that changes nothing gets the whole vocabulary; without one, some logits may be enough."""
    cases: list[dict[str, Any]] = [
        {},
        {"do_sample": True, "seed": 5},
        {"do_sample": True, "seed": 5, "top_k": 4, "top_p": 0.7, "temperature": 0.7},
        {"do_sample": True, "seed": 5, "top_k": 4, "min_p": 0.6},
        {"do_sample": True, "seed": 5, "top_k": 5000},
    ]
    with load(decoder) as model:
        for options in cases:
            for drafts in ({}, {"prompt_lookup_num_tokens": 4}):
                every = {"max_new_tokens": 10, "logprobs": True, **options, **drafts}
                whole = model.generate(PROMPT, logits_processor=[Recorder()], **every)
                assert_same(model.generate(PROMPT, **every), whole, options)
        batch = [PROMPT, PROMPT[::-1]]
        for one, two in zip(
            model.generate(batch, max_new_tokens=6, do_sample=True, seed=1, logprobs=True),
            model.generate(
                batch, max_new_tokens=6, do_sample=True, seed=1, logprobs=True, logits_processor=[Recorder()]
            ),
            strict=True,
        ):
            assert_same(one, two)


@pytest.mark.slow
def test_a_streamed_model_with_an_assistant(exported_gpt2: Path) -> None:
    """Under the smallest budget that has room for the caches."""
    with load(exported_gpt2, 600_000) as model, load(exported_gpt2, 30_000_000) as twin:
        for options in ({}, {**_SAMPLED, "temperature": 0.05}):
            plain = model.generate(PROMPT, max_new_tokens=_NEW_TOKENS, **options)
            for drafts in ({"assistant_model": twin}, {"prompt_lookup_num_tokens": 6}):
                assert_same(model.generate(PROMPT, max_new_tokens=_NEW_TOKENS, **options, **drafts), plain, options)


@pytest.fixture(scope="module")
def speaking(exported_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are bytes, so that a character may lie in several of them."""
    return with_bytes(exported_gpt2, tmp_path_factory.mktemp("speaking") / "model")


_TEXT = "né ça va." + " né ça va." * 2


def _text_processor(directory: Path) -> Processor:
    """Goes on with the text, by its last two tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    ids = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).encode(_TEXT).ids
    following = dict(zip(pairwise(ids), ids[2:], strict=False))

    def process(token_ids: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        logits[0, following.get((int(token_ids[0, -2]), int(token_ids[0, -1])), ids[0])] += np.float32(9)
        return logits

    return process


def test_stop_strings_and_pieces_of_text(speaking: Path) -> None:
    """A stop string may end anywhere in a draft, and within a token."""
    process = _text_processor(speaking)
    cases: list[dict[str, Any]] = [
        {},
        {"stop_strings": "a va"},
        {"stop_strings": ["x", "a. n"]},
        {"stop_strings": "ç"},
        {"stop_strings": " va", "do_sample": True, "seed": 8},
        {"do_sample": True, "seed": 9, "stop_strings": "é ç", "logprobs": True},
        {"max_new_tokens": 2},
    ]
    accepted = 0
    with load(speaking) as model:
        for case, options in enumerate(cases):
            every = {"max_new_tokens": 20, "logits_processor": [process], **options}
            drafts = {"prompt_lookup_num_tokens": 3 if case % 2 else 7}
            plain = model.generate(_TEXT, **every)
            assert plain.finish_reason == ("stop" if "stop_strings" in options else "length"), options
            pieces: list[str] = []
            made = model.generate(_TEXT, streamer=pieces.append, **every, **drafts)
            assert_same(made, plain, options)
            assert_counted(made, options)
            assert "".join(pieces) == made.text, options
            accepted += made.accepted_tokens
        with pipeload.TextStream() as stream:
            every = {"max_new_tokens": 20, "logits_processor": [process], "prompt_lookup_num_tokens": 7}
            made = model.generate(_TEXT, streamer=stream, stop_strings="va. n", **every)
            assert "".join(stream) == made.text == " né ça va. n"
    assert accepted > 0


def test_a_reader_that_leaves_ends_the_text_with_what_it_has(speaking: Path) -> None:
    """The output is the beginning of the text, for any number of tokens that one sweep gave."""
    with load(speaking) as model:
        options = {"max_new_tokens": 25, "logits_processor": [_text_processor(speaking)]}
        plain = model.generate(_TEXT, **options)
        stream = pipeload.TextStream()

        def reader(token_ids: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
            if token_ids.shape[1] == plain.prompt_tokens + 6:
                stream.close()
            return logits

        processors = [*options.pop("logits_processor"), reader]
        made = model.generate(
            _TEXT, streamer=stream, logits_processor=processors, prompt_lookup_num_tokens=4, **options
        )
        assert made.finish_reason == "abort"
        assert 7 <= len(made.token_ids) < 25
        assert made.token_ids == plain.token_ids[: len(made.token_ids)]
        assert (plain.text or "").startswith(made.text or "")


def _check_property(model: pipeload.Model, drafts: Callable[[int, int], dict[str, Any]]) -> None:
    @settings(max_examples=15, deadline=None, database=None, derandomize=True)
    @given(
        prompt=st.lists(st.sampled_from(range(5, 11)), min_size=1, max_size=24),
        numbers=st.tuples(st.integers(1, 12), st.integers(1, 5)),
        strength=st.sampled_from([0.0, 3.0, 9.0]),
        options=st.fixed_dictionaries(
            {
                "max_new_tokens": st.integers(1, 14),
                "do_sample": st.booleans(),
                "seed": st.integers(0, 1000),
                "temperature": st.sampled_from([0.3, 1.0, 3.0]),
                "top_k": st.sampled_from([0, 4]),
                "top_p": st.sampled_from([1.0, 0.8]),
                "repetition_penalty": st.sampled_from([1.0, 1.4]),
                "no_repeat_ngram_size": st.sampled_from([0, 3]),
                "eos_token_id": st.sampled_from([[], [7], [6, 10]]),
                "logprobs": st.booleans(),
            }
        ),
    )
    def check(prompt: list[int], numbers: tuple[int, int], strength: float, options: dict[str, Any]) -> None:
        options["logits_processor"] = [steered(strength)]
        if not options["do_sample"]:
            # They would have no effect, which `generate` warns of.
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_k", "top_p")}
        plain = model.generate(prompt, **options)
        made = model.generate(prompt, **options, **drafts(*numbers))
        assert_same(made, plain)
        assert_counted(made)

    check()


def test_whatever_is_looked_up(toy_decoder: Path) -> None:
    with load(toy_decoder) as model:
        _check_property(model, lambda one, two: {"prompt_lookup_num_tokens": one, "max_matching_ngram_size": two})


def test_whatever_an_assistant_says(toy_decoder: Path, half_toy: Path) -> None:
    with load(toy_decoder) as model, load(half_toy, 30_000_000) as assistant:
        _check_property(model, lambda one, _: {"assistant_model": assistant, "num_assistant_tokens": one})


@pytest.mark.slow
def test_the_distribution_of_what_is_drawn_stays(toy_decoder: Path) -> None:
    """A text of four tokens that come by known probabilities: the same draws, and as often as these say."""
    table = np.full((96, 96), -np.inf, np.float32)
    for last in range(96):
        table[last, [(last + step) % 4 for step in range(4)]] = np.log([0.15, 0.6, 0.2, 0.05])

    def process(token_ids: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return table[token_ids[:, -1]]

    steps = np.zeros(4)
    drafted = accepted = 0
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "logits_processor": [process]}
    with load(toy_decoder) as model:
        for seed in range(30):
            plain = model.generate([0, 1, 2, 3, 0, 1], seed=seed, **options)
            made = model.generate([0, 1, 2, 3, 0, 1], seed=seed, prompt_lookup_num_tokens=3, **options)
            assert made.token_ids == plain.token_ids, seed
            drafted, accepted = drafted + made.drafted_tokens, accepted + made.accepted_tokens
            for last, token in zip((1, *made.token_ids), made.token_ids, strict=False):
                steps[(token - last) % 4] += 1
    assert 0 < accepted < drafted
    # 360 draws: five standard deviations are about this.
    np.testing.assert_allclose(steps / steps.sum(), [0.15, 0.6, 0.2, 0.05], atol=0.13)
