"""The inputs that the source and the streamed model both answer: on both sides of every length that may matter.

Long ones cost time and memory: a length is left out when it takes more than an export may spend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.format.manifest import Manifest
from pipeload_export.check.boundaries import boundaries
from pipeload_export.check.cases import ENCODER, Sizes, as_taken, end_texts, index_limits, sample_cases
from pipeload_export.source.folder import read_json

__all__ = ["Prompt", "Question", "Questionnaire", "affordable_tokens", "questionnaire"]

_SEED = 20241128
_TEXT = {
    *("input_ids", "attention_mask", "token_type_ids", "position_ids"),
    *("decoder_input_ids", "decoder_attention_mask"),
}
_MOST_TOKENS = 1100
_MOST_BYTES = 256 << 20
"""Of the attention's scores, of which an eager model holds about three sets, and of the logits of a case."""
_MOST_OPERATIONS = 3 * 10**11
"""Multiplications of all cases together: some ten seconds on a small machine."""
_NEW_TOKENS, _FEW_NEW_TOKENS, _LARGE_BYTES = 32, 8, 4 << 30
"""Greedy tokens, and those of models for which each takes seconds."""
_MOST_PROMPTS = 4
_PIECES = 256
"""The engine cuts longer prompts into pieces of this many tokens."""
_FEWEST_IDS = 2
"""Rows of a table whose size nothing tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Inputs of one pass.

    Attributes:
        name: sizes and padding, for messages.
        length: tokens of its longest text; 0 where there is no text.
        inputs: an array for each graph input that is no cache.
    """

    name: str
    length: int
    inputs: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Texts that are continued greedily, `[batch, length]`."""

    name: str
    ids: NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Questionnaire:
    """Everything that is asked.

    Attributes:
        questions: the shortest first.
        prompts: for decoders.
        new_tokens: tokens that follow each prompt.
        boundaries: lengths at which the model may begin to compute something else, and their keys in the config.
    """

    questions: tuple[Question, ...]
    prompts: tuple[Prompt, ...]
    new_tokens: int
    boundaries: Mapping[int, str]


def questionnaire(manifest: Manifest, directory: Path, *, weight_bytes: int, positions: int | None) -> Questionnaire:
    """Seeded questions that suit a model.

    Args:
        manifest: the model.
        directory: where it lies, with its config.
        weight_bytes: size of its weights in float32.
        positions: the most tokens, prompt and answer together, that the engine generates; None without a limit.
    """
    free = {spec.name for spec in manifest.free_inputs}
    if "input_ids" not in free or not free <= _TEXT:
        # Cases with filled caches have no counterpart in the source.
        cases = [case for case in sample_cases(manifest, directory) if not _past(manifest, case.inputs)]
        questions = tuple(
            Question(name=case.name, length=0, inputs={name: case.inputs[name] for name in sorted(free)})
            for case in cases
        )
        return Questionnaire(questions=questions, prompts=(), new_tokens=0, boundaries={})
    config = read_json(directory / "config.json")
    known = boundaries(config)
    longest = _longest(manifest, config)
    limits = dict(index_limits(manifest, directory))
    # A table that the graph computes, as of quantised weights, has no rows that could be counted.
    vocabulary = config.get("vocab_size")
    rows = vocabulary if isinstance(vocabulary, int) and vocabulary > 0 else _FEWEST_IDS
    limits = {"input_ids": rows, "decoder_input_ids": rows} | limits
    sizes = sorted(set(_affordable(known, longest, weight_bytes)), key=lambda one: (one.length, one.batch, one.padding))
    padding_id = config.get("pad_token_id")
    if not isinstance(padding_id, int) or padding_id < 0:
        padding_id = None
    # Some classifiers look for the end of each text.
    end_id = None if manifest.task == "text-generation" else config.get("eos_token_id")
    if isinstance(end_id, list):
        end_id = end_id[0] if end_id else None
    questions = tuple(
        Question(
            name=one.name,
            length=one.length,
            inputs=_inputs(manifest, limits, padding_id, end_id, one, np.random.default_rng([_SEED, number])),
        )
        for number, one in enumerate(sizes)
    )
    new_tokens = _NEW_TOKENS if weight_bytes < _LARGE_BYTES else _FEW_NEW_TOKENS
    prompts: list[Prompt] = []
    if manifest.task == "text-generation" and manifest.caches:
        most = min(longest, positions or longest)
        new_tokens = max(1, min(new_tokens, most - 1))
        reached = [length for length in known if length <= most]
        near = [6, *(length - new_tokens // 2 for length in (*reached, _PIECES + 50))]
        wanted = dict.fromkeys(max(1, min(length, most - new_tokens)) for length in near if length > 0)
        fit = [length for length in wanted if length + new_tokens <= most]
        for number, length in enumerate(fit[: _MOST_PROMPTS if weight_bytes < _LARGE_BYTES else 1]):
            batch = 1 if number else 2
            ids = _ids((batch, length), limits["input_ids"], padding_id, np.random.default_rng([_SEED, 1, number]))
            prompts.append(Prompt(name=f"{new_tokens} tokens after {batch} x {length}", ids=ids))
    return Questionnaire(questions=questions, prompts=tuple(prompts), new_tokens=new_tokens, boundaries=known)


def affordable_tokens(manifest: Manifest, config: Mapping[str, Any], weight_bytes: int) -> int:
    """The most tokens of one text that an export may spend time and memory on."""
    return min(_longest(manifest, config), _MOST_OPERATIONS // (weight_bytes // 4 + 1))


def _past(manifest: Manifest, inputs: Mapping[str, NDArray[Any]]) -> bool:
    return any(inputs[cache.input].size for cache in manifest.caches)


def _longest(manifest: Manifest, config: Mapping[str, Any]) -> int:
    """The most tokens of a text whose attention scores and logits fit into bounded memory."""
    heads = next((config[key] for key in ("num_attention_heads", "n_head", "num_heads") if config.get(key)), 16)
    heads = heads if isinstance(heads, int) else 16
    widest = max((dim for spec in manifest.free_outputs for dim in spec.shape[-1:] if isinstance(dim, int)), default=1)
    return min(_MOST_TOKENS, isqrt(_MOST_BYTES // (3 * 4 * heads)), _MOST_BYTES // (4 * widest))


def _affordable(known: Mapping[int, str], longest: int, weight_bytes: int) -> Iterator[Sizes]:
    """Sizes on both sides of each boundary, until they have cost enough."""
    yield from ENCODER
    spent = 0
    wanted = [size for boundary in known for size in _around(boundary)]
    for size in (*wanted, Sizes(batch=1, length=_PIECES + 44)):
        cost = size.batch * size.length * (weight_bytes // 4 + 1)
        if size.length <= longest and spent + cost <= _MOST_OPERATIONS:
            spent += cost
            yield size


def _around(boundary: int) -> Iterator[Sizes]:
    yield Sizes(batch=1, length=boundary + 1)
    yield Sizes(batch=1, length=boundary)
    yield Sizes(batch=1, length=boundary + boundary // 2 + 1)
    # Tables of positions that begin after padding have two rows less.
    yield Sizes(batch=1, length=max(boundary - 2, 1))
    for padding in ("left", "right"):
        yield Sizes(batch=2, length=boundary + 1, padding=padding)


def _inputs(
    manifest: Manifest,
    limits: Mapping[str, int],
    padding_id: object,
    end_id: object,
    sizes: Sizes,
    random: np.random.Generator,
) -> dict[str, NDArray[Any]]:
    shape = (sizes.batch, sizes.length)
    mask = np.ones(shape, np.int64)
    if sizes.padding:
        # The last text of the batch is shorter by a third.
        short = sizes.length // 3
        mask[-1, slice(short) if sizes.padding == "left" else slice(sizes.length - short, None)] = 0
    limit = limits["input_ids"]
    ids = _ids(shape, limit, padding_id, random)
    if isinstance(end_id, int) and 0 <= end_id < limit:
        others = [one for one in range(min(3, limit)) if one not in (end_id, padding_id)]
        end_texts(ids, mask, end_id, others[0] if others else end_id)
    if isinstance(padding_id, int):
        ids[mask == 0] = padding_id
    types = random.integers(0, limits.get("token_type_ids", 1), shape)
    made = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": types,
        "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0),
        "decoder_attention_mask": mask,
    }
    if any(spec.name == "decoder_input_ids" for spec in manifest.free_inputs):
        made["decoder_input_ids"] = _ids(shape, limits["decoder_input_ids"], padding_id, random)
    return as_taken(manifest, made)


def _ids(shape: tuple[int, int], limit: int, padding_id: object, random: np.random.Generator) -> NDArray[Any]:
    ids = random.integers(0, limit, shape)
    # A padding token inside of a text has a meaning of its own for some models.
    return np.where(ids == padding_id, (ids + 1) % limit, ids) if isinstance(padding_id, int) else ids
