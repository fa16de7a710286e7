"""From logits to the next token: rules that change the logits, and the draw of a token.

```
logits --> penalties, bans --> the caller's own processors --> temperature, top k, top p, min p --> draw
           '---------------------------- or the likeliest -----------------------------------------'
```

If no rule looks at single tokens, the largest logits are enough: the others of a large vocabulary are not kept.
Order and meaning are those of transformers 4.57 (`generation/logits_process.py`, `generation/utils.py`). Logits are
float32 as there; probabilities are float64, so that sums over a large vocabulary lose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import copy, deepcopy
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pipeload.errors import ConfigError
from pipeload.foreign import foreign_errors
from pipeload.pipeline.top_logits import TopLogits
from pipeload.tasks.model_files import GenerationConfig

__all__ = [
    "Logits",
    "LogitsProcessor",
    "Scores",
    "TokenChooser",
    "TokenIds",
    "ban_ngrams",
    "ban_tokens",
    "draw",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "likeliest",
    "log_probability",
    "penalize_repetition",
    "penalties",
    "scale",
    "sequence_generator",
    "warpers",
]

TokenIds: TypeAlias = NDArray[np.int64]
"""Prompts and their continuations, `[batch, length]`."""

Logits: TypeAlias = NDArray[np.float32]
"""Of the next token, `[batch, vocabulary]`; minus infinity for tokens that are ruled out."""

LogitsProcessor: TypeAlias = Callable[[TokenIds, Logits], Logits]
"""Takes the tokens so far and the logits of the next token; returns other logits of the same shape."""


_NO_TOKENS: TokenIds = np.zeros((1, 0), np.int64)
_LOOSEN = "Check that the token ids are in the model's vocabulary, and loosen the sampling options."


class Scores:
    """Logits to choose one token from: all of the vocabulary, or the largest ones.

    Attributes:
        logits: float32 `[1, tokens]`.
    """

    def __init__(self, logits: NDArray[np.float32] | TopLogits) -> None:
        self._top = logits if isinstance(logits, TopLogits) else None
        self.logits: Logits = (logits.logits if isinstance(logits, TopLogits) else logits)[None]

    def token(self, place: int) -> int:
        """The token whose logit is at a place."""
        return place if self._top is None else int(self._top.token_ids[place])

    def log_probability(self, place: int) -> float:
        """The natural logarithm of the probability of the token at a place, in float64."""
        if self._top is None:
            return log_probability(self.logits, place)
        return float(np.float64(self._top.logits[place]) - self._top.log_total)

    def likeliest(self, count: int) -> tuple[tuple[int, float], ...]:
        """The likeliest tokens, best first, each with the natural logarithm of its probability."""
        row = self.logits[0]
        count = min(count, len(row))
        least = np.partition(row, len(row) - count)[len(row) - count]
        places = np.flatnonzero(row >= least)
        best = places[np.argsort(-row[places], kind="stable")][:count]
        return tuple((self.token(int(place)), self.log_probability(int(place))) for place in best)


class TokenChooser:
    """Chooses the tokens of one sequence.

    Args:
        settings: checked; see `pipeload.tasks.generate.options`.
        prompt_tokens: tokens before the new ones.
        eos_ids: tokens that end a text.
        custom: the caller's own processors.
        generator: random numbers, one for each token; None takes the likeliest.
        least_top: tokens whose scores the caller wants to see, at least 1.

    Attributes:
        top: this many of the largest logits are enough to choose from; None needs all of them.
    """

    def __init__(
        self,
        settings: GenerationConfig,
        *,
        prompt_tokens: int,
        eos_ids: Collection[int],
        custom: Sequence[LogitsProcessor] = (),
        generator: np.random.Generator | None = None,
        least_top: int = 1,
    ) -> None:
        self._penalties = penalties(settings, prompt_tokens=prompt_tokens, eos_ids=eos_ids)
        self._custom: tuple[LogitsProcessor, ...] = tuple(
            partial(_call, processor, place) for place, processor in enumerate(custom)
        )
        self._warpers = warpers(settings) if generator else ()
        self._generator = generator
        self.top: int | None = None
        if not self._penalties and not custom:
            top = settings.top_k if generator else 1
            self.top = max(top, least_top) if top else None

    def choose(self, ids: Sequence[int], scores: Scores) -> int:
        """The place in the scores of the token that follows the ids.

        Raises:
            ConfigError: no token can be chosen.
        """
        # The array of a long text takes longer than all the rest: it is made only for rules that read the text.
        token_ids = np.array([ids], np.int64) if self._penalties or self._custom else _NO_TOKENS
        logits = scores.logits
        with foreign_errors(ConfigError, f"No token can be chosen from {logits.shape[1]} logits", _LOOSEN):
            for penalize in self._penalties:
                logits = penalize(token_ids, logits)
        for process in self._custom:
            logits = process(token_ids, logits)
        with foreign_errors(ConfigError, f"No token can be chosen from {logits.shape[1]} logits", _LOOSEN):
            for warp in self._warpers:
                logits = warp(token_ids, logits)
            return draw(logits, self._generator) if self._generator else likeliest(logits)

    def ahead(self) -> TokenChooser:
        """A copy for drafting: same rules and random state, without the caller's processors."""
        other = copy(self)
        other._custom = ()
        other._generator = deepcopy(self._generator)
        return other


