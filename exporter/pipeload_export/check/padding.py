"""Whether a model answers for a text that is padded on the left as it does for the text alone.

Positions may come from the mask, or only distances between tokens may count (rotary tables, ALiBi): padding then
changes nothing. Or they are counted from the first column, or kernels take the mask as a number of tokens (a mask of
one dimension, GroupQueryAttention), and all answers change. Nothing in a graph says which, so a text is tried in both
ways; where there are caches, so is a token behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError, ExportError
from pipeload.format.manifest import Manifest, symbols
from pipeload.inputs import GraphInputs
from pipeload.notify import Notify
from pipeload_export.check.cases import Case, as_taken, index_limits
from pipeload_export.check.chain import run_shards

__all__ = ["takes_left_padding"]

_SEED = 20261128
_TEXT, _PADDING = 6, 3
_LIMIT = 2e-3
"""Of the range of an output: above the rounding of half floats and int8 caches, far below a shift of positions."""

Arrays = dict[str, NDArray[Any]]


def takes_left_padding(directory: Path, manifest: Manifest, progress: Notify) -> bool | None:
    """Try it; None for a model whose texts cannot be made up, or have no mask.

    Args:
        directory: the sharded model directory.
        manifest: its manifest.
        progress: as for `run_shards`.
    """
    free = {spec.name: spec for spec in manifest.free_inputs}
    known = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
    if not {"input_ids", "attention_mask"} <= free.keys() <= known or not all(map(symbols, free["input_ids"].shape)):
        return None
    if any(spec.dtype == "bfloat16" for spec in manifest.inputs):
        return None  # NumPy has no such numbers
    try:
        cases = [*_cases(manifest, index_limits(manifest, directory).get("input_ids", 2))]
        made = run_shards(directory, manifest, cases, progress)
    except (ConfigError, ExportError):
        return False
    names = [spec.name for spec in manifest.free_outputs]
    return all(
        _agree(batch[name], alone[name]) for batch, alone in zip(made[::2], made[1::2], strict=True) for name in names
    )


def _agree(batch: NDArray[Any], alone: NDArray[Any]) -> bool:
    found = batch[-1:]
    if alone.ndim > 1 and found.shape[1] == alone.shape[1] + _PADDING:
        found = found[:, _PADDING:]
    if found.shape != alone.shape:
        return True  # not by text and token: nothing to compare
    difference = np.abs(found.astype(np.float64) - alone).max(initial=0)
    return bool(difference <= _LIMIT * np.abs(alone).max(initial=0))


def _cases(manifest: Manifest, vocabulary: int) -> Iterator[Case]:
    """A text in a batch, then alone; the same for a token behind cached ones."""
    random = np.random.default_rng(_SEED)
    tokens = random.integers(0, vocabulary, (2, _PADDING + _TEXT + 1))
    tokens[1, :_PADDING] = 0
    mask = np.ones_like(tokens)
    mask[1, :_PADDING] = 0
    positions = np.where(mask == 0, 1, mask.cumsum(axis=-1) - 1)
    inputs = GraphInputs(manifest)
    for past in (0, _PADDING + _TEXT) if manifest.caches else (0,):
        caches = dict(_caches(manifest, past, random)) if past else {}
        end = past + 1 if past else _PADDING + _TEXT
        for rows, begin in ((slice(0, 2), 0), (slice(1, 2), _PADDING)):
            new = rows, slice(max(begin, past), end)
            texts = {
                "input_ids": tokens[new],
                "attention_mask": mask[rows, begin:end],
                "position_ids": positions[new],
                "token_type_ids": np.zeros_like(tokens[new]),
            }
            given = as_taken(manifest, texts)
            for spec in manifest.inputs:
                if spec.name in caches:
                    kept = [slice(begin if symbols(dim) else 0, None) for dim in spec.shape[1:]]
                    given[spec.name] = caches[spec.name][(rows, *kept)]
            arrays, _ = inputs.check(given)
            yield Case(name=f"padding of {_PADDING - begin} after {past}", inputs=arrays)


def _caches(manifest: Manifest, past: int, random: np.random.Generator) -> Iterator[tuple[str, NDArray[Any]]]:
    """Caches of two texts with this number of tokens."""
    scales = {cache.scale for cache in manifest.caches}
    for spec in manifest.inputs:
        if spec.name not in manifest.cache_inputs:
            continue
        shape = (2, *(dim if isinstance(dim, int) else past for dim in spec.shape[1:]))
        if "int" in spec.dtype:
            values: NDArray[Any] = random.integers(-127, 128, shape)
        else:
            values = random.standard_normal(shape)
        yield spec.name, (np.abs(values) / 100 if spec.name in scales else values).astype(spec.dtype)
