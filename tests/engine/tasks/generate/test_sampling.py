"""Processors and warpers are those of transformers, and draws follow the probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeload.errors import ConfigError
from pipeload.pipeline.top_logits import RunningTop
from pipeload.tasks.generate.sampling import (
    Scores,
    TokenChooser,
    ban_ngrams,
    ban_tokens,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    likeliest,
    log_probability,
    penalize_repetition,
    penalties,
    scale,
    sequence_generator,
    warpers,
)
from pipeload.tasks.model_files import GenerationConfig

Logits = NDArray[np.float32]
NONE_YET = np.zeros((1, 0), np.int64)


class Fixed(np.random.Generator):
    """A generator that always says the same."""

    def __init__(self, number: float) -> None:
        super().__init__(np.random.PCG64(0))
        self._number = number

    def random(self, *_: Any) -> float:  # type: ignore[override]
        return self._number


def _row(*logits: float) -> Logits:
    return np.array([logits], np.float32)


def _random(seed: int) -> tuple[NDArray[np.int64], Logits]:
    """Tokens and logits of a few sequences; some flat and some peaked, some with ties or tokens that cannot come."""
    random = np.random.default_rng(seed)
    batch, length, vocabulary = random.integers(1, 4), random.integers(1, 40), int(random.choice([7, 60, 3000]))
    logits = random.standard_normal((batch, vocabulary)) * random.choice([0.01, 1, 5, 30])
    if seed % 3 == 1:
        logits = np.round(logits)
    if seed % 5 == 1:
        logits[random.random(logits.shape) < 0.3] = -np.inf
        logits[:, 0] = 1
    tokens = random.integers(0, random.choice([3, vocabulary]), (batch, length))
    return tokens, logits.astype(np.float32)


def _transformers() -> tuple[Any, Any]:
    return pytest.importorskip("torch"), pytest.importorskip("transformers.generation.logits_process")


PAIRS: dict[str, tuple[Callable[..., Logits], Callable[[Any, float], Any]]] = {
    "repetition_penalty": (
        lambda tokens, logits, u: penalize_repetition(tokens, logits, penalty=0.5 + 2 * u),
        lambda process, u: process.RepetitionPenaltyLogitsProcessor(0.5 + 2 * u),
    ),
    "no_repeat_ngram_size": (
        lambda tokens, logits, u: ban_ngrams(tokens, logits, size=1 + int(4 * u)),
        lambda process, u: process.NoRepeatNGramLogitsProcessor(1 + int(4 * u)),
    ),
    "min_new_tokens": (
        lambda tokens, logits, u: ban_tokens(tokens, logits, banned=[2, 5, 9000], until_length=1 + int(40 * u)),
        lambda process, u: process.MinNewTokensLengthLogitsProcessor(1, int(40 * u), [2, 5, 9000]),
    ),
    "temperature": (
        lambda tokens, logits, u: scale(tokens, logits, temperature=0.1 + 2 * u),
        lambda process, u: process.TemperatureLogitsWarper(0.1 + 2 * u),
    ),
    "top_k": (
        lambda tokens, logits, u: keep_top_k(tokens, logits, top_k=1 + int(90 * u)),
        lambda process, u: process.TopKLogitsWarper(1 + int(90 * u)),
    ),
    "top_p": (
        lambda tokens, logits, u: keep_top_p(tokens, logits, top_p=u),
        lambda process, u: process.TopPLogitsWarper(u),
    ),
    "min_p": (
        lambda tokens, logits, u: keep_min_p(tokens, logits, min_p=u / 3),
        lambda process, u: process.MinPLogitsWarper(u / 3),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_each_equals_that_of_transformers(name: str) -> None:
    torch, process = _transformers()
    ours, theirs = PAIRS[name]
    for seed in range(150):
        tokens, logits = _random(seed)
        u = float(np.random.default_rng(seed + 1000).random())
        expected = theirs(process, u)(torch.from_numpy(tokens), torch.from_numpy(logits.copy())).numpy()
        before = logits.copy()
        found = ours(tokens, logits, u)
        assert found.dtype == np.float32
        if name == "top_p":
            # Which of equally likely tokens stay is up to the sort: as many, and as likely.
            found, expected = np.sort(found, axis=1), np.sort(expected, axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=f"seed {seed}")
        np.testing.assert_array_equal(logits, before, err_msg="the logits were changed in place")


def test_the_chain_equals_that_of_transformers() -> None:
    torch, _ = _transformers()
    generation = pytest.importorskip("transformers.generation")

    class Chained(generation.GenerationMixin):  # type: ignore[misc,name-defined]
        config = None

    for seed in range(60):
        random = np.random.default_rng(seed)
        tokens, logits = _random(seed)
        chosen = {
            "repetition_penalty": float(random.choice([1, 1.3])),
            "no_repeat_ngram_size": int(random.choice([0, 3])),
            "min_new_tokens": int(random.choice([0, 50])),
            "do_sample": bool(random.choice([True, True, False])),
            "temperature": float(random.choice([1, 0.7])),
            "top_k": int(random.choice([0, 50])),
            "top_p": float(random.choice([1, 0.9])),
            "min_p": None if seed % 2 else 0.05,
        }
        theirs = generation.GenerationConfig(**chosen, eos_token_id=3)
        theirs._eos_token_tensor = torch.tensor([3])
        expected = Chained()._get_logits_processor(
            theirs, input_ids_seq_length=1, logits_processor=[lambda _, scores: scores * 0.5 + 1], device="cpu"
        )(torch.from_numpy(tokens), torch.from_numpy(logits.copy()))
        found = logits
        ours = GenerationConfig(**chosen)  # type: ignore[arg-type]
        for processor in (
            *penalties(ours, prompt_tokens=1, eos_ids=[3]),
            lambda _, scores: scores * 0.5 + 1,
            *(warpers(ours) if ours.do_sample else ()),
        ):
            found = processor(tokens, found)
        np.testing.assert_allclose(np.sort(found), np.sort(expected.numpy()), rtol=1e-6, err_msg=f"seed {seed}")


def test_what_changes_nothing_is_left_out() -> None:
    assert penalties(GenerationConfig(), prompt_tokens=1, eos_ids=[3]) == ()
    neutral = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, min_new_tokens=0, repetition_penalty=1.0
    )
    assert penalties(neutral, prompt_tokens=1, eos_ids=[3]) == warpers(neutral) == ()
    assert penalties(GenerationConfig(min_new_tokens=4), prompt_tokens=1, eos_ids=[]) == ()


def test_the_order() -> None:
    everything = GenerationConfig(
        do_sample=True,
        temperature=2.0,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=2.0,
        no_repeat_ngram_size=2,
        min_new_tokens=1,
    )
    made: Any = (*penalties(everything, prompt_tokens=1, eos_ids=[3]), *warpers(everything))
    names = [processor.func.__name__ for processor in made]
    assert names[:3] == ["penalize_repetition", "ban_ngrams", "ban_tokens"]
    assert names[3:] == ["scale", "keep_top_k", "keep_top_p", "keep_min_p"]


def _chooser(settings: GenerationConfig, *custom: Any, number: float | None = None) -> TokenChooser:
    generator = None if number is None else Fixed(number)  # type: ignore[no-untyped-call]
    return TokenChooser(settings, prompt_tokens=1, eos_ids=[3], custom=custom, generator=generator)


def test_a_callers_processor_comes_after_the_penalties_and_before_the_temperature() -> None:
    seen = []
    settings = GenerationConfig(do_sample=True, temperature=2.0, repetition_penalty=2.0, top_k=0)
    chooser = _chooser(settings, lambda _, logits: seen.append(logits) or logits, number=0.5)
    chooser.choose([1], Scores(_row(1, 4, 3)[0]))
    assert [logits.tolist() for logits in seen] == [[[1, 2, 3]]]


def test_the_largest_logits_are_enough_where_nothing_looks_at_single_tokens() -> None:
    assert _chooser(GenerationConfig()).top == 1
    assert _chooser(GenerationConfig(do_sample=True), number=0.5).top == 50
    assert _chooser(GenerationConfig(do_sample=True, top_k=0), number=0.5).top is None
    assert _chooser(GenerationConfig(), lambda _, logits: logits).top is None
    assert _chooser(GenerationConfig(repetition_penalty=2.0)).top is None


def test_a_token_is_chosen_from_the_largest_as_from_all() -> None:
    logits = np.random.default_rng(2).normal(size=(1, 400)).astype(np.float32)
    running = RunningTop(7)
    logits[0, :9] = np.sort(logits[0])[-7]  # as likely as the last one that is kept
    running.push(logits[:, None])
    few, every = Scores(running.result[0][0]), Scores(logits[0])
    settings = GenerationConfig(do_sample=True, top_k=7, top_p=0.9, temperature=0.8)
    for number in np.linspace(0, 0.999, 40):
        chooser = _chooser(settings, number=number)
        one, other = chooser.choose([1], few), chooser.choose([1], every)
        assert few.token(one) == every.token(other)
        assert few.log_probability(one) == pytest.approx(every.log_probability(other), abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_processor_that_returns_no_logits_is_named(bad: float) -> None:
    def last(returned: Any) -> Any:
        return _chooser(GenerationConfig(), _same, lambda *_: returned).choose([1], Scores(_row(1, 2, 3)[0]))

    for returned in (np.zeros(3, np.float32), np.zeros((1, 4)), np.zeros((1, 3), np.int64), None):
        with pytest.raises(ConfigError, match=r"logits_processor\[1\] returned .*; it must return float32\[1, 3\]"):
            last(returned)
    with pytest.raises(ConfigError, match=rf"logits_processor\[1\] returned {bad} as a logit"):
        last(_row(1, bad, 3))
    assert last(np.array([[1.5, -np.inf, 3]])) == 2


def _same(_token_ids: Any, logits: Logits) -> Logits:
    return logits


def test_a_processor_may_change_its_array() -> None:
    def spoil(_token_ids: Any, logits: Logits) -> Logits:
        logits[:] = 0
        return logits

    logits = _row(1, 2, 3)
    assert _chooser(GenerationConfig(), spoil).choose([1], Scores(logits[0])) == 0
    assert logits.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("peak", [-np.inf, np.inf, np.nan])
def test_without_a_token_that_could_come_nothing_is_chosen(peak: float) -> None:
    for choose in (likeliest, lambda logits: draw(logits, Fixed(0.5)), lambda logits: keep_top_p(0, logits, top_p=0.5)):
        with pytest.raises(ConfigError, match=f"No token can be chosen: the largest logit is {peak}"):
            choose(_row(peak, peak))  # type: ignore[no-untyped-call]


def test_the_first_of_equals_is_likeliest() -> None:
    assert likeliest(_row(1, 5, 5, -np.inf)) == 1


LOGITS = st.lists(st.floats(-30, 30, width=32) | st.just(-np.inf), min_size=1, max_size=40).filter(
    lambda row: max(row) > -np.inf
)


@given(LOGITS, st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_a_draw_inverts_the_cumulative_distribution(row: list[float], number: float) -> None:
    weights = np.exp(np.array(row, np.float64) - max(row))
    shares = weights / weights.sum()
    token = draw(_row(*row), Fixed(number))
    assert shares[token] > 0
    assert shares[:token].sum() <= number + 1e-12
    assert shares[: token + 1].sum() >= number - 1e-12


def test_the_ends_of_the_distribution() -> None:
    logits = _row(-np.inf, 0, 1, -800, -np.inf)
    assert draw(logits, Fixed(0)) == 1
    assert draw(logits, Fixed(1 - 2**-53)) == 2
    assert draw(_row(-np.inf, 3), Fixed(1 - 2**-53)) == 1


def test_draws_are_as_frequent_as_probable() -> None:
    generator = sequence_generator(0, 0, 0)
    logits = _row(0, 1, 2, -np.inf, 3)
    counts = np.bincount([draw(logits, generator) for _ in range(20_000)], minlength=5) / 20_000
    expected = np.exp([0, 1, 2, -np.inf, 3])
    np.testing.assert_allclose(counts, expected / expected.sum(), atol=0.01)


@given(LOGITS, st.floats(0, 1))
@settings(deadline=None)
def test_top_p_keeps_the_fewest(row: list[float], top_p: float) -> None:
    weights = np.exp(np.array(row, np.float64) - max(row))
    shares = weights / weights.sum()
    kept = np.isfinite(keep_top_p(NONE_YET, _row(*row), top_p=top_p)[0])
    assert kept[int(np.argmax(row))] or shares[kept].max() == shares.max()
    assert shares[kept].sum() >= top_p - 1e-6
    assert kept.sum() == 1 or shares[kept].sum() - shares[kept].min() < top_p + 1e-6


@given(LOGITS)
@settings(deadline=None)
def test_log_probabilities_are_those_of_a_distribution(row: list[float]) -> None:
    found = [log_probability(_row(*row), token) for token in range(len(row))]
    assert np.exp(found).sum() == pytest.approx(1, abs=1e-12)
    differences = np.array(row) - max(row)
    np.testing.assert_allclose(np.array(found) - max(found), differences, atol=1e-9)


def test_each_sequence_has_its_own_numbers() -> None:
    def first(*place: int) -> float:
        return sequence_generator(*place).random()

    places = [(seed, prompt, copy) for seed in range(4) for prompt in range(4) for copy in range(4)]
    assert len({first(*place) for place in places}) == 64
    assert first(1, 2, 3) == first(1, 2, 3)
    assert 0 <= first(2**130, 0, 0) < 1
