"""KV caches that shards write in place, in memory of their own with room for more tokens."""

from __future__ import annotations

import mmap
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.format.manifest import LENGTH_AXIS

__all__ = ["with_room", "zeros"]


def with_room(cache: NDArray[Any], tokens: int) -> NDArray[Any]:
    """The cache, or a copy of it with room for this many tokens."""
    held = cache.shape[LENGTH_AXIS]
    if held >= tokens:
        return cache
    larger = zeros((*cache.shape[:LENGTH_AXIS], tokens, *cache.shape[LENGTH_AXIS + 1 :]), cache.dtype)
    larger[:, :, :held] = cache
    return larger


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros in pages of their own: values hidden by a mask of minus infinity must still be numbers.

    On the heap they would lie between short-lived activations, and keep freed memory from going back to the system.
    """
    memory = mmap.mmap(-1, max(prod(shape) * dtype.itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype, prod(shape)).reshape(shape)
