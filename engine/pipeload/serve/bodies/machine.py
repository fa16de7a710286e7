"""Body of `/machine`: memory, shards and the latest sweep of each model, now."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = [
    "Lane",
    "LaneSpan",
    "Machine",
    "MachineModel",
    "ModelMemory",
    "PlacementChange",
    "ShardState",
    "StageOnNode",
    "Sweep",
]


class ModelMemory(msgspec.Struct, kw_only=True):
    """Memory that a model's plan grants, in bytes. All but the last two lie in the process together.

    Attributes:
        resident_bytes: shards that stay between sweeps, parts of others that stay, and their sessions.
        buffer_bytes: buffers through which weights are streamed.
        cache_bytes: KV caches.
        activation_bytes: what a sweep makes beside weights.
        packing_bytes: a copy of one shard while it is packed.
        streamed_bytes: weights that each sweep reads.
        kept_bytes: weights that it need not read, in bytes of their files.
    """

    resident_bytes: int
    buffer_bytes: int
    cache_bytes: int
    activation_bytes: int
    packing_bytes: int
    streamed_bytes: int
    kept_bytes: int


class ShardState(msgspec.Struct, kw_only=True):
    """A shard and its weights, in bytes of its file.

    Attributes:
        streamed_bytes: what each sweep reads of it.
    """

    name: str
    state: Literal["resident", "partly", "streamed"]
    nbytes: int
    streamed_bytes: int


class LaneSpan(msgspec.Struct, kw_only=True):
    """What an agent did for a time, in seconds since the sweep began."""

    kind: str
    shard: str
    begin_s: float
    end_s: float


class Lane(msgspec.Struct, kw_only=True):
    """An agent during a sweep.

    Attributes:
        busy_s: seconds in which it did not wait.
    """

    agent: str
    busy_s: float
    spans: list[LaneSpan]


class Sweep(msgspec.Struct, kw_only=True):
    """The latest sweep.

    Attributes:
        number: from 1, since the model was opened.
        callers: calls that it served.
        read_bytes_per_s: while it read; 0 where it read nothing.
        bound_s: T*, the shortest time that such a sweep could take; null where it is not known.
        efficiency: T* by its own time.
        lanes: of all agents that did something; empty where the next sweep is so long that its record has gone.
        left_out: spans, the shortest ones, that the lanes do not list.
    """

    number: int
    seconds: float
    callers: int
    read_bytes: int
    read_bytes_per_s: float
    bound_s: float | None
    efficiency: float | None
    lanes: list[Lane]
    left_out: int


class StageOnNode(msgspec.Struct, kw_only=True):
    """A range of a model's shards on a node of a cluster.

    Attributes:
        node: the node's name.
        first, last: names of its shards.
    """

    node: str
    first: str
    last: str


class PlacementChange(msgspec.Struct, kw_only=True):
    """A change of a model's placement on a cluster, or one that failed.

    Attributes:
        at_s: when it was over, in seconds since 1970.
        before: the stages until then.
        after: those from then on; null where the ones before stay, or there are none.
        why: the reason, and what failed.
        waited_s: seconds in which no call of the model could begin.
    """

    at_s: float
    before: list[StageOnNode]
    after: list[StageOnNode] | None
    why: str
    waited_s: float


class MachineModel(msgspec.Struct, kw_only=True):
    """A model.

    Attributes:
        state: a closed model opens with its next call.
        weight_bytes: of all of its weights, as they are stored.
        sweeps, read_bytes: since the server began.
        tokens_per_s: of the latest answer after its first token; null before, and where it had one token.
        best_read_bytes_per_s: the most that was measured on this machine; null without a measurement.
        memory, sweep: null while the model is closed, or before its first sweep, and where it runs on a cluster.
        shards: in their order; none while the model is closed, and where it runs on a cluster.
        stages: of a model that is open on a cluster, in their order.
        replacements: how often it was placed anew there, since a node was lost.
        reconfigurations: its latest ten changes of placement there, since it was opened, the oldest first.
    """

    name: str
    task: str
    state: Literal["open", "closed"]
    weight_bytes: int
    sweeps: int
    read_bytes: int
    tokens_per_s: float | None
    best_read_bytes_per_s: float | None = None
    memory: ModelMemory | None = None
    sweep: Sweep | None = None
    shards: list[ShardState] = []
    stages: list[StageOnNode] = []
    replacements: int = 0
    reconfigurations: list[PlacementChange] = []


class Machine(msgspec.Struct, kw_only=True):
    """The process and its models.

    Attributes:
        budget_bytes: of the process; null where it follows free memory and no model is open.
        rss_bytes, peak_rss_bytes: memory of the process now, and the most that it was.
        process_bytes: memory of interpreter, libraries and the server, beside what models' plans grant.
        calls, most_calls: calls that are served or wait, and the most that may.
    """

    budget_bytes: int | None
    rss_bytes: int
    peak_rss_bytes: int
    process_bytes: int
    calls: int
    most_calls: int
    models: list[MachineModel]
