"""The planner's facts about the machine, the process, and the model's speed on it."""

# No `from __future__ import annotations`: msgspec would look up annotations that are text in the module that a class
# names, and Profile names the package.
from dataclasses import dataclass, field

__all__ = ["Profile", "ShardTimes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTimes:
    """Seconds that one shard takes.

    Attributes:
        session_s: create a session over a buffer, not packed; and widen the weights before, where they have 16 bits.
        run_s: run it, not packed, while nothing else goes on.
        loading_run_s: the same while Loading Agents read.
        pack_s: create a packed session from a buffer; and widen the weights before.
        packed_run_s: run it packed, while nothing else goes on.
    """

    session_s: float
    run_s: float
    loading_run_s: float
    pack_s: float
    packed_run_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One machine, one process, one model at one size of its inputs.

    Attributes:
        process_bytes: memory that the whole process occupies before anything is loaded: interpreter, libraries, and
            the host application's data. It is this process's, so files do not have it.
        cores: processors that the process may use at the same time.
        read_bytes_per_s: number of Loading Agents -> bandwidth past the page cache.
        cached_read_bytes_per_s: number of Loading Agents -> bandwidth through a cold page cache.
        read_bytes_per_s_by_request: bytes of one read -> bandwidth of one Loading Agent past the page cache. The other
            two were measured with 8 MiB, with which the engine begins.
        dims: sizes of the symbolic dimensions that `times` are for.
        times: intra-op threads -> shard name -> seconds.
        runtime_bytes: measured memory of the running process beyond `process_bytes`, beside weights, caches and the
            plan's figure for a pass; 0 when it is not known.
        activation_bytes: measured memory of a pass beside weights and caches.
        cache_bytes_per_token: bytes that a token adds to the KV caches of one sequence.
        core_capacities: logical processor that the process may use -> its capacity, of 1024 for the machine's largest;
            empty where no core is little. `times` are then those of threads on the largest cores, and of sessions that
            are made on the others.
    """

    __module__ = "pipeload"

    process_bytes: int
    cores: int
    read_bytes_per_s: dict[int, float] = field(default_factory=dict)
    cached_read_bytes_per_s: dict[int, float] = field(default_factory=dict)
    read_bytes_per_s_by_request: dict[int, float] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    times: dict[int, dict[str, ShardTimes]] = field(default_factory=dict)
    runtime_bytes: int = 0
    activation_bytes: int = 0
    cache_bytes_per_token: int = 0
    core_capacities: dict[int, int] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Whether it has the speeds of reading and running."""
        return bool(self.times and self.read_bytes_per_s)
