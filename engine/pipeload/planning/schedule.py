"""Duration of a pass: a simulation of the agents, and a lower bound over all schedules. Pure.

The schedule in one recurrence. Shard j of those that are loaded is read by the Loading Agent that is free first, into
the buffer that the (j - buffers)-th streamed shard has left, after the reads that the storage has to finish before it.
Its session is made when the (j - sessions)-th one is gone; as a rule there are as many sessions as buffers:

```
read_j    = max(agent free, buffer free = end of run_(j - buffers), read_(j - 1)) + bytes_j / bandwidth
loaded_j  = max(read_j, end of run_(j - sessions)) + session_j
                                                      the agent is free again; weights of 16 bits are widened first
run_j     = max(run_(j - 1), loaded_j) + compute_j    resident shards are always loaded
```

Passes follow each other without a pause, so reading goes on for the next pass while the last shards of this one run.
The steady pass is the mean distance between the ends of later ones.

Loading Agents widen weights and make sessions on the processors that compute, so no steady pass is shorter than all of
this work on all of them: (threads x sum compute + sum session of loaded shards) / cores. Where they have processors of
their own, it is no shorter than their work on these: sum session / processors of their own.

The roofline T* is the shortest time that a pass can take on this machine under any schedule: W bytes of weights, R of
them resident, bandwidth B, compute time c_i of shard i and its size s_i. Weights that shards have in common count once,
with the first of them:

```
steady pass       max(sum c_i, (W - R) / B)
cold first pass   max over k of (sum_(i <= k) s_i / B + sum_(i >= k) c_i)
```
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from pipeload.format.manifest import Manifest, first_places
from pipeload.planning.profile import Profile

__all__ = ["Roofline", "Schedule", "ShardWork", "least_steady_s", "rested", "roofline", "simulate"]

_PASSES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardWork:
    """The cost of one shard under a plan.

    Attributes:
        cold_bytes: bytes read for the first pass.
        steady_bytes: bytes read for every later pass; 0 also for a resident shard.
        streamed: loaded for every pass, into a buffer.
        session_s: seconds to widen its weights and to make its session.
        run_s: seconds to run it while nothing is read.
        loading_run_s: seconds to run it while Loading Agents read.
    """

    cold_bytes: int
    steady_bytes: int
    streamed: bool
    session_s: float
    run_s: float
    loading_run_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Predicted seconds of the first pass after loading, and of every later one."""

    first_s: float
    steady_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """T*: the least seconds that a cold first pass and a steady pass can take."""

    first_s: float
    steady_s: float


def simulate(
    work: Sequence[ShardWork],
    *,
    loaders: int,
    buffers: int,
    sessions: int | None = None,
    read_bytes_per_s: float,
    threads: int,
    cores: int,
    loading_cores: int = 0,
) -> Schedule:
    """The times of a first and of a steady pass; see the module's docstring.

    Args:
        work: the shards, in order.
        loaders: number of Loading Agents.
        buffers: streamed shards that are in memory together.
        sessions: that they have together; None for one each.
        read_bytes_per_s: bandwidth of this many Loading Agents together.
        threads: that compute.
        cores: processors for computing and Loading Agents.
        loading_cores: of them, those that are the Loading Agents' own; 0 where they compute too.
    """
    steady_bytes = sum(shard.steady_bytes for shard in work)
    alone_s = sum(shard.run_s for shard in work)
    # Computing is slower while Loading Agents read: in proportion to the part of the pass in which they read.
    reading_s = steady_bytes / read_bytes_per_s
    share = reading_s / max(reading_s, alone_s) if reading_s else 0.0
    agents = [0.0] * loaders
    storage_s = inference_s = 0.0
    buffers_free: deque[float] = deque()
    sessions_free: deque[float] = deque()
    ends = []
    for number in range(_PASSES):
        for shard in work:
            if shard.streamed or number == 0:
                begin = heappop(agents)
                if shard.streamed and len(buffers_free) == buffers:
                    begin = max(begin, buffers_free.popleft())
                nbytes = shard.steady_bytes if number else shard.cold_bytes
                storage_s = max(begin, storage_s) + nbytes / read_bytes_per_s
                session_begin_s = storage_s
                if shard.streamed and len(sessions_free) == sessions:
                    session_begin_s = max(session_begin_s, sessions_free.popleft())
                loaded_s = session_begin_s + shard.session_s
                heappush(agents, loaded_s)
                inference_s = max(inference_s, loaded_s)
            reading = share if number else 1.0
            inference_s += shard.run_s + (shard.loading_run_s - shard.run_s) * reading
            if shard.streamed:
                buffers_free.append(inference_s)
                sessions_free.append(inference_s)
        ends.append(inference_s)
    # The simulation may still use up shards that a long first pass made ready: in the long run, no pass takes less
    # time than its reading, its sessions, and its work on all cores.
    sessions_s = sum(shard.session_s for shard in work if shard.streamed) / min(loaders, sessions or loaders)
    apart_s, work_s = (ends[-1] - ends[1]) / (_PASSES - 2), least_steady_s(work, threads, cores, loading_cores)
    return Schedule(first_s=ends[0], steady_s=max(apart_s, reading_s, sessions_s, work_s))


