"""Whether a decoder that takes no positions answers for a text padded on the left as it does for the text alone.

Where the graph counts positions itself, it may do so from the mask, or need only distances between tokens (rotary
tables, ALiBi): padding then changes nothing. Or it counts from the first column, padding included, and all answers
change. Nothing in the graph says which, so a text is tried in both ways, and a token after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.format.manifest import Manifest
from pipeload.inputs import GraphInputs
from pipeload.notify import Notify
from pipeload_export.check.cases import Case
from pipeload_export.check.chain import run_shards

__all__ = ["takes_left_padding"]

_SEED = 20261128
_TEXT, _PADDING = 6, 3
_LIMIT = 2e-3
"""Of the range of the logits: above the rounding of half floats and int8 caches, far below a shift of positions."""


def takes_left_padding(directory: Path, manifest: Manifest, progress: Notify) -> bool:
    """Try it; False for a model that takes positions, or is no decoder of texts.

    Args:
        directory: the sharded model directory.
        manifest: its manifest.
        progress: as for `run_shards`.

    Raises:
        ExportError: a shard does not run.
    """
    free = {spec.name: spec for spec in manifest.free_inputs}
    logits = next(iter(manifest.free_outputs), None)
    if not manifest.caches or not {"input_ids", "attention_mask"} <= free.keys() <= {
        "input_ids",
        "attention_mask",
        "token_type_ids",
    }:
        return False
    if logits is None or len(logits.shape) != 3 or not isinstance(logits.shape[-1], int):
        return False
    tokens = np.random.default_rng(_SEED).integers(0, logits.shape[-1], (2, _PADDING + _TEXT + 1))
    tokens[1, :_PADDING] = 0
    mask = np.ones_like(tokens)
    mask[1, :_PADDING] = 0
    ways = [(tokens, mask), (tokens[1:, _PADDING:], mask[1:, _PADDING:])]
    caches: list[Mapping[str, NDArray[Any]]] = [{}, {}]
    for begin, end in ((0, -1), (-1, None)):
        cases = [
            _case(manifest, ids[:, begin:end], shown[:, :end], before)
            for (ids, shown), before in zip(ways, caches, strict=True)
        ]
        batch, alone = run_shards(directory, manifest, cases, progress)
        wanted, found = (made[logits.name][-1, -1].astype(np.float64) for made in (alone, batch))
        if not np.abs(found - wanted).max() <= _LIMIT * np.abs(wanted).max():
            return False
        caches = [{cache.input: made[cache.output] for cache in manifest.caches} for made in (batch, alone)]
    return True


def _case(manifest: Manifest, ids: NDArray[Any], mask: NDArray[Any], caches: Mapping[str, NDArray[Any]]) -> Case:
    texts = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    given = {s.name: texts[s.name].astype(s.dtype) for s in manifest.free_inputs}
    arrays, _ = GraphInputs(manifest).check({**given, **caches})
    return Case(name=f"{len(ids)} x {ids.shape[1]}", inputs=arrays)
