"""KV caches that shards write in place: `[batch, heads, tokens, size]`, with room behind the tokens present."""

from __future__ import annotations

from typing import TypeAlias

from pipeload.errors import ConfigError
from pipeload.format.manifest import Cache, Manifest, symbols

__all__ = ["Shape", "can_be_cut", "growth", "grown_axis", "length_input", "past_symbols"]

Shape: TypeAlias = tuple[int | str, ...]


def length_input(manifest: Manifest) -> tuple[str, int]:
    """A graph input and its axis whose length is that of the cached and the new tokens together.

    Raises:
        ConfigError: the model has no such input.
    """
    _, grown = growth(manifest)
    for spec in manifest.free_inputs:
        for axis, dim in enumerate(spec.shape):
            if sorted(symbols(dim)) == sorted(symbols(grown)):
                return spec.name, axis
    raise ConfigError(f"No input of the model is {grown} long, as its caches are after a pass. Export it again.")


def growth(manifest: Manifest) -> tuple[int, int | str]:
    """The axis of a cache along which its tokens lie, and the dimension that gives their number after a pass.

    Raises:
        ConfigError: none of the model's caches grows.
    """
    found = next((grown for cache in manifest.caches if (grown := _growth(manifest, cache))), None)
    if found is None:
        raise ConfigError(
            f"Cache '{manifest.caches[0].input}' does not grow, and no other one does, so the model cannot decode step "
            "by step. Export it again."
        )
    return found


def can_be_cut(manifest: Manifest) -> bool:
    """Whether all caches kept between steps grow by the tokens of a step, along the same axis."""
    found = {_growth(manifest, cache) for cache in manifest.caches}
    return len(found) == 1 and None not in found


def grown_axis(before: Shape, after: Shape) -> int | None:
    """The only axis along which a cache has another length after a pass than before; None if there is no such one."""
    if len(before) != len(after):
        return None
    changed = [axis for axis, (dim, grown) in enumerate(zip(before, after, strict=True)) if dim != grown]
    return changed[0] if len(changed) == 1 and symbols(after[changed[0]]) else None


def _growth(manifest: Manifest, cache: Cache) -> tuple[int, int | str] | None:
    before = next(spec.shape for spec in manifest.inputs if spec.name == cache.input)
    after = next(spec.shape for spec in manifest.outputs if spec.name == cache.output)
    axis = grown_axis(before, after)
    return None if axis is None else (axis, after[axis])


def past_symbols(manifest: Manifest) -> set[str]:
    """Symbols of the cached tokens: those of the caches that no other input has as a dimension of its own."""
    cached = manifest.cache_inputs
    caches = [spec for spec in manifest.inputs if spec.name in cached]
    fed = {dim for spec in manifest.free_inputs for dim in spec.shape}
    return {symbol for spec in caches for dim in spec.shape for symbol in symbols(dim)} - fed