def penalties(
    settings: GenerationConfig, *, prompt_tokens: int, eos_ids: Collection[int]
) -> tuple[LogitsProcessor, ...]:
    """The rules that change the logits of certain tokens, in the order of transformers, without rules that change none.

    Args:
        settings: checked; see `pipeload.tasks.generate.options`.
        prompt_tokens: tokens before the new ones.
        eos_ids: tokens that end a text.
    """
    made: list[LogitsProcessor] = []
    if settings.repetition_penalty is not None and settings.repetition_penalty != 1:
        made.append(partial(penalize_repetition, penalty=settings.repetition_penalty))
    if settings.no_repeat_ngram_size:
        made.append(partial(ban_ngrams, size=settings.no_repeat_ngram_size))
    if settings.min_new_tokens and eos_ids:
        made.append(partial(ban_tokens, banned=tuple(eos_ids), until_length=prompt_tokens + settings.min_new_tokens))
    return tuple(made)


def warpers(settings: GenerationConfig) -> tuple[LogitsProcessor, ...]:
    """The rules that shape the probabilities of a draw, in the order of transformers."""
    made: list[LogitsProcessor] = []
    if settings.temperature is not None and settings.temperature != 1:
        made.append(partial(scale, temperature=settings.temperature))
    if settings.top_k:
        made.append(partial(keep_top_k, top_k=settings.top_k))
    if settings.top_p is not None and settings.top_p < 1:
        made.append(partial(keep_top_p, top_p=settings.top_p))
    if settings.min_p is not None:
        made.append(partial(keep_min_p, min_p=settings.min_p))
    return tuple(made)


def penalize_repetition(token_ids: TokenIds, logits: Logits, *, penalty: float) -> Logits:
    """Make tokens that occurred already less likely: divide their logits by `penalty`, or multiply logits below 0."""
    seen = np.take_along_axis(logits, token_ids, axis=1)
    processed = logits.copy()
    np.put_along_axis(processed, token_ids, np.where(seen < 0, seen * penalty, seen / penalty), axis=1)
    return processed


def ban_ngrams(token_ids: TokenIds, logits: Logits, *, size: int) -> Logits:
    """Rule out each token that would complete a sequence of `size` tokens that occurred already."""
    length = token_ids.shape[1]
    if length < size:
        return logits
    processed = logits.copy()
    ngrams = sliding_window_view(token_ids, size, axis=1)
    rows, places = np.nonzero((ngrams[..., :-1] == token_ids[:, None, length + 1 - size :]).all(axis=-1))
    processed[rows, ngrams[rows, places, -1]] = -np.inf
    return processed


def ban_tokens(token_ids: TokenIds, logits: Logits, *, banned: Sequence[int], until_length: int) -> Logits:
    """Rule out tokens until the text has `until_length` tokens, so that it does not end earlier."""
    if token_ids.shape[1] >= until_length:
        return logits
    # A model may name an end-of-text token that its logits do not have.
    processed: Logits = np.where(np.isin(np.arange(logits.shape[1]), banned), np.float32(-np.inf), logits)
    return processed


def scale(_token_ids: TokenIds, logits: Logits, *, temperature: float) -> Logits:
    """Divide by the temperature: below 1 likely tokens become likelier, above 1 less so."""
    return logits / temperature


