"""Text generation: greedy, with the KV caches kept between the steps.

```
prompts -> token ids -> left-padded batch -> step -> logits -> choose -> step -> ... -> ids -> texts
                                              '------- one pass over all blocks per token ------'
```
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeGuard, cast, overload

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError, RunError
from pipeload.tasks.batch import padded, position_ids
from pipeload.tasks.config import GenerationConfig, read_settings
from pipeload.tasks.runner import Decoder, State, config_of, free_inputs, graph_inputs
from pipeload.tasks.text import Detokenizer, Tokenizer, tokenizer_of

__all__ = ["MAX_NEW_TOKENS", "Generation", "Prompt", "Stream", "generate"]

MAX_NEW_TOKENS = 64
"""Tokens to make, unless the caller says otherwise."""

Prompt: TypeAlias = str | Sequence[int] | NDArray[np.integer]
"""A text, or its token ids."""

Stream: TypeAlias = Callable[[str], None]
"""Takes pieces of text as they come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What the model made of one prompt.

    Attributes:
        text: the new text as it follows the prompt, without special tokens; None if the prompt was token ids and
            the model has no tokenizer.
        token_ids: the new tokens, the one that ended the text included.
        prompt_tokens: how many tokens the prompt has.
        finish_reason: `eos` if the model ended the text, `length` if it reached `max_new_tokens`.
    """

    text: str | None
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: Literal["eos", "length"]


@overload
def generate(
    runner: Decoder[State], prompt: Prompt, *, max_new_tokens: int = ..., stream: Stream | None = ...
) -> Generation: ...
@overload
def generate(
    runner: Decoder[State],
    prompt: list[str] | list[list[int]],
    *,
    max_new_tokens: int = ...,
    stream: Stream | None = ...,
) -> list[Generation]: ...
def generate(
    runner: Decoder[State],
    prompt: Prompt | list[str] | list[list[int]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stream: Stream | None = None,
) -> Generation | list[Generation]:
    """Continue a prompt, or each of a list of prompts, always with the likeliest token.

    A list is run as one batch, which reads the weights once per token for all of its prompts. The model stops
    at the end-of-text tokens of `generation_config.json` or `config.json`; sampling settings there are ignored.

    Args:
        runner: a model exported for text-generation with KV caches.
        prompt: a text, its token ids, or a list of either.
        max_new_tokens: most tokens to make for each prompt.
        stream: called with each piece of new text as soon as it is known; for a single prompt.

    Raises:
        ConfigError: the model generates no text, a prompt is empty, has ids outside the vocabulary or is too
            long together with `max_new_tokens`, or texts are wanted where there is no tokenizer.
        RunError: the model computed no numbers (NaN).

    Example:
        >>> with pipeload.load("models/exported/smollm2-135m", "256MB") as model:
        ...     model.generate("The capital of France is", max_new_tokens=2).text
        ' Paris.'
    """
    _check_model(runner)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be a whole number from 1 on, not {max_new_tokens!r}.")
    prompts, single = _listed(prompt)
    if stream and not single:
        raise ConfigError("stream takes a single prompt. Pass the prompts one by one, or leave stream out.")
    tokenizer = _tokenizer(runner, required=bool(stream) or any(isinstance(p, str) for p in prompts))
    rows = [_token_ids(p, tokenizer) for p in prompts]
    _check_rows(runner, rows, max_new_tokens)
    eos = _eos_ids(runner, tokenizer)
    made: list[list[int]] = [[] for _ in rows]
    detokenizer = Detokenizer(tokenizer, rows[0]) if stream and tokenizer else None
    # Closed explicitly, so that the caches are given back at once when `stream` raises.
    with closing(_greedy(runner, rows, max_new_tokens, eos)) as steps:
        for row, token in steps:
            made[row].append(token)
            if stream and detokenizer and (piece := detokenizer.push(token)):
                stream(piece)
    if stream and detokenizer and (piece := detokenizer.flush()):
        stream(piece)
    results = [
        Generation(
            text=_continuation(tokenizer, row, new) if tokenizer else None,
            token_ids=tuple(new),
            prompt_tokens=len(row),
            finish_reason="eos" if new[-1] in eos else "length",
        )
        for row, new in zip(rows, made, strict=True)
    ]
    return results[0] if single else results


def _greedy(
    runner: Decoder[State], rows: Sequence[Sequence[int]], max_new_tokens: int, eos: frozenset[int]
) -> Generator[tuple[int, int]]:
    """Pairs of a row and its next token, until every row has ended."""
    tokens = padded(rows, fill=0, side="left")
    mask = padded([[1] * len(row) for row in rows], fill=0, side="left")
    running = set(range(len(rows)))
    with runner.new_state(tokens.shape[1] + max_new_tokens) as state:
        for _ in range(max_new_tokens):
            offered = {
                "input_ids": tokens,
                "attention_mask": mask,
                "position_ids": position_ids(mask)[:, -tokens.shape[1] :],
                "token_type_ids": np.zeros_like(tokens),
            }
            best = _likeliest(runner.step(graph_inputs(runner, offered), state))
            for row in sorted(running):
                token = int(best[row])
                yield row, token
                if token in eos:
                    running.discard(row)
            if not running:
                return
            # Rows that have ended are carried along, because the caches are one array for the whole batch.
            tokens = best[:, None]
            mask = np.concatenate([mask, np.ones_like(tokens)], axis=1)


def _continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    detokenizer = Detokenizer(tokenizer, prompt)
    return "".join(map(detokenizer.push, new)) + detokenizer.flush()


def _likeliest(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    best: NDArray[np.int64] = logits.argmax(axis=-1)
    # A NaN is the largest number to argmax, and would come out as a token like any other.
    if np.isnan(np.take_along_axis(logits, best[:, None], axis=-1)).any():
        raise RunError("The model computed NaN logits. Check the model with `pipeload verify`.")
    return best


def _listed(prompt: Prompt | Sequence[str] | Sequence[Sequence[int]]) -> tuple[list[Prompt], bool]:
    """The prompts, and whether there was only one that was not in a list."""
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, str) or _are_ids(prompt):
        return [prompt], True
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise _not_a_prompt(prompt)
    return list(cast("Sequence[Prompt]", prompt)), False


def _token_ids(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, str) and tokenizer:
        return list(tokenizer.encode(prompt).ids)
    if not _are_ids(prompt):
        raise _not_a_prompt(prompt)
    return [int(token) for token in prompt]


def _are_ids(prompt: object) -> TypeGuard[Sequence[int]]:
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, str | bytes):
        return False
    return all(isinstance(token, int | np.integer) for token in prompt)


def _not_a_prompt(prompt: object) -> ConfigError:
    return ConfigError(f"A prompt must be a text or a sequence of token ids, not {prompt!r:.80}.")


def _tokenizer(runner: Decoder[State], *, required: bool) -> Tokenizer | None:
    """The model's tokenizer. Token ids go without one, and then only the text of the answer is missing."""
    try:
        return tokenizer_of(runner)
    except ConfigError:
        if required:
            raise
        return None


def _eos_ids(runner: Decoder[State], tokenizer: Tokenizer | None) -> frozenset[int]:
    generation = read_settings(runner.directory, "generation_config.json", GenerationConfig)
    named = tokenizer.eos_id if tokenizer else None
    for ids in (generation.eos_token_id, config_of(runner).eos_token_id, named):
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def _check_model(runner: Decoder[State]) -> None:
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


def _check_rows(runner: Decoder[State], rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
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
    inputs = {spec.name for spec in free_inputs(runner.manifest)}
    if shortest < longest and (missing := {"attention_mask", "position_ids"} - inputs):
        raise ConfigError(
            f"The prompts have different lengths, and the model has no input '{min(missing)}' to tell padding "
            "from text. Pass the prompts one by one."
        )
