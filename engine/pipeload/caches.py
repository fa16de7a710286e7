"""KV caches that shards write in place: `[batch, heads, tokens, size]`, with room behind the tokens that are there."""

from __future__ import annotations

import mmap
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError
from pipeload.manifest import LENGTH_AXIS, Cache, Manifest, symbols

__all__ = ["can_be_cut", "growth", "length_input", "with_room"]


def length_input(manifest: Manifest) -> tuple[str, int]:
    """A graph input, and its axis, that is as long as the cached tokens and the new ones together."""
    cached = {cache.input for cache in manifest.caches}
    _, grown = growth(manifest)
    return next(
        (spec.name, axis)
        for spec in manifest.inputs
        for axis, dim in enumerate(spec.shape)
        if spec.name not in cached and sorted(symbols(dim)) == sorted(symbols(grown))
    )


def growth(manifest: Manifest) -> tuple[int, int | str]:
    """The axis of a cache along which its tokens lie, and the dimension that says how many those are after a pass.

    Raises:
        ConfigError: the model's caches do not grow.
    """
    found = _growth(manifest, manifest.caches[0])
    if found is None:
        raise ConfigError(f"Cache '{manifest.caches[0].input}' does not grow, so the model cannot decode step by step.")
    return found


def can_be_cut(manifest: Manifest) -> bool:
    """Whether everything that is kept between steps grows by the tokens of a step, along the same axis."""
    return len({_growth(manifest, cache) for cache in manifest.caches} | {None}) == 2


def _growth(manifest: Manifest, cache: Cache) -> tuple[int, int | str] | None:
    before = next(spec.shape for spec in manifest.inputs if spec.name == cache.input)
    after = next(spec.shape for spec in manifest.outputs if spec.name == cache.output)
    pairs = enumerate(zip(before, after, strict=True))
    return next(((axis, grown) for axis, (dim, grown) in pairs if dim != grown), None)


def with_room(cache: NDArray[Any], tokens: int) -> NDArray[Any]:
    """The cache, or a copy of it with room for so many tokens."""
    held = cache.shape[LENGTH_AXIS]
    if held >= tokens:
        return cache
    larger = _zeros((*cache.shape[:LENGTH_AXIS], tokens, *cache.shape[LENGTH_AXIS + 1 :]), cache.dtype)
    larger[:, :, :held] = cache
    return larger


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros, since whatever a mask of minus infinity hides must at least be a number; in pages of their own.

    On the heap they would lie between activations that come and go, and keep these from being given back.
    """
    memory = mmap.mmap(-1, max(prod(shape) * dtype.itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype, prod(shape)).reshape(shape)
