"""The last logits of a decoder, from slices of the vocabulary that come one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RunningTop", "TopLogits"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopLogits:
    """The largest logits of each position, without the other ones.

    Attributes:
        token_ids: whose logits they are, ascending, int64 `[batch, positions, top]`.
        logits: float32 `[batch, positions, top]`.
        log_total: the logarithm of the sum of all exponentiated logits, which a log-probability needs, float64
            `[batch, positions]`.
    """

    token_ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    log_total: NDArray[np.float64]


class RunningTop:
    """Keeps the largest logits of all slices, and the sum of all of them.

    Args:
        top: how many to keep for each position; of equal ones, those of the first tokens.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._seen = 0
        self._made: TopLogits | None = None

    def push(self, logits: NDArray[Any]) -> None:
        """Take the next slice, `[batch, positions, tokens]`."""
        logits = logits.astype(np.float32, copy=False)
        ids = _places_of_largest(logits, self._top)
        largest = np.take_along_axis(logits, ids, axis=-1)
        ids, total = ids + self._seen, _log_total(logits)
        self._seen += logits.shape[-1]
        if (before := self._made) is not None:
            largest = np.concatenate([before.logits, largest], axis=-1)
            ids = np.concatenate([before.token_ids, ids], axis=-1)
            with np.errstate(invalid="ignore"):
                total = np.logaddexp(before.log_total, total)
            kept = _places_of_largest(largest, self._top)
            largest, ids = np.take_along_axis(largest, kept, axis=-1), np.take_along_axis(ids, kept, axis=-1)
        self._made = TopLogits(token_ids=ids, logits=largest, log_total=total)

    @property
    def result(self) -> TopLogits:
        """Of all slices so far, one at least."""
        assert self._made is not None
        return self._made


def _places_of_largest(logits: NDArray[np.float32], top: int) -> NDArray[np.int64]:
    """Indices of the largest in each row, ascending; a NaN counts as the largest."""
    if top == 1:
        first: NDArray[np.int64] = logits.argmax(axis=-1, keepdims=True)
        return first
    size = logits.shape[-1]
    if top >= size:
        return np.broadcast_to(np.arange(size), logits.shape)
    logits = np.where(np.isnan(logits), np.float32(np.inf), logits)
    last = np.partition(logits, size - top, axis=-1)[..., size - top, None]
    # All above the last one, and as many of those that equal it as there is room for.
    above, equal = logits > last, logits == last
    room = top - above.sum(axis=-1, keepdims=True)
    kept = above | (equal & (equal.cumsum(axis=-1) <= room))
    return np.nonzero(kept)[-1].reshape(*logits.shape[:-1], top)


def _log_total(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    peak = logits.max(axis=-1, keepdims=True).astype(np.float64)
    with np.errstate(invalid="ignore"):
        total: NDArray[np.float64] = np.log(np.exp(logits - peak).sum(axis=-1)) + peak[..., 0]
    return total
