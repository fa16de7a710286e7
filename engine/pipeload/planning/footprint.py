"""Memory that a shard takes: its buffer, its session, and copies while it is packed. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from pipeload.format.manifest import Shard, WeightSpec
from pipeload.format.pages import memory_ceil
from pipeload.format.placement import place

__all__ = ["Footprint", "least_bytes", "second_copy_bytes", "session_bytes", "whole_bytes"]

_GRAPH_FACTOR, _THREAD_BYTES = 26, 60_000
"""Memory of a session: for each byte of its graph, and for each thread. Measured with onnxruntime 1.31 on blocks of
BERT, GPT-2 and Llama, which took 24 to 28 bytes for a byte of the graph."""
_BLOB_RANK, _BLOCK_BYTES, _SCALE_BYTES = 3, 8, 4
"""MatMulNBits takes `[rows, blocks, bytes]`. A packed copy has the blobs, the scales twice, and a sum for each block;
the scales are in work with their blobs. Measured with onnxruntime 1.31 for 4 and 8 bits in blocks of 16 to 128."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of a model's shards, and of copies while they are loaded, with one number of threads.

    Attributes:
        whole: shard -> bytes of the buffer for all of its weights.
        sessions: shard -> bytes of its session.
        packing_bytes: to pack any resident shard, beside that shard itself.
        second_copy_bytes: a Loading Agent that packs any streamed shard, beside weights and packed copy.
        apart_bytes: to load any resident shard that is always packed, until its session has a copy of its own.
    """

    whole: Mapping[str, int]
    sessions: Mapping[str, int]
    packing_bytes: int
    second_copy_bytes: int
    apart_bytes: int

    @classmethod
    def of(cls, shards: Sequence[Shard], threads: int) -> Footprint:
        """The memory of these shards, with this many intra-op threads."""
        whole = {shard.name: whole_bytes(shard) for shard in shards}
        sessions = {shard.name: session_bytes(shard, threads) for shard in shards}
        copies = {shard.name: second_copy_bytes(shard) for shard in shards}
        packing = max(whole[name] + copies[name] + sessions[name] for name in whole)
        apart = (place(s, (0, s.nbytes)).nbytes + copies[s.name] for s in shards if s.packed)
        return cls(whole, sessions, packing, max(copies.values()), max(apart, default=0))

    def group_bytes(self, group: Sequence[Shard], *, packed: bool) -> int:
        """Memory of a resident group."""
        copies = len(group) if packed else 1
        return self.whole[group[0].name] * copies + sum(self.sessions[shard.name] for shard in group)


def session_bytes(shard: Shard, threads: int) -> int:
    """Bytes of a shard's session with this many intra-op threads, beside its buffer: graph, kernels, thread pool, and
    the weights of a session that is always packed.
    """
    return _GRAPH_FACTOR * shard.graph.nbytes + _THREAD_BYTES * threads + (_packed_bytes(shard) if shard.packed else 0)


def _packed_bytes(shard: Shard) -> int:
    """The weights in a packed session of a shard that is always packed: its own copies, and what kernels for weights of
    few bits add to each block.
    """
    return memory_ceil(shard.memory_bytes + _BLOCK_BYTES * sum(map(_blocks, shard.tensors)))


def second_copy_bytes(shard: Shard) -> int:
    """Bytes that packing a shard takes beside its weights and their packed copy: a copy of the tensor in work; or,
    where the session borrows its weights, a hole in the heap that this tensor does not fit into.
    """
    tensors = (spec.memory_bytes + _SCALE_BYTES * _blocks(spec) for spec in shard.tensors)
    return memory_ceil(max(tensors, default=shard.nbytes))


def _blocks(spec: WeightSpec) -> int:
    """The blocks of a matrix of few bits; 0 of any other tensor."""
    return prod(spec.shape[:2]) if spec.dtype == "uint8" and len(spec.shape) == _BLOB_RANK else 0


def whole_bytes(shard: Shard) -> int:
    """Bytes of the buffer that holds all weights of a resident shard; none where its session has its own copy."""
    return 0 if shard.packed else place(shard, (0, shard.nbytes)).nbytes


def least_bytes(shards: Sequence[Shard], threads: int) -> int:
    """The least memory for weights that works: one buffer, for one shard after the other."""
    buffer = max(place(shard, (0, shard.nbytes)).nbytes for shard in shards)
    copy = max((second_copy_bytes(shard) for shard in shards if shard.packed), default=0)
    return buffer + copy + max(session_bytes(shard, threads) for shard in shards)
