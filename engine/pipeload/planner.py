"""manifest + profile + budget -> Plan. Pure: no I/O, no threads.

Memory of the process, from the bottom:

```
budget  ------------------------------------------------------------
        | buffers        streamed shards, one shard in each         |
        | resident       shards that stay between passes            |
        | caches         KV caches of open decode states            |
        | pass           activations, edges, outputs of one pass    |
        | runtime        onnxruntime's code and heap, once it runs  |
        | process        interpreter, libraries, the host's data    |
0       ------------------------------------------------------------
```

Resident shards are spread evenly among the streamed ones, so that reading never pauses. There is no LRU: a cyclic
scan that is larger than a cache hits nothing in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from pipeload.buffers import page_ceil
from pipeload.errors import BudgetError
from pipeload.manifest import Manifest, Shard, TensorSpec, dtype_bytes, evaluate_dim, symbols
from pipeload.memory import format_bytes
from pipeload.profile import Profile

__all__ = ["SESSION_BYTES", "Plan", "cache_bytes", "make_plan", "pass_bytes", "planning_dims"]

_RUNTIME_BYTES = 18_000_000
"""onnxruntime's code pages, thread stacks and heap, which appear with the first pass."""
SESSION_BYTES = 400_000
"""One session beside its weights: graph, kernels, thread pool."""
_HEAP_FACTOR = 1.2
"""The heap occupies more than the tensors in it: freed pieces lie between living ones."""
_SMALL_SHARE = 0.1
"""A shard below this part of the largest is made resident first: it saves a session, and costs next to nothing."""
_ROUND_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one model runs under one budget.

    Attributes:
        budget_bytes: the most memory that the whole process may use.
        loaders: number of Loading Agents.
        buffers: streamed shards that are in memory together: one runs, the others are being read or wait.
        buffer_bytes: size of each buffer; 0 when nothing is streamed.
        resident: names of the shards that stay in memory between passes.
        packed: resident shards are laid out for the CPU (prepacked); only when nothing is streamed.
        threads: intra-op threads of a session.
        process_bytes, pass_bytes, cache_bytes: see the picture above; process_bytes includes the runtime.
        streamed_bytes: weights that are read in every pass.
        peak_bytes: predicted peak of the process.
    """

    budget_bytes: int
    loaders: int
    buffers: int
    buffer_bytes: int
    resident: frozenset[str]
    packed: bool
    threads: int
    process_bytes: int
    pass_bytes: int
    cache_bytes: int
    streamed_bytes: int
    peak_bytes: int


def make_plan(
    manifest: Manifest,
    profile: Profile,
    *,
    budget_bytes: int,
    pass_bytes: int,
    cache_bytes: int = 0,
    loaders: int | None = None,
    threads: int | None = None,
) -> Plan:
    """The plan that streams the least under the budget.

    Args:
        manifest: the model.
        profile: the machine and the process.
        budget_bytes: the most memory that the whole process may use.
        pass_bytes: what one pass needs beside weights (`pass_bytes` of this module).
        cache_bytes: what open decode states need.
        loaders: number of Loading Agents; None chooses.
        threads: intra-op threads; None takes every core.

    Raises:
        BudgetError: not even one buffer for the largest shard fits.
    """
    shards = manifest.shards
    process = profile.process_bytes + _RUNTIME_BYTES
    fixed = process + pass_bytes + cache_bytes
    wanted_loaders = loaders or 2
    largest = max(shards, key=_loaded_bytes)
    free = budget_bytes - fixed

    def result(resident: Iterable[Shard], buffers: int, packed: bool) -> Plan:
        names = frozenset(shard.name for shard in resident)
        streamed = [shard for shard in shards if shard.name not in names]
        slot = max((page_ceil(shard.nbytes) for shard in streamed), default=0)
        used = sum(_loaded_bytes(s) for s in shards if s.name in names) + buffers * (slot + SESSION_BYTES)
        transient = page_ceil(largest.nbytes) if packed else 0
        return Plan(
            budget_bytes=budget_bytes,
            # Nothing waits for a second loader's shard when there is one buffer.
            loaders=max(1, min(wanted_loaders, buffers)) if streamed else min(wanted_loaders, len(shards)),
            buffers=buffers,
            buffer_bytes=slot,
            resident=names,
            packed=packed,
            threads=threads or profile.cores,
            process_bytes=process,
            pass_bytes=pass_bytes,
            cache_bytes=cache_bytes,
            streamed_bytes=sum(shard.nbytes for shard in streamed),
            peak_bytes=fixed + used + transient,
        )

    # A packed session maps its file while it packs: then the largest shard is in memory twice.
    everything = result(shards, 0, packed=True)
    if everything.peak_bytes <= budget_bytes:
        return everything
    # What memory buys, in this order: one buffer, small resident shards, a full pipeline, the other resident shards.
    # The plan is the longest part of this list that fits, so that more memory never means more reading.
    order, small = _residence_order(shards)
    full = wanted_loaders + 1
    steps = [(count, 1) for count in range(small + 1)]
    steps += [(small, buffers) for buffers in range(2, full)]
    steps += [(count, full) for count in range(small, len(shards) + 1)]
    for count, buffers in reversed(steps):
        plan = result(order[:count], min(buffers, len(shards) - count), packed=False)
        if plan.peak_bytes <= budget_bytes:
            return plan
    needed = fixed + _loaded_bytes(largest)
    needed = (needed // _ROUND_BYTES + 2) * _ROUND_BYTES
    raise BudgetError(
        f"A memory budget of {format_bytes(budget_bytes)} cannot work for this model: the smallest that can is "
        f"{format_bytes(needed)} = {format_bytes(process)} process and runtime + {format_bytes(pass_bytes)} "
        f"activations + {format_bytes(cache_bytes)} caches + the largest shard '{largest.name}' with "
        f"{format_bytes(largest.nbytes)} ({format_bytes(max(0, free))} were left for it), rounded up. Raise the "
        f"budget to at least {needed} bytes, or pass smaller inputs.",
        needed_bytes=needed,
        budget_bytes=budget_bytes,
    )


def planning_dims(manifest: Manifest, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Sizes of the symbolic dimensions to plan for before an input was seen: batch 1, everything else 128.

    A batch is a symbol that only ever is the first dimension of an input.
    """
    later = {part for spec in manifest.inputs for dim in spec.shape[1:] for part in symbols(dim)}
    dims = {symbol: (128 if symbol in later else 1) for symbol in manifest.dims}
    # Caches start empty; what they grow to is reserved when they grow.
    cached = {cache.input for cache in manifest.caches}
    fed = {p for spec in manifest.inputs if spec.name not in cached for d in spec.shape for p in symbols(d) if p == d}
    return dims | {symbol: 0 for symbol in dims if cached and symbol not in fed} | dict(sizes or {})


