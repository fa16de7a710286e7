"""From the prompts that a caller passes to `generate`, to token ids that the model accepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeGuard, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError
from pipeload.format.manifest import Manifest, TensorSpec
from pipeload.machine.heap import trim
from pipeload.tasks.model_files import GenerationConfig
from pipeload.tasks.runner import Decoder, Runner, State, config_of, once_per_runner
from pipeload.tasks.text.tokenizer import Tokenizer, tokenizer_of

__all__ = [
    "Prompt",
    "check_assistant",
    "check_model",
    "check_rows",
    "eos_ids",
    "joined",
    "listed",
    "token_ids",
    "tokenizer_if_any",
]

Prompt: TypeAlias = str | Sequence[int] | NDArray[np.integer]
"""A text, or its token ids."""


def check_model(runner: Decoder[State]) -> None:
    """Raise ConfigError when the model generates no text."""
    manifest = runner.manifest
    if manifest.task != "text-generation":
        raise ConfigError(
            f"generate takes a model for text-generation; this one is for {manifest.task}. "
            "Export it with --task text-generation, or use model.run."
        )
    if not manifest.caches:
        raise ConfigError(
            "The model was exported without KV caches, so every token would need a pass over the whole text. "
            "Export it with --task text-generation-with-past."
        )
    logits = _logits_of(manifest)
    if logits is None or len(logits.shape) != 3:
        raise ConfigError(
            f"The model's first output is {'a cache' if logits is None else list(logits.shape)}; generate takes logits "
            "[batch, length, vocabulary]. Use model.run, or export the model again."
        )


def listed(prompt: Prompt | Sequence[str] | Sequence[Sequence[int]]) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether the caller passed a single one outside a list."""
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, str) or _are_ids(prompt):
        return [prompt], True
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise _not_a_prompt(prompt)
    return list(cast("Sequence[Prompt]", prompt)), False


def token_ids(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """The tokens of a prompt."""
    if isinstance(prompt, str) and tokenizer:
        return list(tokenizer.encode(prompt).ids)
    if not _are_ids(prompt):
        raise _not_a_prompt(prompt)
    return [int(token) for token in prompt]


def tokenizer_if_any(runner: Decoder[State], *, required: bool) -> Tokenizer | None:
    """The model's tokenizer. Token ids need none; without one, only the text of the answer is missing."""
    try:
        return tokenizer_of(runner)
    except ConfigError:
        if required:
            raise
        return None


def eos_ids(runner: Decoder[State], settings: GenerationConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The tokens that end a text: where there is a `generation_config.json`, those that it names alone."""
    if settings.eos_token_id is None and settings.names_ends:
        return frozenset()
    named = tokenizer.eos_id if tokenizer else None
    config = config_of(runner)
    if settings.eos_token_id is None:
        config.require("eos_token_id")
    for ids in (settings.eos_token_id, config.eos_token_id, named):
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def within_length(settings: GenerationConfig, rows: Sequence[Sequence[int]]) -> GenerationConfig:
    """The settings, with the new tokens that a file's `max_length` leaves beside the longest prompt."""
    if settings.max_new_tokens is not None or settings.max_length is None:
        return settings
    longest = max(map(len, rows))
    if longest >= settings.max_length:
        raise ConfigError(
            f"The prompt has {longest} tokens, and the model's generation_config.json sets max_length to "
            f"{settings.max_length} for prompt and text. Pass max_new_tokens."
        )
    return msgspec.structs.replace(settings, max_new_tokens=settings.max_length - longest)


def check_rows(runner: Decoder[State], rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ConfigError when the model cannot take the tokens of these prompts."""
    config = config_of(runner)
    shortest, longest = min(map(len, rows)), max(map(len, rows))
    if shortest == 0:
        raise ConfigError("A prompt is empty: it has no tokens.")
    if config.max_positions is not None and longest + max_new_tokens > config.max_positions:
        raise ConfigError(
            f"The prompt has {longest} tokens; with {max_new_tokens} new ones that is more than the "
            f"{config.max_positions} that the model has positions for. Shorten the prompt or lower max_new_tokens."
        )
    limit = config.vocab_size or np.iinfo(np.int32).max
    if outside := [token for row in rows for token in row if not 0 <= token < limit]:
        raise ConfigError(f"Token id {outside[0]} is outside the model's vocabulary of {limit}.")


def joined(manifest: Manifest, lengths: Sequence[int]) -> list[list[int]]:
    """Indices of texts that share passes: all, or those of one length where the model cannot tell padding from text.

    Args:
        manifest: the model.
        lengths: tokens of each text.
    """
    if manifest.quantised_dynamically:
        return [[index] for index in range(len(lengths))]
    pads = manifest.takes_left_padding
    if pads is None:
        pads = {"attention_mask", "position_ids"} <= {spec.name for spec in manifest.free_inputs}
    if pads:
        return [[*range(len(lengths))]]
    return [[i for i, other in enumerate(lengths) if other == length] for length in dict.fromkeys(lengths)]


def check_assistant(runner: Decoder[Any], assistant: Decoder[Any]) -> None:
    """Raise ConfigError when one model cannot guess tokens for the other."""
    check_model(assistant)
    vocabularies = [_vocabulary_of(one) for one in (runner, assistant)]
    if vocabularies[0] != vocabularies[1]:
        raise ConfigError(
            f"assistant_model in {assistant.directory} has another vocabulary than the model in {runner.directory}, "
            "so its guesses would mean other tokens. Take a model with the same tokenizer."
        )


@once_per_runner
def _vocabulary_of(runner: Runner) -> object:
    """A value that is equal for models whose token ids mean the same."""
    try:
        digest = tokenizer_of(runner).vocabulary_digest()
    except ConfigError:
        logits = _logits_of(runner.manifest)
        return logits and logits.shape[-1]
    trim()
    return digest


def _logits_of(manifest: Manifest) -> TensorSpec | None:
    """The first graph output that is not a cache."""
    return next(iter(manifest.free_outputs), None)


def _are_ids(prompt: object) -> TypeGuard[Sequence[int]]:
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, str | bytes):
        return False
    return all(isinstance(token, int | np.integer) for token in prompt)


def _not_a_prompt(prompt: object) -> ConfigError:
    return ConfigError(f"A prompt must be a text or a sequence of token ids, not {prompt!r:.80}.")
