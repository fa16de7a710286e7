"""From the fields of a request to the options of `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pipeload.serve.bodies.generation import Choosing
from pipeload.serve.errors import ApiError
from pipeload.serve.settings import LIMITS
from pipeload.tasks.generate.options import GenerationOptions
from pipeload.tasks.generate.sampling import Logits, LogitsProcessor, TokenIds
from pipeload.tasks.model_files import GenerationConfig
from pipeload.tasks.runner import config_of, generation_config_of

if TYPE_CHECKING:
    from pipeload.model import Model

__all__ = ["MAX_TOKENS", "TOP_LOGPROBS", "Order", "order_of", "within"]

MAX_TOKENS = 512
"""The most tokens of an answer, unless the request or the model sets another number."""

TOP_LOGPROBS = 20
"""The most likely tokens that are told in the place of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Answers that a request wants.

    Attributes:
        prompts: token ids of each.
        copies: answers to each prompt.
        drawn: of these, the number that is made: without sampling, all answers to a prompt are copies of one.
        options: for `generate`.
        stops: texts that an answer ends before.
    """

    prompts: Sequence[Sequence[int]]
    copies: int
    drawn: int
    options: GenerationOptions
    stops: tuple[str, ...]


def order_of(
    model: Model,
    body: Choosing,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | None,
    logprobs: bool,
    top_logprobs: int,
    rules: Sequence[LogitsProcessor] = (),
    hidden_stops: Sequence[str] = (),
) -> Order:
    """The answers that a request wants of a model.

    Args:
        model: the model.
        body: the request.
        prompts: token ids of each prompt.
        max_tokens: the most tokens of an answer; None for the default.
        logprobs: whether the request wants the log-probabilities of tokens.
        top_logprobs: the number of likeliest tokens in the place of each.
        rules: more logits processors.
        hidden_stops: texts that end an answer, which keeps them.

    Raises:
        ApiError: a field is out of range.
    """
    longest = max(map(len, prompts), default=0)
    if longest > LIMITS.prompt_tokens:
        raise ApiError(400, f"A prompt has {longest} tokens; this server takes {LIMITS.prompt_tokens}.")
    copies = within("n", 1 if body.n is None else body.n, 1, LIMITS.copies)
    written = generation_config_of(model)
    sampled = _sampled(body, written)
    options: GenerationOptions = {
        "do_sample": sampled,
        "max_new_tokens": _limit(model, written, longest) if max_tokens is None else max_tokens,
        "repetition_penalty": body.repetition_penalty,
        "seed": body.seed,
        "logprobs": logprobs,
        "top_logprobs": top_logprobs,
    }
    if sampled:
        options |= {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k, "min_p": body.min_p}
    stops = _stops(body.stop)
    if stops or hidden_stops:
        options["stop_strings"] = (*stops, *hidden_stops)
    processors = [*_penalties(body, prompts), *rules]
    if processors:
        options["logits_processor"] = processors
    return Order(prompts=prompts, copies=copies, drawn=copies if sampled else 1, options=options, stops=stops)


def _sampled(body: Choosing, written: GenerationConfig) -> bool:
    """Whether tokens are drawn: where the request names an option of drawing, or the model's own file says so."""
    if body.temperature == 0:
        return False
    given = (body.temperature, body.top_p, body.top_k, body.min_p)
    return bool(written.do_sample) or any(value is not None for value in given)


def _limit(model: Model, written: GenerationConfig, prompt_tokens: int) -> int | None:
    if written.max_new_tokens is not None or written.max_length is not None:
        return None
    positions = config_of(model).max_positions
    return MAX_TOKENS if positions is None else max(1, min(MAX_TOKENS, positions - prompt_tokens))


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    within("The number of stop strings", len(stops), 0, LIMITS.stops, param="stop")
    for one in stops:
        within("The length of a stop string", len(one), 1, LIMITS.stop_characters, param="stop")
    return stops


def _penalties(body: Choosing, prompts: Sequence[Sequence[int]]) -> list[LogitsProcessor]:
    presence = within("presence_penalty", body.presence_penalty or 0.0, -2, 2)
    frequency = within("frequency_penalty", body.frequency_penalty or 0.0, -2, 2)
    made: list[LogitsProcessor] = []
    if presence or frequency:
        if len({len(prompt) for prompt in prompts}) > 1:
            raise ApiError(
                400, "Penalties take prompts of one length. Send them one by one.", param="frequency_penalty"
            )
        made.append(partial(penalize, prompt_tokens=len(prompts[0]), presence=presence, frequency=frequency))
    if body.logit_bias:
        biases = {_token(key): within("logit_bias", value, -100, 100) for key, value in body.logit_bias.items()}
        made.append(partial(bias, biases=biases))
    return made


def penalize(token_ids: TokenIds, logits: Logits, *, prompt_tokens: int, presence: float, frequency: float) -> Logits:
    """Make tokens that the answer has already less likely, as OpenAI defines it."""
    tokens, counts = np.unique(token_ids[0, prompt_tokens:], return_counts=True)
    logits[0, tokens] -= (presence + frequency * counts).astype(np.float32)
    return logits


def bias(_token_ids: TokenIds, logits: Logits, *, biases: Mapping[int, float]) -> Logits:
    """Add to the logits of tokens; -100 rules one out."""
    for token, value in biases.items():
        if token < logits.shape[1]:
            logits[0, token] = -np.inf if value == -100 else logits[0, token] + value
    return logits


def _token(key: str) -> int:
    if not key.isdecimal() or len(key) > 9:
        raise ApiError(400, f"logit_bias has '{key:.80}', which is no token id.", param="logit_bias")
    return int(key)


def within(name: str, value: float, least: float, most: float, *, param: str | None = None) -> int:
    """A number of a request, which is in its range.

    Args:
        name: of it in the error's message.
        value: the number.
        least: that is allowed.
        most: that is allowed.
        param: its field, where that has another name.

    Raises:
        ApiError: it is not.
    """
    if not least <= value <= most:
        raise ApiError(400, f"{name} is {value}; it must be from {least} to {most}.", param=param or name)
    return value  # type: ignore[return-value]