def pass_bytes(manifest: Manifest, dims: Mapping[str, int], *, last_position: bool = False) -> int:
    """What one pass needs beside weights and caches: its inputs, and the most that everything made takes together.

    Args:
        manifest: the model.
        dims: sizes of the symbolic dimensions.
        last_position: the head runs for one position only.
    """
    sizes = {spec.name: tensor_bytes(spec, dims) for spec in (*manifest.edges, *manifest.inputs, *manifest.outputs)}
    kept = {spec.name for spec in manifest.outputs}
    cache_names = {name for cache in manifest.caches for name in (cache.input, cache.output)}
    last_use = {name: i for i, shard in enumerate(manifest.shards) for name in shard.inputs}
    alive: dict[str, int] = {}
    peak = 0
    head = set(manifest.head.shards) if manifest.head else set()
    head_dims = {**dims, **dict.fromkeys(_position_symbols(manifest), 1)} if last_position else dims
    for i, shard in enumerate(manifest.shards):
        for lookup in shard.lookups:
            alive[lookup.output] = sizes.get(lookup.output, 0)
        shard_dims = head_dims if shard.name in head else dims
        peak = max(peak, sum(alive.values()) + manifest.structures[shard.structure].activation_bytes(shard_dims))
        for name in shard.outputs:
            if name not in cache_names or not last_position:
                alive[name] = 0 if shard.name in head else sizes.get(name, 0)
        for name in [name for name in alive if name not in kept and last_use.get(name, -1) <= i]:
            del alive[name]
    if manifest.head:
        spec = next(spec for spec in manifest.outputs if spec.name == manifest.head.output)
        peak += tensor_bytes(spec, head_dims)
    # The caller's arrays. Caches that the engine keeps itself are counted by `cache_bytes`.
    passed = [spec for spec in manifest.inputs if spec.name not in cache_names or not last_position]
    needed = int(peak * _HEAP_FACTOR) + sum(sizes[spec.name] for spec in passed)
    # In whole steps, so that the plan changes seldom while a text grows token by token.
    return -(-needed // _ROUND_BYTES) * _ROUND_BYTES


def cache_bytes(manifest: Manifest, dims: Mapping[str, int]) -> int:
    """Bytes of all caches after a pass over inputs of these sizes; twice, since a pass makes new ones from the old."""
    outputs = {spec.name: spec for spec in manifest.outputs}
    return 2 * sum(tensor_bytes(outputs[cache.output], dims) for cache in manifest.caches)


def tensor_bytes(spec: TensorSpec, dims: Mapping[str, int]) -> int:
    """Bytes of a tensor of these sizes; 0 when its shape is not known."""
    try:
        return prod(evaluate_dim(dim, dims) for dim in spec.shape) * dtype_bytes(spec.dtype) if spec.shape else 0
    except KeyError:
        return 0


def _residence_order(shards: tuple[Shard, ...]) -> tuple[list[Shard], int]:
    """Shards in the order in which they become resident, and how many small ones are at its beginning."""
    largest = max(shard.nbytes for shard in shards)
    small = [shard for shard in shards if shard.nbytes <= largest * _SMALL_SHARE]
    rest = [shard for shard in shards if shard.nbytes > largest * _SMALL_SHARE]
    return small + [rest[place] for place in _spread(len(rest))], len(small)


def _spread(count: int) -> list[int]:
    """0 .. count - 1 so that the first k of them are far apart, for every k (van der Corput's sequence)."""
    bits = count.bit_length() + 1
    reversals = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits if count else 0))
    return list(dict.fromkeys(reversal * count >> bits for reversal in reversals))


def _loaded_bytes(shard: Shard) -> int:
    return page_ceil(shard.nbytes) + SESSION_BYTES


def _position_symbols(manifest: Manifest) -> set[str]:
    """Symbols of the last dimension but one of the head's input: the positions."""
    if manifest.head is None:
        return set()
    spec = next((edge for edge in manifest.edges if edge.name == manifest.head.input), None)
    return set(symbols(spec.shape[-2])) if spec and len(spec.shape) >= 2 else set()
