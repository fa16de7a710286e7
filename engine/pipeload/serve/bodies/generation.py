"""Fields that the routes for texts have in common."""

from __future__ import annotations

import msgspec

__all__ = ["Choosing", "StreamOptions", "Usage"]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options of a stream.

    Attributes:
        include_usage: the last chunk counts the tokens.
        include_obfuscation: has no effect: chunks are not padded.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Choosing(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen. What a request leaves out comes from the model's `generation_config.json`.

    Attributes:
        model: a name of `/v1/models`; may be left out where there is one model.
        temperature: 0 takes the likeliest token each time; more makes unlikely tokens likelier.
        top_p, top_k, min_p, repetition_penalty: as `generate` has them.
        presence_penalty: taken off the logit of each token that the answer has already.
        frequency_penalty: taken off for each time that the answer has it.
        logit_bias: token id -> added to its logit; -100 rules it out.
        seed: makes draws repeatable.
        stop: texts that end an answer, which does not show them.
        n: answers to each prompt.
        stream: send the answer as it comes, as server-sent events.
        stream_options: options of that.
        user: has no effect.
    """

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class CachedTokens(msgspec.Struct, kw_only=True, frozen=True):
    """Details of the prompt's tokens.

    Attributes:
        cached_tokens: those that were not computed again.
    """

    cached_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True):
    """Counts of tokens."""

    prompt_tokens: int
    prompt_tokens_details: CachedTokens = CachedTokens()
    completion_tokens: int
    total_tokens: int
