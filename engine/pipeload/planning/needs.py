"""Bytes that a pass needs beside weights, from the manifest and the sizes of its inputs. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from pipeload.format.manifest import Manifest, TensorSpec, dtype_bytes, evaluate_dim, symbols

__all__ = ["Needs", "cache_bytes", "in_arena", "pass_bytes", "pass_needs", "planning_dims", "tensor_bytes"]

_HEAP_FACTOR = 1.2
"""The heap occupies more than the tensors in it: freed pieces lie between living ones."""
_ARENA_FACTOR = 1.8
"""The same of the arena that sessions of models without caches share (`session`): 0.7 to 1.7 were seen, over sizes."""
_MAPPED_BYTES = 128 << 10
"""Tensors from this size on are given back to the system when they are freed (`memory.limit_heap`)."""
_HOLES_FACTOR, _HOLES_BYTES = 1.5, 40 * _MAPPED_BYTES
"""Fragmentation by smaller tensors: this fraction of the pass, capped at this many bytes. Their holes seldom fit the
next tensors, since addresses are rounded. SmolLM2 with prompts of 8 to 500 tokens was never above the plan with it, and
14 MB above without."""
_PINNED_FACTOR = 3
_ROUND_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Memory that a pass needs beside weights.

    Attributes:
        pass_bytes: its inputs, and all tensors that it makes.
        held_bytes: the part of `pass_bytes` that stays in use even while the shards run for other feeds.
        lent_bytes: outputs of earlier passes that the caller keeps during this one, at least.
        cache_bytes: all caches that are open while it runs.
        growth_bytes: the part of `cache_bytes` by which its own caches grow.
    """

    pass_bytes: int = 0
    held_bytes: int = 0
    lent_bytes: int = 0
    cache_bytes: int = 0
    growth_bytes: int = 0


def planning_dims(manifest: Manifest, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Sizes of the symbolic dimensions to plan for before an input was seen: batch 1, everything else 128.

    A batch is a symbol that only ever is the first dimension of an input.
    """
    later = {part for spec in manifest.inputs for dim in spec.shape[1:] for part in symbols(dim)}
    dims = {symbol: (128 if symbol in later else 1) for symbol in manifest.dims}
    # Caches start empty; the memory for their growth is reserved when they grow.
    cached = manifest.cache_inputs
    fed = {p for spec in manifest.inputs if spec.name not in cached for d in spec.shape for p in symbols(d) if p == d}
    return dims | {symbol: 0 for symbol in dims if cached and symbol not in fed} | dict(sizes or {})


def in_arena(manifest: Manifest) -> bool:
    """Whether activations lie in the arena that sessions share, and not on the heap.

    Caches grow with every pass: no piece of an arena would fit them twice.
    """
    return not manifest.caches


def pass_bytes(manifest: Manifest, dims: Mapping[str, int], *, positions: int | None = None) -> int:
    """Bytes that one pass needs beside weights and caches: its inputs, and the peak of all the tensors that it makes.

    Args:
        manifest: the model.
        dims: sizes of the symbolic dimensions.
        positions: of a step that decodes: the head runs for this many of the last positions. None for a whole pass,
            whose caches are inputs and outputs as all others are.
    """
    return pass_needs(manifest, dims, positions=positions)[0]


def pass_needs(
    manifest: Manifest, dims: Mapping[str, int], *, positions: int | None = None, top: bool = False
) -> tuple[int, int]:
    """`pass_bytes`, and the part of it that is in use all through a pass: inputs, outputs and edges.

    With `top`, only the largest logits of a cut head are kept.
    """
    decodes = positions is not None
    sizes = {spec.name: tensor_bytes(spec, dims) for spec in (*manifest.edges, *manifest.inputs, *manifest.outputs)}
    kept = {spec.name for spec in manifest.outputs}
    cache_names = {name for cache in manifest.caches for name in (cache.input, cache.output)}
    last_use = {name: i for i, shard in enumerate(manifest.shards) for name in shard.inputs}
    alive: dict[str, int] = {}
    peak = held = 0
    head = set(manifest.head.shards) if manifest.head else set()
    head_dims = {**dims, **dict.fromkeys(_position_symbols(manifest), positions)} if positions is not None else dims
    for i, shard in enumerate(manifest.shards):
        for lookup in shard.lookups:
            alive[lookup.output] = sizes.get(lookup.output, 0)
        shard_dims = head_dims if shard.name in head else dims
        peak = max(peak, sum(alive.values()) + manifest.structures[shard.structure].activation_bytes(shard_dims))
        for name in shard.outputs:
            if name not in cache_names or not decodes:
                alive[name] = 0 if shard.name in head else sizes.get(name, 0)
        for name in [name for name in alive if name not in kept and last_use.get(name, -1) <= i]:
            del alive[name]
        held = max(held, sum(alive.values()))
    if manifest.head and not top:
        # The slices, and the output that they are joined to.
        spec = next(spec for spec in manifest.outputs if spec.name == manifest.head.output)
        peak += 2 * tensor_bytes(spec, head_dims)
    if in_arena(manifest):
        # The caller gets a copy.
        needed = int(peak * _ARENA_FACTOR) + sum(sizes[name] for name in kept)
    else:
        # Small outputs that stay lie between the pieces that come and go, and keep these from being given back.
        small = {name for name in kept if sizes[name] < _MAPPED_BYTES}
        pinned = _PINNED_FACTOR * sum(sizes[name] for name in small if name not in cache_names or not decodes)
        if decodes:
            # A step's new caches are counted apart; those in place are not made in it.
            pinned += sum(
                sizes[cache.output] for cache in manifest.caches if cache.output in small and not cache.in_place
            )
        needed = int((peak + pinned) * _HEAP_FACTOR) + min(int(peak * _HOLES_FACTOR), _HOLES_BYTES)
    # The caller's arrays. Caches that the engine keeps itself are counted by `cache_bytes`.
    passed = sum(sizes[spec.name] for spec in manifest.inputs if spec.name not in cache_names or not decodes)
    # In whole steps, so that the plan changes seldom while a text grows token by token.
    return -(-(needed + passed) // _ROUND_BYTES) * _ROUND_BYTES, int(held * _HEAP_FACTOR) + passed


def cache_bytes(manifest: Manifest, dims: Mapping[str, int]) -> int:
    """Bytes of all caches after a pass over inputs of these sizes; twice where a pass makes new ones from the old."""
    outputs = {spec.name: spec for spec in manifest.outputs}
    return sum((2 - cache.in_place) * tensor_bytes(outputs[cache.output], dims) for cache in manifest.caches)


def tensor_bytes(spec: TensorSpec, dims: Mapping[str, int]) -> int:
    """Bytes of a tensor of these sizes; 0 when its shape is not known."""
    try:
        return prod(evaluate_dim(dim, dims) for dim in spec.shape) * dtype_bytes(spec.dtype) if spec.shape else 0
    except KeyError:
        return 0


def _position_symbols(manifest: Manifest) -> set[str]:
    """Symbols of the last dimension but one of the head's input: the positions."""
    if manifest.head is None:
        return set()
    spec = next((edge for edge in manifest.edges if edge.name == manifest.head.input), None)
    return set(symbols(spec.shape[-2])) if spec and len(spec.shape) >= 2 else set()
