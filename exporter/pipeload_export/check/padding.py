"""Whether a model answers for a text that is padded on the left as it does for the text alone.

Positions may come from the mask, or only distances between tokens may count (rotary tables, ALiBi): padding then
changes nothing. Or they are counted from the first column, or kernels take the mask as a number of tokens (a mask of
one dimension, GroupQueryAttention), and all answers change. Nothing in a graph says which, so a text is tried in both
ways; where there are caches, so is a token behind it. How positions are counted is in the graphs, and not in the
weights: one shard of each kind is run, so that a large model takes little longer than a small one.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        text = _Text(manifest, index_limits(manifest, directory).get("input_ids", 2))
        made = run_shards(directory, manifest, text.cases(0, _PADDING + _TEXT), progress, sampled=True)
        if not _answers_agree(manifest, *made):
            return False
        if not manifest.caches:
            return True
        behind = text.cases(_PADDING + _TEXT, _PADDING + _TEXT + 1, caches=made)
        return _answers_agree(manifest, *run_shards(directory, manifest, behind, progress, sampled=True))
    except (ConfigError, ExportError):
        return False


def _answers_agree(manifest: Manifest, batch: Arrays, alone: Arrays) -> bool:
    return all(_agree(batch[spec.name], alone[spec.name]) for spec in manifest.free_outputs)


def _agree(batch: NDArray[Any], alone: NDArray[Any]) -> bool:
    found = batch[-1:]
    if alone.ndim > 1 and found.shape[1] == alone.shape[1] + _PADDING:
        found = found[:, _PADDING:]
    if found.shape != alone.shape:
        return True  # not by text and token: nothing to compare
    difference = np.abs(found.astype(np.float64) - alone).max(initial=0)
    return bool(difference <= _LIMIT * np.abs(alone).max(initial=0))


class _Text:
    """A seeded text as the second one of a batch, padded on the left, and alone."""

    def __init__(self, manifest: Manifest, vocabulary: int) -> None:
        self._manifest = manifest
        columns = _PADDING + _TEXT + 1
        self._tokens = np.random.default_rng(_SEED).integers(0, vocabulary, (2, columns))
        self._tokens[1, :_PADDING] = 0
        self._mask = np.ones_like(self._tokens)
        self._mask[1, :_PADDING] = 0
        self._positions = np.where(self._mask == 0, 1, self._mask.cumsum(axis=-1) - 1)

    def cases(self, past: int, end: int, caches: Sequence[Arrays] = ()) -> list[Case]:
        """The batch and the text alone: the columns from `past` to `end`, behind the caches that those before made."""
        found = []
        for number, (rows, begin) in enumerate(((slice(0, 2), 0), (slice(1, 2), _PADDING))):
            new = rows, slice(max(begin, past), end)
            texts = {
                "input_ids": self._tokens[new],
                "attention_mask": self._mask[rows, begin:end],
                "position_ids": self._positions[new],
                "token_type_ids": np.zeros_like(self._tokens[new]),
            }
            given = as_taken(self._manifest, texts)
            if caches:
                # Keys hold their positions: made-up ones would stand at other distances in the batch than alone.
                given |= {cache.input: caches[number][cache.output] for cache in self._manifest.caches}
            arrays, _ = GraphInputs(self._manifest).check(given)
            found.append(Case(name=f"padding of {_PADDING - begin} after {past}", inputs=arrays))
        return found
