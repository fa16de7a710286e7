"""manifest + profile + budget -> Plan. Pure: no I/O, no threads.

Memory of the process, from the bottom:

```
budget  ------------------------------------------------------------
        | packing        a copy of one shard while it is packed     |
        | buffers        the streamed range of a shard, in each     |
        | resident       shards that stay between passes            |
        | kept           parts of other shards that stay            |
        | caches         KV caches of open decode states            |
        | pass           activations, edges, outputs of one pass    |
        | runtime        onnxruntime's code and heap, once it runs  |
        | process        interpreter, libraries, the host's data    |
0       ------------------------------------------------------------
```

A shard is resident (stays in memory, with its session), streamed (read for every pass), or partly resident: a range of
its file is streamed, and the tensors before and behind it are kept. When a part of every shard is kept, the buffers
need to hold only the rest, so memory that they do not need becomes memory that need not be read again. That is why
there is no cliff between a model that fits and one that does not. Resident shards are spread evenly among the streamed
ones, so that reading never pauses. There is no LRU: a cyclic scan that is larger than a cache hits nothing in it.
Shards with the same weights (one range of a file) are resident or streamed together: resident, they share its memory.

Weights that are stored in 16 bits are widened to 32 as a shard is loaded. Kept parts stay in 16 bits, and may be all of
a shard: then nothing of it is read, and each pass widens it into a buffer. A resident shard has 32 bits. Parts save
twice as much reading for the same memory, resident shards the widening, which takes processors from computing: which
comes first is tried both ways, and with half of the resident shards before parts.

A buffer waits with what was read; its session is made when the plan has room for one more. Sessions that borrow their
weights are small, and each buffer has one. Those of shards that are always packed have copies, and are larger than the
buffer: fewer of them leave memory for another buffer, which is filled while one is packed.

The planner enumerates Loading Agents, buffers, their size, sessions where these are large, and whether resident shards
are packed (laid out for the CPU); fills the remaining memory with shards in their order of residence; simulates the
schedule of each layout (`pipeload.planning.schedule`); and takes the fastest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeload.errors import BudgetError
from pipeload.format.manifest import Manifest, first_places
from pipeload.machine.cores import computing_cores, reading_cores
from pipeload.machine.sizes import format_bytes
from pipeload.planning.footprint import least_bytes
from pipeload.planning.layouts import Layout, Range, layouts
from pipeload.planning.needs import Needs
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.rates import Rates
from pipeload.planning.schedule import Schedule, ShardWork, least_steady_s, rested, simulate

__all__ = [
    "AMPLE_BYTES",
    "LEAST_RUNTIME_BYTES",
    "MOST_RUNTIME_BYTES",
    "Plan",
    "budget_for_latency",
    "forecast",
    "least_budget_bytes",
    "make_plan",
    "predict",
    "process_bytes",
    "rested_pass_s",
    "runtime_bytes",
    "times_of",
    "with_needs",
]

_RUNTIME_BYTES, LEAST_RUNTIME_BYTES, MOST_RUNTIME_BYTES = 18_000_000, 6_000_000, 36_000_000
"""onnxruntime's code pages, thread stacks, heap and the trace, which appear with the first passes: assumed until they
are measured. A measured figure below the second comes from a process that had run a model before, and tells nothing;
above the third, the host has grown, which is no figure to keep for other processes."""
AMPLE_BYTES = 1 << 50
"""A budget that is more than any model can use."""
_ROUND_BYTES = 1_000_000
_SPARE_SHARE = 0.005
"""Plans leave this fraction of the memory for weights free: the heap's own use is known only that precisely."""
_CLOSE = 0.005
"""Plans whose predicted times differ by less are equal: the one that reads less, with fewer agents, wins."""
_FEWER_THREADS = 1.1
"""Fewer threads than cores must be faster by this factor: other work may have disturbed the measurement."""
_LATE = 0.02
"""Where steady passes are equal, a first pass that is longer by more than this fraction loses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one model runs under one budget.

    Attributes:
        budget_bytes: the most memory that the whole process may use.
        loaders: number of Loading Agents.
        buffers: streamed shards that are in memory together: one runs, the others are being read or wait.
        buffer_bytes: size of each buffer; 0 when nothing is streamed.
        sessions: streamed shards that have a session together, fewer than buffers; None where each buffer has one.
        sessions_bytes: of `weights_bytes`, for these sessions and for packing them; 0 where each buffer has one.
        resident: names of the shards that stay in memory between passes.
        partly_resident: name of a partly resident shard -> the range of its weights that is streamed; (0, 0) where all
            of them stay in 16 bits.
        packed: resident shards are laid out for the CPU (prepacked), one after another once the first pass is over.
        packed_streamed: streamed shards are prepacked by the Loading Agents. `weights_bytes` then has a packed copy for
            each buffer, and a second copy of the tensor in work for each agent.
        direct: read past the page cache.
        threads: intra-op threads of a session.
        process_bytes, pass_bytes, cache_bytes, packing_bytes: see the picture above; process_bytes includes the
            runtime.
        resident_bytes: weights that stay in memory between passes, those of partly resident shards included, in bytes
            of their files. A range of a file that several resident shards have in common counts once, or if they are
            packed, for each.
        streamed_bytes: weights that are read in every steady pass.
        peak_bytes: predicted peak of the process.
        first_pass_s, steady_pass_s: predicted seconds; None when the profile was not measured.
    """

    __module__ = "pipeload"

    budget_bytes: int
    loaders: int
    buffers: int
    buffer_bytes: int
    sessions: int | None = None
    sessions_bytes: int = 0
    resident: frozenset[str]
    partly_resident: dict[str, Range] = field(default_factory=dict)
    packed: bool
    packed_streamed: bool = False
    direct: bool = True
    threads: int
    process_bytes: int
    pass_bytes: int
    cache_bytes: int
    packing_bytes: int = 0
    resident_bytes: int
    streamed_bytes: int
    peak_bytes: int
    first_pass_s: float | None = None
    steady_pass_s: float | None = None

    @property
    def weights_bytes(self) -> int:
        """Bytes that all weights may occupy together: resident shards, kept parts of others, and buffers."""
        return self.peak_bytes - self.process_bytes - self.pass_bytes - self.cache_bytes - self.packing_bytes

    @property
    def layout(self) -> tuple[object, ...]:
        """The fields that cannot change while shards are loaded."""
        streaming = self.loaders, self.buffers, self.buffer_bytes, self.sessions, self.packed_streamed, self.direct
        return self.resident, self.partly_resident, self.packed, self.threads, streaming


