"""The last logits of a decoder, from slices of the vocabulary that arrive one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RunningTop", "TopLogits"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopLogits:
    """The largest logits of one position, without the rest.

    Attributes:
        token_ids: the tokens of these logits, ascending, int64 `[tokens]`.
        logits: float32 `[tokens]`.
        log_total: the logarithm of the sum of all exponentiated logits, which a log-probability needs.
    """

    token_ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    log_total: float


class RunningTop:
    """Keeps the largest logits of all slices, and the sum over all logits.

    Args:
        top: logits to keep for each position, plus any that equal the smallest of them.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._seen = 0
        self._made: list[list[TopLogits]] | None = None

    def push(self, logits: NDArray[Any]) -> None:
        """Take the next slice, `[batch, positions, tokens]`."""
        # One position at a time: the temporary arrays are then hardly larger than its logits.
        made = [[_top(row, self._top, self._seen) for row in sequence] for sequence in logits]
        self._seen += logits.shape[-1]
        if self._made is not None:
            made = [
                [_joined(one, other, self._top) for one, other in zip(before, new, strict=True)]
                for before, new in zip(self._made, made, strict=True)
            ]
        self._made = made

    @property
    def result(self) -> Sequence[Sequence[TopLogits]]:
        """The positions of each sequence, from all slices so far; at least one slice must have come."""
        assert self._made is not None
        return self._made


def _top(row: NDArray[Any], top: int, first_token: int) -> TopLogits:
    row = row.astype(np.float32, copy=False)
    places = _largest(row, top)
    peak = row.max()
    with np.errstate(invalid="ignore"):
        shifted = row - peak
        total = np.log(np.exp(shifted, out=shifted).sum(dtype=np.float64)) + peak
    return TopLogits(token_ids=places + first_token, logits=row[places], log_total=float(total))


def _joined(one: TopLogits, other: TopLogits, top: int) -> TopLogits:
    logits = np.concatenate([one.logits, other.logits])
    token_ids = np.concatenate([one.token_ids, other.token_ids])
    places = _largest(logits, top)
    with np.errstate(invalid="ignore"):
        total = float(np.logaddexp(one.log_total, other.log_total))
    return TopLogits(token_ids=token_ids[places], logits=logits[places], log_total=total)


def _largest(row: NDArray[np.float32], top: int) -> NDArray[np.int64]:
    """Places of the largest values, ascending. NaN counts as one of them: it must not get lost."""
    if top >= row.size:
        return np.arange(row.size)
    last = row.max() if top == 1 else np.partition(row, row.size - top)[row.size - top]
    return np.flatnonzero(~(row < last))
