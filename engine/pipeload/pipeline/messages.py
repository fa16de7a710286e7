"""The messages between the agents: tasks, loaded shards, failures."""

from __future__ import annotations

from dataclasses import dataclass

from pipeload.format.manifest import WeightsRange
from pipeload.pipeline.session import ShardSession
from pipeload.storage.buffers import Buffer

__all__ = ["Failed", "Loaded", "LoadedShard", "Task"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One shard to load.

    Attributes:
        ticket: position in the sequence of all loads.
        index: the shard's position in the model.
        resident: it stays in memory after it ran.
        epoch: the epoch in which it was drawn.
        pass_number: the pass that it is for.
        packing: pack the loaded shard instead of loading it; such a task has no place in the order of tickets.
    """

    ticket: int
    index: int
    resident: bool
    epoch: int
    pass_number: int = 1
    packing: bool = False


@dataclass(slots=True, kw_only=True)
class LoadedShard:
    """A shard in memory, with the resources to give back after it.

    Attributes:
        index: the shard's position in the model.
        session: None when it is not ready to run.
        buffer: the memory of its weights; None when a packed session has its own copy.
        reserved_bytes: what is reserved for this shard alone.
        session_bytes: what is reserved for its session apart from that, where the plan has fewer sessions than buffers.
        pooled: the buffer belongs to the pool.
        packed: its session has copies of the weights in the heap.
        shared: the range whose buffer other resident shards use too; None when the buffer is this shard's own.
    """

    index: int
    session: ShardSession | None
    buffer: Buffer | None
    reserved_bytes: int
    session_bytes: int = 0
    pooled: bool
    packed: bool = False
    shared: WeightsRange | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A Loading Agent's message: the shard is ready."""

    task: Task
    shard: LoadedShard


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A Loading Agent's message: the shard could not be loaded, with the error."""

    task: Task
    error: BaseException