def make_plan(
    manifest: Manifest,
    profile: Profile,
    *,
    budget_bytes: int,
    needs: Needs,
    loaders: int | None = None,
    threads: int | None = None,
) -> Plan:
    """The fastest plan under the budget.

    Args:
        manifest: the model.
        profile: the machine and the process.
        budget_bytes: the most memory that the whole process may use.
        needs: of one pass, beside weights.
        loaders: number of Loading Agents; None chooses.
        threads: intra-op threads; None chooses.

    Raises:
        BudgetError: not even one buffer for the largest shard fits.
    """
    beside = _beside_bytes(profile, needs)
    speed = Rates.of(manifest, profile, threads)
    free = budget_bytes - beside
    free -= int(free * _SPARE_SHARE)
    found: list[tuple[Layout, Schedule]] = []
    fastest_s = float("inf")
    most_threads = max(speed.times)
    firsts = first_places(manifest.shards)
    for layout in layouts(manifest.shards, free, speed, loaders):
        work = _work(manifest, firsts, layout, speed.times[layout.threads])
        bandwidth = speed.bandwidth(layout.loaders)
        loading_cores = _loading_cores(profile, layout.threads)
        least_s = least_steady_s(work, layout.threads, profile.cores, loading_cores)
        least_s = max(least_s, layout.streamed_bytes / bandwidth)
        if least_s > fastest_s * (1 + _CLOSE):
            continue
        schedule = _simulate(work, layout, bandwidth, profile)
        if layout.threads < most_threads and schedule.steady_s * _FEWER_THREADS > fastest_s:
            continue
        fastest_s = min(fastest_s, schedule.steady_s)
        found.append((layout, schedule))
    if not found:
        raise _too_small(manifest, profile, budget_bytes, needs, threads)
    layout, schedule = _preferred([pair for pair in found if pair[1].steady_s <= fastest_s * (1 + _CLOSE)])
    return Plan(
        budget_bytes=budget_bytes,
        loaders=layout.loaders,
        buffers=layout.buffers,
        buffer_bytes=layout.buffer_bytes,
        sessions=layout.sessions,
        sessions_bytes=layout.sessions_bytes,
        resident=layout.resident,
        partly_resident=layout.partly_resident,
        packed=layout.packed,
        packed_streamed=layout.packed_streamed,
        direct=speed.direct,
        threads=layout.threads,
        process_bytes=process_bytes(profile),
        pass_bytes=needs.pass_bytes,
        cache_bytes=needs.cache_bytes,
        packing_bytes=layout.packing_bytes,
        resident_bytes=layout.resident_bytes,
        streamed_bytes=layout.streamed_bytes,
        peak_bytes=beside + layout.used_bytes,
        first_pass_s=schedule.first_s if profile.measured else None,
        steady_pass_s=schedule.steady_s if profile.measured else None,
    )


