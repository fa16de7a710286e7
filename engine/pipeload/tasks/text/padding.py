"""Sequences of different lengths as one rectangular array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import BudgetError
from pipeload.format.manifest import Manifest
from pipeload.tasks.arguments import check_positive

__all__ = ["Side", "apart", "in_batches", "padded", "position_ids"]

Side = Literal["left", "right"]


def padded(rows: Sequence[Sequence[int]], *, fill: int, side: Side) -> NDArray[np.int64]:
    """The rows as int64 `[len(rows), longest]`, shorter ones padded on the given side."""
    longest = max(len(row) for row in rows)
    array = np.full((len(rows), longest), fill, np.int64)
    for target, row in zip(array, rows, strict=True):
        if len(row):
            target[slice(len(row)) if side == "right" else slice(-len(row), None)] = row
    return array


def position_ids(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions that count only real tokens, `[batch, length]`; 1 for padding, as in transformers."""
    return np.where(mask == 0, 1, mask.cumsum(axis=-1) - 1)


def apart(manifest: Manifest, side: Side) -> bool:
    """Whether other texts of a batch would change a text's answers."""
    return manifest.quantised_dynamically or (side == "left" and manifest.takes_left_padding is False)


def in_batches(lengths: Sequence[int], batch_size: int, run: Callable[[list[int]], None], *, alone: bool) -> None:
    """Call `run` with the indices of one batch after another, until every index had its turn.

    The longest items come first, so that a batch has little padding, and the largest batch runs first. If the memory
    budget cannot hold a batch, it and all later ones are made smaller: the refusal costs nothing, because it comes
    before any read.

    Args:
        lengths: tokens of each item.
        batch_size: the most items in a batch.
        run: runs the items of these indices.
        alone: each item is a batch of its own, since the others would change its answer.

    Raises:
        ConfigError: `batch_size` is not a positive number.
        BudgetError: not even a single item fits.
    """
    check_positive("batch_size", batch_size)
    if alone:
        batch_size = 1
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    begin = 0
    while begin < len(order):
        indices = order[begin : begin + batch_size]
        try:
            run(indices)
        except BudgetError:
            if len(indices) == 1:
                raise
            batch_size = len(indices) // 2
        else:
            begin += len(indices)
