"""One vector for each text, out of one vector for each token; the modes of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError

__all__ = ["normalized", "pool"]

Floats = NDArray[np.float32]
Mask = NDArray[np.int64]


def pool(tokens: Floats, mask: Mask, modes: Sequence[str]) -> Floats:
    """Pool `[batch, length, hidden]` under a mask `[batch, length]`.

    Returns `[batch, hidden * len(modes)]` float32: the results of the modes side by side. Padding is ignored, and every
    row must have a token that is not padding.

    Raises:
        ConfigError: an unknown mode.
    """
    if unknown := [mode for mode in modes if mode not in _MODES]:
        raise ConfigError(f"Pooling mode '{unknown[0]}' is unknown; pipeload has {', '.join(_MODES)}.")
    return np.concatenate([_MODES[mode](tokens, mask) for mode in modes], axis=-1, dtype=np.float32)


def normalized(vectors: Floats) -> Floats:
    """The vectors `[n, hidden]` at length 1; a zero vector stays zero."""
    lengths: Floats = np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12))
    return np.divide(vectors, lengths)


def _sum(tokens: Floats, weights: Floats) -> Floats:
    # einsum instead of a product, which would be a second array as large as the hidden states.
    total: Floats = np.einsum("blh,bl->bh", tokens, weights)
    return total


def _first(tokens: Floats, mask: Mask) -> Floats:
    chosen: Floats = tokens[np.arange(len(tokens)), mask.argmax(axis=1)]
    return chosen


def _last(tokens: Floats, mask: Mask) -> Floats:
    return _first(tokens[:, ::-1], mask[:, ::-1])


def _largest(tokens: Floats, mask: Mask) -> Floats:
    largest: Floats = tokens.max(axis=1, where=mask[:, :, None] != 0, initial=-np.inf)
    return largest


def _mean(tokens: Floats, mask: Mask) -> Floats:
    weights = mask.astype(np.float32)
    total = _sum(tokens, weights)
    total /= weights.sum(axis=1, keepdims=True)
    return total


def _mean_sqrt_length(tokens: Floats, mask: Mask) -> Floats:
    weights = mask.astype(np.float32)
    total = _sum(tokens, weights)
    total /= np.sqrt(weights.sum(axis=1, keepdims=True))
    return total


def _weighted_mean(tokens: Floats, mask: Mask) -> Floats:
    return _mean(tokens, mask * np.arange(1, mask.shape[1] + 1))


_MODES: Mapping[str, Callable[[Floats, Mask], Floats]] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_length,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