def process_bytes(profile: Profile) -> int:
    """Bytes that the process occupies beside weights, passes and caches once onnxruntime runs."""
    return profile.process_bytes + runtime_bytes(profile)


def runtime_bytes(profile: Profile) -> int:
    """Bytes that the process will occupy beyond `Profile.process_bytes`: measured, or else assumed."""
    return profile.runtime_bytes if profile.runtime_bytes >= LEAST_RUNTIME_BYTES else _RUNTIME_BYTES


def _beside_bytes(profile: Profile, needs: Needs) -> int:
    return process_bytes(profile) + needs.pass_bytes + needs.cache_bytes


def least_budget_bytes(manifest: Manifest, profile: Profile, needs: Needs, *, threads: int | None = None) -> int:
    """The smallest budget that works, rounded up to whole megabytes: one buffer, for one shard after the other.

    Args:
        manifest: the model.
        profile: the machine and the process.
        needs: of one pass, beside weights.
        threads: intra-op threads; None chooses.
    """
    fewest = min(Rates.of(manifest, profile, threads).times)
    needed = _beside_bytes(profile, needs) + int(least_bytes(manifest.shards, fewest) / (1 - _SPARE_SHARE))
    return (needed // _ROUND_BYTES + 2) * _ROUND_BYTES


def with_needs(plan: Plan, profile: Profile, needs: Needs, budget_bytes: int) -> Plan:
    """The same layout for passes with other needs; its peak may be above the budget."""
    return replace(
        plan,
        budget_bytes=budget_bytes,
        process_bytes=process_bytes(profile),
        pass_bytes=needs.pass_bytes,
        cache_bytes=needs.cache_bytes,
        peak_bytes=_beside_bytes(profile, needs) + plan.packing_bytes + plan.weights_bytes,
    )


def times_of(manifest: Manifest, profile: Profile, threads: int) -> Mapping[str, ShardTimes]:
    """Times of every shard with this many threads, measured or assumed."""
    return Rates.of(manifest, profile, threads).times[threads]


def predict(manifest: Manifest, profile: Profile, plan: Plan) -> Schedule | None:
    """The forecast of a measured profile for a plan that was made from another one; None without measurements."""
    return forecast(manifest, profile, plan) if profile.measured else None


def forecast(manifest: Manifest, profile: Profile, plan: Plan) -> Schedule:
    """The schedule of a plan, by measured speeds or by assumed ones."""
    speed = Rates.of(manifest, profile, plan.threads)
    work = _work(manifest, first_places(manifest.shards), plan, speed.times[plan.threads])
    bandwidth = speed.bandwidth(plan.loaders)
    return _simulate(work, plan, bandwidth, profile)


def rested_pass_s(manifest: Manifest, profile: Profile, plan: Plan) -> float:
    """Seconds of a pass after a rest in which the Loading Agents have filled the buffers; see `schedule.rested`."""
    speed = Rates.of(manifest, profile, plan.threads)
    work = _work(manifest, first_places(manifest.shards), plan, speed.times[plan.threads])
    return _simulate(rested(work, plan.buffers), plan, speed.bandwidth(plan.loaders), profile).first_s


def budget_for_latency(
    manifest: Manifest,
    profile: Profile,
    latency_s: float,
    *,
    needs: Needs,
    loaders: int | None = None,
    threads: int | None = None,
) -> Plan | None:
    """The plan with the smallest budget whose steady pass takes no longer than `latency_s`; None when none does.

    Args:
        manifest: the model.
        profile: a measured one.
        latency_s: the target.
        needs: as for `make_plan`, as are loaders and threads.
        loaders: number of Loading Agents.
        threads: intra-op threads.
    """

    def plan(budget_bytes: int) -> Plan:
        return make_plan(manifest, profile, budget_bytes=budget_bytes, needs=needs, loaders=loaders, threads=threads)

    def meets(plan: Plan) -> bool:
        assert plan.steady_pass_s is not None, "the profile was not measured"
        return plan.steady_pass_s <= latency_s

    least, most = least_budget_bytes(manifest, profile, needs, threads=threads), AMPLE_BYTES
    if meets(smallest := plan(least)):
        return smallest
    if not meets(plan(most)):
        return None
    while most - least > _ROUND_BYTES:
        middle = (least + most) // 2
        if meets(plan(middle)):
            most = middle
        else:
            least = middle
    return plan(most)


def _work(
    manifest: Manifest, firsts: Sequence[int], layout: Layout | Plan, times: Mapping[str, ShardTimes]
) -> list[ShardWork]:
    work = []
    for place, (shard, first) in enumerate(zip(manifest.shards, firsts, strict=True)):
        own = times[shard.name]
        resident = shard.name in layout.resident
        begin, end = layout.partly_resident.get(shard.name, (0, shard.nbytes))
        packed = shard.packed or (layout.packed if resident else layout.packed_streamed)
        # A resident shard has the computer to itself while nothing is streamed; only reading slows computing down.
        slowdown = max(1.0, own.loading_run_s / own.run_s) if own.run_s else 1.0
        run_s = own.packed_run_s if packed else own.run_s
        work.append(
            ShardWork(
                # What an earlier shard has brought into memory to stay is not read again.
                cold_bytes=0 if resident and first != place else shard.nbytes,
                steady_bytes=0 if resident else end - begin,
                streamed=not resident,
                session_s=own.pack_s if packed and not resident else own.session_s,
                run_s=run_s,
                loading_run_s=run_s * slowdown,
            )
        )
    return work


def _simulate(work: Sequence[ShardWork], layout: Layout | Plan, read_bytes_per_s: float, profile: Profile) -> Schedule:
    return simulate(
        work,
        loaders=layout.loaders,
        buffers=layout.buffers,
        sessions=layout.sessions,
        read_bytes_per_s=read_bytes_per_s,
        threads=layout.threads,
        cores=profile.cores,
        loading_cores=_loading_cores(profile, layout.threads),
    )


def _loading_cores(profile: Profile, threads: int) -> int:
    """Processors that only Loading Agents have, beside this many threads that compute; no more than a quota allows."""
    own = reading_cores(profile.core_capacities, threads) - computing_cores(profile.core_capacities, threads)
    return min(len(own), profile.cores)


def _preferred(equal: Sequence[tuple[Layout, Schedule]]) -> tuple[Layout, Schedule]:
    """Among equally fast layouts: not packed, early with the first answer, a session for each buffer (packed into the
    memory of the one before), one buffer to spare, little to read.
    """
    first_s = min(schedule.first_s for _, schedule in equal)

    def order(pair: tuple[Layout, Schedule]) -> tuple[Any, ...]:
        layout, schedule = pair
        late = schedule.first_s > first_s * (1 + _LATE)
        spare = abs(layout.buffers - layout.loaders - 1) if layout.buffers else 0
        apart = layout.sessions is not None
        return layout.packed, late, apart, spare, layout.streamed_bytes, layout.loaders, layout.threads

    return min(equal, key=order)


def _too_small(
    manifest: Manifest, profile: Profile, budget_bytes: int, needs: Needs, threads: int | None
) -> BudgetError:
    largest = max(manifest.shards, key=lambda shard: shard.memory_bytes)
    needed = least_budget_bytes(manifest, profile, needs, threads=threads)
    left = max(0, budget_bytes - _beside_bytes(profile, needs))
    return BudgetError(
        f"A memory budget of {format_bytes(budget_bytes)} cannot work for this model: the smallest that can is "
        f"{format_bytes(needed)} = {format_bytes(process_bytes(profile))} process and runtime + "
        f"{format_bytes(needs.pass_bytes)} activations + "
        f"{format_bytes(needs.cache_bytes)} caches + the largest shard '{largest.name}' with "
        f"{format_bytes(largest.memory_bytes)} ({format_bytes(left)} were left for it), "
        f"rounded up. Raise the budget to at least {needed} bytes, or pass smaller inputs.",
        needed_bytes=needed,
        budget_bytes=budget_bytes,
    )