def rested(work: Sequence[ShardWork], buffers: int) -> list[ShardWork]:
    """The work of a first pass after a rest: what stays is there, and as many of the streamed shards as have buffers.

    What else is streamed must be read while the pass runs, since there is no place for it before.

    Args:
        work: the shards, in order.
        buffers: as for `simulate`.
    """
    found, ready, reads = [], buffers, any(shard.steady_bytes for shard in work)
    for shard in work:
        there = not shard.streamed or ready > 0
        ready -= shard.streamed
        found.append(
            replace(
                shard,
                cold_bytes=0 if there else shard.steady_bytes,
                session_s=0.0 if there else shard.session_s,
                loading_run_s=shard.loading_run_s if reads else shard.run_s,
            )
        )
    return found


def least_steady_s(work: Sequence[ShardWork], threads: int, cores: int, loading_cores: int = 0) -> float:
    """The least seconds of a steady pass: its computing, and all of its work on all processors.

    Args:
        work: the shards.
        threads: that compute.
        cores: processors for computing and Loading Agents.
        loading_cores: as for `simulate`.
    """
    run_s = sum(shard.run_s for shard in work)
    sessions_s = sum(shard.session_s for shard in work if shard.streamed)
    apart_s = sessions_s / loading_cores if loading_cores else 0.0
    return max(run_s, (min(threads, cores) * run_s + sessions_s) / cores, apart_s)


def roofline(manifest: Manifest, profile: Profile, resident_bytes: int = 0) -> Roofline:
    """T* of the module's docstring.

    Args:
        manifest: the model.
        profile: a measured one: the best bandwidth of any number of Loading Agents, past the page cache or through
            it, and for each shard the shortest compute time that was measured with everything in memory.
        resident_bytes: R.
    """
    bandwidth = max((*profile.read_bytes_per_s.values(), *profile.cached_read_bytes_per_s.values()))
    compute = [
        min(min(times[shard.name].run_s, times[shard.name].packed_run_s) for times in profile.times.values())
        for shard in manifest.shards
    ]
    total_s = sum(compute)
    first_s, read_bytes, done_s = total_s, 0, 0.0
    firsts = first_places(manifest.shards)
    for place, (shard, seconds) in enumerate(zip(manifest.shards, compute, strict=True)):
        read_bytes += shard.nbytes if firsts[place] == place else 0
        first_s = max(first_s, read_bytes / bandwidth + total_s - done_s)
        done_s += seconds
    streamed_bytes = manifest.weight_bytes - resident_bytes
    return Roofline(first_s=first_s, steady_s=max(total_s, streamed_bytes / bandwidth))
