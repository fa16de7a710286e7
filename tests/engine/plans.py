"""Manifests of any sizes, for the tests of planning: no files, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeload.format.manifest import (
    PAGE_BYTES,
    ByteTerm,
    FileRecord,
    Manifest,
    Shard,
    Structure,
    WeightSpec,
    WeightsRange,
)
from pipeload.format.placement import place
from pipeload.planning.footprint import second_copy_bytes, session_bytes
from pipeload.planning.planner import Plan

_GRAPH = FileRecord(path="x", nbytes=12_000, sha256="0" * 64)


def shard_of(
    name: str,
    sizes: Sequence[int],
    *,
    takes: tuple[str, ...] = (),
    makes: tuple[str, ...] = (),
    narrow: bool = False,
) -> Shard:
    """A shard with a tensor of each size, one after the other; if narrow, of 16 bits that are widened."""
    tensors, place = [], PAGE_BYTES
    for k, nbytes in enumerate(sizes):
        if narrow:
            kind = {"dtype": "bfloat16", "shape": (-(-nbytes // 2),), "widened": f"{name}.{k}.wide"}
        else:
            kind = {"dtype": "int8", "shape": (nbytes,)}
        tensors.append(WeightSpec(name=f"{name}.{k}", offset=place, **kind))
        place += tensors[-1].nbytes
    held = place - PAGE_BYTES
    weights = WeightsRange(path=name, offset=PAGE_BYTES, nbytes=held, sha256="0" * 64) if held else None
    return Shard(
        name=name,
        role="block",
        graph=_GRAPH,
        weights=weights,
        tensors=tuple(tensors) if weights else (),
        inputs=takes,
        outputs=makes,
        structure="s",
    )


def with_common(manifest: Manifest, *groups: Sequence[int]) -> Manifest:
    """The manifest, with the weights of the first shard of each group for the others of the group too."""
    shards = list(manifest.shards)
    for group, (first, *others) in enumerate(groups):
        weights = shards[first].weights
        weights = replace(weights, path=f"common{group}") if weights else None
        for number in (first, *others):
            shards[number] = replace(shards[number], weights=weights, tensors=shards[first].tensors)
    return replace(manifest, shards=tuple(shards))


def manifest_of(*shards: Sequence[int], narrow: bool = False) -> Manifest:
    """A manifest whose shards s0, s1 ... have tensors of these sizes, each in a file of its own; see `shard_of`."""
    return Manifest(
        exporter="tests", source="", model_type="", task="", inputs=(), outputs=(), edges=(), files=(),
        shards=tuple(shard_of(f"s{k}", sizes, narrow=narrow) for k, sizes in enumerate(shards)),
        structures={"s": Structure(activations=((ByteTerm(nbytes=10),),))},
    )  # fmt: skip


def slots_bytes(plan: Plan, shards: Sequence[Shard]) -> int:
    """Memory for the shards that are streamed: their buffers and sessions, and what packing them takes."""
    count = plan.buffers if plan.sessions is None else plan.sessions
    copies = min(plan.loaders, count) * max(map(second_copy_bytes, shards))
    copies *= plan.packed_streamed or any(shard.packed for shard in shards)
    sessions = max(session_bytes(shard, plan.threads) for shard in shards) + plan.buffer_bytes * plan.packed_streamed
    return plan.buffers * plan.buffer_bytes + count * sessions + copies + loading_bytes(plan, shards)


def loading_bytes(plan: Plan, shards: Sequence[Shard]) -> int:
    """A resident shard that is always packed needs its buffer only while it is loaded."""
    packed = [shard for shard in shards if shard.packed]
    most = max((place(shard, (0, shard.nbytes)).nbytes + second_copy_bytes(shard) for shard in packed), default=0)
    return most * any(shard.name in plan.resident for shard in packed)
