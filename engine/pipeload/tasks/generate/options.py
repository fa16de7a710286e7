"""The settings of a `generate` call: its arguments, then `generation_config.json`, then transformers' defaults.

Invalid values are refused here, each with an error of its own, before any pass runs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import msgspec
import numpy as np

from pipeload.errors import ConfigError
from pipeload.tasks.arguments import is_whole
from pipeload.tasks.generate.sampling import LogitsProcessor
from pipeload.tasks.generate.sequence import NewToken
from pipeload.tasks.generate.streaming import Streamer
from pipeload.tasks.model_files import GenerationConfig
from pipeload.tasks.runner import Decoder, generation_config_of

__all__ = ["GenerationOptions", "check_call", "generation_settings", "warn_of_unused"]

_ASSISTANT_TOKENS = 20
"""Transformers' default for the number of tokens that a draft model guesses."""


class GenerationOptions(TypedDict, total=False):
    """The keywords of `generate`, for its overloads; `generate` documents them."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    stop_strings: str | Sequence[str] | None
    eos_token_id: int | Sequence[int] | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None
    assistant_model: Decoder[Any] | None
    num_assistant_tokens: int | None
    seed: int | None
    logits_processor: Sequence[LogitsProcessor]
    logprobs: bool
    top_logprobs: int
    streamer: Streamer | None
    on_token: Callable[[NewToken], object] | None


def generation_settings(written: GenerationConfig, options: GenerationOptions) -> GenerationConfig:
    """The settings of a model, with the options that are not None in their place; checked.

    Args:
        written: the settings of the model's `generation_config.json`; see `generation_config_of`.
        options: as the caller gave them.

    Raises:
        ConfigError: a value is invalid.
    """
    values = msgspec.structs.asdict(written)
    for name, value in options.items():
        if name in values and value is not None:
            values[name] = value.item() if isinstance(value, np.generic) else value
    if isinstance(values["temperature"], int | float) and values["temperature"] == 0:
        # The limit of ever smaller temperatures, and what other engines take it for.
        values["do_sample"] = False if isinstance(values["do_sample"], bool) else values["do_sample"]
    for name in ("stop_strings", "eos_token_id"):
        if isinstance(values[name], str | int):
            values[name] = [values[name]]
    for name, (works, wanted) in (_RULES | (_SAMPLING_RULES if values["do_sample"] else {})).items():
        if values[name] is not None and not works(values[name]):
            raise ConfigError(f"{name} must be {wanted}, not {values[name]!r:.80}.")
    settings = GenerationConfig(**values)
    if settings.min_new_tokens is not None and settings.min_new_tokens > settings.token_limit:
        raise ConfigError(
            f"min_new_tokens is {settings.min_new_tokens}, more than the {settings.token_limit} of max_new_tokens. "
            "Lower it, or raise max_new_tokens."
        )
    return settings


def warn_of_unused(settings: GenerationConfig, options: GenerationOptions) -> None:
    """Warn the caller of `generate` of settings without effect: those of the file that pipeload does not apply, and
    options of sampling where nothing is sampled, as transformers does.
    """
    if names := settings.not_applied:
        warnings.warn(
            f"The model's generation_config.json sets {', '.join(names)}, and pipeload does not apply "
            f"{'it' if len(names) == 1 else 'them'}: the text may differ from that of transformers.",
            UserWarning,
            stacklevel=4,
        )
    if settings.do_sample or settings.temperature == 0:
        return
    defaults = msgspec.structs.asdict(GenerationConfig())
    given = [name for name in _SAMPLING_RULES if options.get(name) not in (None, defaults[name])]
    if given:
        warnings.warn(
            f"{given[0]} is {options.get(given[0])!r:.80} and has no effect: do_sample is {settings.do_sample}, so the "
            "likeliest token is taken each time. Pass do_sample=True.",
            UserWarning,
            stacklevel=4,
        )


def lookup_tokens(settings: GenerationConfig, options: GenerationOptions, sequences: int) -> int:
    """The number of tokens to look up for a pass; a number from a file applies only to calls that support lookup."""
    if options.get("prompt_lookup_num_tokens") is None and (sequences > 1 or options.get("assistant_model")):
        return 0
    return settings.prompt_lookup_num_tokens or 0


def drafted_tokens(assistant: Decoder[Any], settings: GenerationConfig, options: GenerationOptions) -> int:
    """The most tokens that a draft model guesses for a pass: set by the caller, or else by its own file."""
    if options.get("num_assistant_tokens") is not None:
        return settings.num_assistant_tokens or _ASSISTANT_TOKENS
    return generation_settings(generation_config_of(assistant), {}).num_assistant_tokens or _ASSISTANT_TOKENS


def check_call(
    settings: GenerationConfig,
    options: GenerationOptions,
    num_return_sequences: object,
    sequences: int,
    lookup: int,
) -> None:
    """Check the arguments that no file can set.

    Args:
        settings: the settings that a file can set.
        options: as the caller gave them.
        num_return_sequences: as the caller gave it.
        sequences: the number of sequences in all.
        lookup: see `lookup_tokens`.

    Raises:
        ConfigError: a value is invalid.
    """
    seed, streamer = options.get("seed"), options.get("streamer")
    top_logprobs, on_token = options.get("top_logprobs", 0), options.get("on_token")
    logits_processor, assistant = options.get("logits_processor", ()), options.get("assistant_model")
    if num_return_sequences is not None:
        if not is_whole(num_return_sequences, 1):
            raise ConfigError(f"num_return_sequences must be a whole number from 1 on, not {num_return_sequences!r}.")
        if num_return_sequences != 1 and not settings.do_sample:
            raise ConfigError(
                f"num_return_sequences is {num_return_sequences}, but without sampling all of them would be equal. "
                "Pass do_sample=True, or leave it out."
            )
    if seed is not None and not is_whole(seed, 0):
        raise ConfigError(f"seed must be a whole number from 0 on, not {seed!r}.")
    if not isinstance(logits_processor, Sequence) or not all(map(callable, logits_processor)):
        raise ConfigError(f"logits_processor must be a sequence of callables, not {logits_processor!r:.80}.")
    if not is_whole(top_logprobs, 0):
        raise ConfigError(f"top_logprobs must be a whole number from 0 on, not {top_logprobs!r:.80}.")
    if on_token is not None and not callable(on_token):
        raise ConfigError(f"on_token must be a callable that takes a NewToken, not {on_token!r:.80}.")
    if streamer is not None and not callable(streamer):
        raise ConfigError(f"streamer must be a callable that takes a text, or a TextStream, not {streamer!r:.80}.")
    if assistant is not None and not hasattr(assistant, "new_state"):
        raise ConfigError(f"assistant_model must be a model from pipeload.load, not {assistant!r:.80}.")
    if assistant is not None and lookup:
        raise ConfigError("assistant_model and prompt_lookup_num_tokens are both given. Pass one of them.")
    single = {
        "streamer": streamer,
        "assistant_model": assistant,
        "prompt_lookup_num_tokens": lookup or None,
    }
    if sequences > 1 and (given := [name for name, value in single.items() if value is not None]):
        raise ConfigError(
            f"{given[0]} takes a single sequence, and this call makes {sequences}. Leave it out, or pass the prompts "
            "one by one: calls from several threads share their passes."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _are_texts(value: object) -> bool:
    return isinstance(value, Sequence) and all(isinstance(text, str) and text for text in value)


def _are_ids(value: object) -> bool:
    return isinstance(value, Sequence) and all(is_whole(id_, 0) for id_ in value)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda value: is_whole(value, 1), "a whole number from 1 on"),
    "min_new_tokens": (lambda value: is_whole(value, 0), "a whole number from 0 on"),
    "do_sample": (lambda value: isinstance(value, bool), "True or False"),
    "repetition_penalty": (
        lambda value: _is_number(value) and value > 0,
        "a number above 0 (1 changes nothing, more repeats less)",
    ),
    "no_repeat_ngram_size": (lambda value: is_whole(value, 0), "a whole number from 0 on (0 allows all)"),
    "stop_strings": (_are_texts, "a text or a sequence of texts, none of them empty"),
    "eos_token_id": (_are_ids, "a token id or a sequence of token ids, none below 0"),
    "prompt_lookup_num_tokens": (lambda value: is_whole(value, 0), "a whole number from 0 on (0 looks nothing up)"),
    "max_matching_ngram_size": (lambda value: is_whole(value, 1), "a whole number from 1 on"),
    "num_assistant_tokens": (lambda value: is_whole(value, 1), "a whole number from 1 on"),
}
"""Field -> a check of its value, and a description of valid values."""

_SAMPLING_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (
        lambda value: _is_number(value) and value > 0,
        "a number from 0 on (0 takes the likeliest token each time)",
    ),
    "top_k": (lambda value: is_whole(value, 0), "a whole number from 0 on (0 keeps all tokens)"),
    "top_p": (_is_share, "a number from 0 to 1 (1 keeps all tokens)"),
    "min_p": (_is_share, "a number from 0 to 1 (0 keeps all tokens)"),
}
"""The same for fields that only sampling uses, as in transformers."""