def keep_top_k(_token_ids: TokenIds, logits: Logits, *, top_k: int) -> Logits:
    """Keep the `top_k` likeliest tokens, and those that are as likely as the last of them."""
    last = logits.shape[1] - min(top_k, logits.shape[1])
    return _keep(logits, logits >= np.partition(logits, last, axis=1)[:, last, None])


def keep_top_p(_token_ids: TokenIds, logits: Logits, *, top_p: float) -> Logits:
    """Keep the smallest set of likeliest tokens whose probabilities add up to `top_p`; at least one."""
    ascending = logits.argsort(axis=1, kind="stable")
    # Sums in float64 and compared in float32, as torch does it: the same tokens stay.
    sums = np.take_along_axis(_probabilities(logits), ascending, axis=1).cumsum(axis=1).astype(np.float32)
    kept = sums > np.float32(1 - top_p)
    kept[:, -1] = True
    back = np.empty_like(kept)
    np.put_along_axis(back, ascending, kept, axis=1)
    return _keep(logits, back)


def keep_min_p(_token_ids: TokenIds, logits: Logits, *, min_p: float) -> Logits:
    """Keep tokens that are at least `min_p` times as likely as the likeliest."""
    probabilities = _probabilities(logits)
    return _keep(logits, probabilities >= min_p * probabilities.max(axis=1, keepdims=True))


def likeliest(logits: Logits) -> int:
    """The token with the largest logit, the first of equal ones. Takes one row, `[1, vocabulary]`.

    Raises:
        ConfigError: no token can be chosen.
    """
    _peaks(logits)
    return int(logits[0].argmax())


def draw(logits: Logits, generator: np.random.Generator) -> int:
    """A token by its probability: one number of the generator, looked up in the cumulative distribution.

    Takes one row, `[1, vocabulary]`.

    Raises:
        ConfigError: no token can be chosen.
    """
    probabilities = _probabilities(logits)[0]
    tokens = np.flatnonzero(probabilities)
    sums = probabilities[tokens].cumsum()
    place = sums.searchsorted(generator.random() * sums[-1], side="right")
    # The product may round up to the sum of all.
    return int(tokens[min(int(place), len(tokens) - 1)])


def log_probability(logits: Logits, token: int) -> float:
    """The natural logarithm of a token's probability, in float64. Takes one row, `[1, vocabulary]`."""
    below_peak = logits[0].astype(np.float64) - logits[0].max()
    return float(below_peak[token] - np.log(np.exp(below_peak).sum()))


def sequence_generator(seed: int, prompt: int, copy: int) -> np.random.Generator:
    """Random numbers for one sequence, which no other sequence of the call has.

    Args:
        seed: of the whole call, not below 0.
        prompt: index of the prompt.
        copy: index among the sequences of this prompt.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(prompt, copy))))


def _call(processor: LogitsProcessor, place: int, token_ids: TokenIds, logits: Logits) -> Logits:
    """Call the caller's processor and check its result."""
    # A copy, since changing the array in place is usual.
    returned = processor(token_ids, logits.copy())
    with foreign_errors(ConfigError, f"logits_processor[{place}] returned what is no array", "Return logits."):
        processed = np.asarray(returned)
    if processed.shape != logits.shape or not np.issubdtype(processed.dtype, np.floating):
        raise ConfigError(
            f"logits_processor[{place}] returned {processed.dtype}{list(processed.shape)}; it must return "
            f"float32{list(logits.shape)}, the shape that it was given."
        )
    if np.isnan(peak := processed.max()) or peak == np.inf:
        raise ConfigError(
            f"logits_processor[{place}] returned {peak} as a logit. Return numbers, and minus infinity for tokens that "
            "cannot come."
        )
    return processed.astype(np.float32, copy=False)


def _keep(logits: Logits, kept: NDArray[np.bool_]) -> Logits:
    processed: Logits = np.where(kept, logits, np.float32(-np.inf))
    return processed


def _probabilities(logits: Logits) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - _peaks(logits))
    shares: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _peaks(logits: Logits) -> Logits:
    """The largest logit of each row, `[batch, 1]`."""
    peaks: Logits = logits.max(axis=1, keepdims=True)
    if not np.isfinite(peaks).all():
        raise ConfigError(
            f"No token can be chosen: the largest logit is {peaks.min()} after repetition_penalty, "
            "no_repeat_ngram_size, min_new_tokens, logits_processor and temperature. Loosen one of them."
        )
    return peaks
