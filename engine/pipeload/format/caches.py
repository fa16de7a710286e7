"""KV caches that shards write in place: `[batch, heads, tokens, size]`, with room behind the tokens present."""

from __future__ import annotations

from pipeload.errors import ConfigError
from pipeload.format.manifest import Cache, Manifest, symbols

__all__ = ["can_be_cut", "growth", "length_input", "past_symbols"]


def length_input(manifest: Manifest) -> tuple[str, int]:
    """A graph input and its axis whose length is that of the cached and the new tokens together."""
    _, grown = growth(manifest)
    return next(
        (spec.name, axis)
        for spec in manifest.free_inputs
        for axis, dim in enumerate(spec.shape)
        if sorted(symbols(dim)) == sorted(symbols(grown))
    )


def growth(manifest: Manifest) -> tuple[int, int | str]:
    """The axis of a cache along which its tokens lie, and the dimension that gives their number after a pass.

    Raises:
        ConfigError: the model's caches do not grow.
    """
    found = _growth(manifest, manifest.caches[0])
    if found is None:
        raise ConfigError(f"Cache '{manifest.caches[0].input}' does not grow, so the model cannot decode step by step.")
    return found


def can_be_cut(manifest: Manifest) -> bool:
    """Whether all caches kept between steps grow by the tokens of a step, along the same axis."""
    return len({_growth(manifest, cache) for cache in manifest.caches} | {None}) == 2


def _growth(manifest: Manifest, cache: Cache) -> tuple[int, int | str] | None:
    before = next(spec.shape for spec in manifest.inputs if spec.name == cache.input)
    after = next(spec.shape for spec in manifest.outputs if spec.name == cache.output)
    pairs = enumerate(zip(before, after, strict=True))
    return next(((axis, grown) for axis, (dim, grown) in pairs if dim != grown), None)


def past_symbols(manifest: Manifest) -> set[str]:
    """Symbols of the cached tokens: those of the caches that no other input has as a dimension of its own."""
    caches = [spec for spec in manifest.inputs if spec.name in manifest.cache_inputs]
    fed = {dim for spec in manifest.free_inputs for dim in spec.shape}
    return {symbol for spec in caches for dim in spec.shape for symbol in symbols(dim)} - fed
