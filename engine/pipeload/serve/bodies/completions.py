"""Bodies of `/v1/completions`."""

from __future__ import annotations

from typing import Literal

import msgspec

from pipeload.serve.bodies.generation import Choosing, Usage

__all__ = ["CompletionAnswer", "CompletionChoice", "CompletionLogprobs", "CompletionRequest"]


class CompletionRequest(Choosing, kw_only=True, forbid_unknown_fields=True):
    """Texts to go on with.

    Attributes:
        prompt: a text, its token ids, or a list of either.
        max_tokens: the most tokens of an answer.
        logprobs: the log-probabilities of the answer's tokens, and of this many of the likeliest in their place.
    """

    prompt: str | list[str | int | list[int]]
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """The tokens of an answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None = None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One answer, or new text of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class CompletionAnswer(msgspec.Struct, kw_only=True):
    """All answers, or an event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
