"""One prompt and its continuation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from pipeload.errors import RunError
from pipeload.tasks.generate.sampling import Scores, TokenChooser
from pipeload.tasks.generate.stopping import StopStrings
from pipeload.tasks.model_files import GenerationConfig
from pipeload.tasks.text.tokenizer import Detokenizer, Tokenizer

__all__ = ["FinishReason", "Generation", "GrowingSequence", "NewToken", "TopLogprobs"]

FinishReason: TypeAlias = Literal["eos", "stop", "length", "abort"]

TopLogprobs: TypeAlias = tuple[tuple[int, float], ...]
"""Token ids and the natural logarithms of their probabilities, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    """A token that was chosen just now.

    Attributes:
        sequence: the place of its sequence in the result of `generate`.
        token_id: the token.
        text: the text that it completes, without special tokens; empty while a character is not complete. All of them
            together are the text of the sequence.
        finish_reason: see `Generation`; None if the sequence goes on.
        logprob: see `Generation`.
        top_logprobs: see `Generation`.
    """

    __module__ = "pipeload"

    sequence: int
    token_id: int
    text: str
    finish_reason: FinishReason | None
    logprob: float | None
    top_logprobs: TopLogprobs | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The model's continuation of one prompt.

    Attributes:
        text: the new text as it follows the prompt, without special tokens; None if the prompt was token ids and
            the model has no tokenizer. It keeps the stop string that ended it, and the rest of the last token.
        token_ids: the new tokens, the one that ended the text included.
        prompt_tokens: the number of tokens in the prompt.
        finish_reason: `eos` if the model ended the text, `stop` if a stop string did, `length` if it reached
            `max_new_tokens`, `abort` if the reader of a `TextStream` closed it.
        logprobs: for each new token the natural logarithm of its probability by the model's own logits, before any rule
            changed them; None unless `logprobs=True`.
        top_logprobs: for each new token the likeliest tokens in its place, as pairs of id and log-probability, best
            first; None without `top_logprobs`.
        sweeps: the number of passes over the weights, including the prompt's.
        drafted_tokens: guessed tokens that these passes checked.
        accepted_tokens: the drafted tokens that were right.
    """

    __module__ = "pipeload"

    text: str | None
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[TopLogprobs, ...] | None = None
    sweeps: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class GrowingSequence:
    """A prompt and its growing continuation.

    Attributes:
        ids: prompt and text.
        chooser: chooses its tokens.
        finish_reason: None while it grows.
        sweeps, drafted, accepted: see `Generation`.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        settings: GenerationConfig,
        eos_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        chooser: TokenChooser,
        *,
        logprobs: bool,
        top_logprobs: int = 0,
        index: int = 0,
        on_token: Callable[[NewToken], object] | None = None,
    ) -> None:
        self.ids = list(prompt)
        self.finish_reason: FinishReason | None = None
        self.sweeps = self.drafted = self.accepted = 0
        self._prompt_tokens = len(prompt)
        self._length = len(prompt) + settings.token_limit
        self._eos_ids = eos_ids
        self._detokenizer = Detokenizer(tokenizer, prompt) if tokenizer else None
        stops = settings.stop_strings
        self._stops = StopStrings(stops, tokenizer, prompt) if stops and tokenizer else None
        self.chooser = chooser
        self._pieces: list[str] = []
        self._logprobs: list[float] | None = [] if logprobs else None
        self._top_count = top_logprobs
        self._top_logprobs: list[TopLogprobs] | None = [] if top_logprobs else None
        self._index, self._on_token = index, on_token

    @property
    def tokens_left(self) -> int:
        """The most tokens that may still come."""
        return self._length - len(self.ids)

    def push(self, scores: Scores) -> str:
        """Choose the next token; returns the text that it completes."""
        if not np.isfinite(scores.logits.max()):
            raise RunError("The model computed NaN or infinite logits. Check the model with `pipeload verify`.")
        place = self.chooser.choose(self.ids, scores)
        token = scores.token(place)
        self.ids.append(token)
        if self._logprobs is not None:
            self._logprobs.append(scores.log_probability(place))
        if self._top_logprobs is not None:
            self._top_logprobs.append(scores.likeliest(self._top_count))
        if self._detokenizer:
            self._pieces.append(self._detokenizer.push(token))
        stopped = self._stops is not None and self._stops.push(token)
        if token in self._eos_ids:
            self.finish_reason = "eos"
        elif stopped:
            self.finish_reason = "stop"
        elif len(self.ids) == self._length:
            self.finish_reason = "length"
        if self.finish_reason and self._detokenizer:
            self._pieces[-1] += self._detokenizer.flush()
        piece = self._pieces[-1] if self._pieces else ""
        if self._on_token is not None:
            self._on_token(
                NewToken(
                    sequence=self._index,
                    token_id=token,
                    text=piece,
                    finish_reason=self.finish_reason,
                    logprob=self._logprobs[-1] if self._logprobs else None,
                    top_logprobs=self._top_logprobs[-1] if self._top_logprobs else None,
                )
            )
        return piece

    def result(self) -> Generation:
        """The finished sequence. A sequence without a finish reason was aborted."""
        return Generation(
            text="".join(self._pieces) + self._detokenizer.flush() if self._detokenizer else None,
            token_ids=tuple(self.ids[self._prompt_tokens :]),
            prompt_tokens=self._prompt_tokens,
            finish_reason=self.finish_reason or "abort",
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            top_logprobs=None if self._top_logprobs is None else tuple(self._top_logprobs),
            sweeps=self.sweeps,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )
