"""manifest + profile + budget -> Plan. Pure: no I/O, no threads.

Memory of the process, from the bottom:

```
budget  ------------------------------------------------------------
        | packing        a copy of one shard while it is packed     |
        | buffers        what is streamed of a shard, in each       |
        | resident       shards that stay between passes            |
        | kept           beginnings of shards that stay             |
        | caches         KV caches of open decode states            |
        | pass           activations, edges, outputs of one pass    |
        | runtime        onnxruntime's code and heap, once it runs  |
        | process        interpreter, libraries, the host's data    |
0       ------------------------------------------------------------
```

A shard is resident (stays in memory, with its session), streamed (read for every pass), or partly resident: the first
tensors of its file are kept and the others are streamed. When a part of every shard is kept, the buffers need to hold
only the rest, so memory that they do not need becomes memory that need not be read again. That is why there is no
cliff between a model that fits and one that does not. Resident shards are spread evenly among the streamed ones, so
that reading never pauses. There is no LRU: a cyclic scan that is larger than a cache hits nothing in it.

The planner enumerates Loading Agents, buffers, their size, and whether resident shards are packed (laid out for the
CPU); fills what memory is left with shards in their order of residence; simulates the schedule of each
(`pipeload.schedule`); and takes the fastest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from pipeload.buffers import page_ceil, page_floor
from pipeload.errors import BudgetError
from pipeload.manifest import Manifest, Shard
from pipeload.memory import format_bytes
from pipeload.profile import Profile, ShardTimes
from pipeload.schedule import Schedule, ShardWork, simulate

__all__ = [
    "ASSUMED_READ_BYTES_PER_S",
    "LOADERS",
    "SESSION_BYTES",
    "Plan",
    "budget_for_latency",
    "make_plan",
    "predict",
    "process_bytes",
    "times_of",
    "with_needs",
]

_RUNTIME_BYTES = 18_000_000
"""onnxruntime's code pages, thread stacks and heap, which appear with the first pass."""
SESSION_BYTES = 400_000
"""One session beside its weights: graph, kernels, thread pool."""
_SMALL_SHARE = 0.1
"""A shard below this part of the largest is made resident first: it saves a session, and costs next to nothing."""
_TINY_SHARE = 0.02
"""The beginning of a shard that is kept, and the rest, are at least this part of it."""
_CACHED_SHARE = 0.9
"""Reading through the page cache must be faster by more than this: it takes processor time."""
_ROUND_BYTES = 1_000_000
_LEAST_SPARE_BYTES = 1_000_000
_SPARE_SHARE = 0.005
"""Not planned for: what the heap keeps is known that well."""
LOADERS = (1, 2, 4)
"""Numbers of Loading Agents that are tried. More were never faster on a disk that is read in large pieces."""
_BUFFER_SIZES = 12
"""Most sizes of a buffer that are tried."""
_CLOSE = 0.005
"""Plans whose predicted times differ by less are equal: the one that reads less, with fewer agents, wins."""
_FEWER_THREADS = 1.1
"""Fewer threads than there are cores must be faster by this factor: what was measured may have met other work."""
_LATE = 0.02
"""A first pass that is longer by more than this counts, when steady passes are equal."""
ASSUMED_READ_BYTES_PER_S = 1e9
_ASSUMED_RUN_BYTES_PER_S = 4e9
_ASSUMED_PACK_BYTES_PER_S = 0.7e9
_ASSUMED_PACKED_SHARE = 0.9
_ASSUMED_SESSION_S = 0.002
"""Without a profile: a middling disk, and computing that is bound by memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one model runs under one budget.

    Attributes:
        budget_bytes: the most memory that the whole process may use.
        loaders: number of Loading Agents.
        buffers: streamed shards that are in memory together: one runs, the others are being read or wait.
        buffer_bytes: size of each buffer; 0 when nothing is streamed.
        resident: names of the shards that stay in memory between passes.
        kept: name of a partly resident shard -> bytes at its beginning that stay in memory.
        packed: resident shards are laid out for the CPU (prepacked), one after another once the first pass is over.
        packed_streamed: streamed shards are prepacked by the Loading Agents.
        direct: read past the page cache.
        threads: intra-op threads of a session.
        process_bytes, pass_bytes, cache_bytes, packing_bytes: see the picture above; process_bytes includes the
            runtime.
        resident_bytes: weights that stay in memory between passes, kept beginnings included.
        streamed_bytes: weights that are read in every steady pass.
        peak_bytes: predicted peak of the process.
        first_pass_s, steady_pass_s: predicted seconds; None when the profile was not measured.
    """

    budget_bytes: int
    loaders: int
    buffers: int
    buffer_bytes: int
    resident: frozenset[str]
    kept: dict[str, int] = field(default_factory=dict)
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
        """What all weights may occupy together: resident shards, kept beginnings and buffers."""
        return self.peak_bytes - self.process_bytes - self.pass_bytes - self.cache_bytes - self.packing_bytes

    @property
    def layout(self) -> tuple[object, ...]:
        """What cannot change while shards are loaded."""
        streaming = self.loaders, self.buffers, self.buffer_bytes, self.packed_streamed, self.direct
        return self.resident, self.kept, self.packed, self.threads, streaming


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
    """The fastest plan under the budget.

    Args:
        manifest: the model.
        profile: the machine and the process.
        budget_bytes: the most memory that the whole process may use.
        pass_bytes: what one pass needs beside weights (`footprint.pass_bytes`).
        cache_bytes: what open decode states need.
        loaders: number of Loading Agents; None chooses.
        threads: intra-op threads; None chooses.

    Raises:
        BudgetError: not even one buffer for the largest shard fits.
    """
    process = process_bytes(profile)
    fixed = process + pass_bytes + cache_bytes
    speed = _Speed.of(manifest, profile, threads)
    free = budget_bytes - fixed - _spare_bytes(budget_bytes)
    found: list[tuple[_Layout, Schedule]] = []
    fastest_s = float("inf")
    most_threads = max(speed.times)
    for layout in _layouts(manifest.shards, free, speed, loaders):
        work = speed.work(manifest.shards, layout)
        bandwidth = speed.bandwidth(layout.loaders)
        least_s = max(sum(shard.run_s for shard in work), layout.streamed_bytes / bandwidth)
        if least_s > fastest_s * (1 + _CLOSE):
            continue
        schedule = simulate(work, loaders=layout.loaders, buffers=layout.buffers, read_bytes_per_s=bandwidth)
        if layout.threads < most_threads and schedule.steady_s * _FEWER_THREADS > fastest_s:
            continue
        fastest_s = min(fastest_s, schedule.steady_s)
        found.append((layout, schedule))
    if not found:
        raise _too_small(manifest, budget_bytes, process, pass_bytes, cache_bytes)
    layout, schedule = _preferred([pair for pair in found if pair[1].steady_s <= fastest_s * (1 + _CLOSE)])
    return Plan(
        budget_bytes=budget_bytes,
        loaders=layout.loaders,
        buffers=layout.buffers,
        buffer_bytes=layout.buffer_bytes,
        resident=layout.resident,
        kept=layout.kept,
        packed=layout.packed,
        packed_streamed=layout.packed_streamed,
        direct=speed.direct,
        threads=layout.threads,
        process_bytes=process,
        pass_bytes=pass_bytes,
        cache_bytes=cache_bytes,
        packing_bytes=layout.packing_bytes,
        resident_bytes=manifest.weight_bytes - layout.streamed_bytes,
        streamed_bytes=layout.streamed_bytes,
        peak_bytes=fixed + layout.used_bytes,
        first_pass_s=schedule.first_s if profile.measured else None,
        steady_pass_s=schedule.steady_s if profile.measured else None,
    )


def process_bytes(profile: Profile) -> int:
    """What the process occupies beside weights, passes and caches once onnxruntime runs."""
    return profile.process_bytes + _RUNTIME_BYTES


def with_needs(plan: Plan, profile: Profile, pass_bytes: int, cache_bytes: int, budget_bytes: int) -> Plan:
    """The same layout for passes with other needs; its peak may be above the budget."""
    process = process_bytes(profile)
    needs = process + pass_bytes + cache_bytes
    return replace(
        plan,
        budget_bytes=budget_bytes,
        process_bytes=process,
        pass_bytes=pass_bytes,
        cache_bytes=cache_bytes,
        peak_bytes=needs + plan.packing_bytes + plan.weights_bytes,
    )


def times_of(manifest: Manifest, profile: Profile, threads: int) -> Mapping[str, ShardTimes]:
    """Times of every shard with so many threads, measured or assumed."""
    return _Speed.of(manifest, profile, threads).times[threads]


def predict(manifest: Manifest, profile: Profile, plan: Plan) -> Schedule | None:
    """What a measured profile says about the passes of a plan that was made by another one; None without."""
    if not profile.measured:
        return None
    speed = _Speed.of(manifest, profile, plan.threads)
    work = [_work(shard, plan, speed.times[plan.threads][shard.name]) for shard in manifest.shards]
    bandwidth = speed.bandwidth(plan.loaders)
    return simulate(work, loaders=plan.loaders, buffers=plan.buffers, read_bytes_per_s=bandwidth)


def budget_for_latency(
    manifest: Manifest, profile: Profile, latency_s: float, *, pass_bytes: int, cache_bytes: int = 0, **options: Any
) -> Plan | None:
    """The plan with the smallest budget whose steady pass takes no longer than `latency_s`; None when none does.

    Args:
        manifest: the model.
        profile: a measured one.
        latency_s: the target.
        pass_bytes: as for `make_plan`.
        cache_bytes: as for `make_plan`.
        **options: `loaders` and `threads` of `make_plan`.
    """

    def plan(budget_bytes: int) -> Plan:
        return make_plan(
            manifest, profile, budget_bytes=budget_bytes, pass_bytes=pass_bytes, cache_bytes=cache_bytes, **options
        )

    # Above this everything is resident and packed, and more memory is of no use.
    most = process_bytes(profile) + pass_bytes + cache_bytes + 2 * _all_bytes(manifest.shards)
    try:
        least = plan(1).budget_bytes
    except BudgetError as error:
        least = error.needed_bytes
    most = max(most, least)
    if (plan(most).steady_pass_s or 0.0) > latency_s:
        return None
    while most - least > _ROUND_BYTES:
        middle = (least + most) // 2
        if (plan(middle).steady_pass_s or 0.0) <= latency_s:
            most = middle
        else:
            least = middle
    return plan(least) if (plan(least).steady_pass_s or 0.0) <= latency_s else plan(most)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """One way to use the memory that is left for weights."""

    loaders: int = 1
    buffers: int
    buffer_bytes: int
    resident: frozenset[str]
    kept: dict[str, int]
    packed: bool
    packed_streamed: bool
    packing_bytes: int
    used_bytes: int
    streamed_bytes: int
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Speed:
    """The profile, or what is assumed without one."""

    read_bytes_per_s: Mapping[int, float]
    direct: bool
    times: Mapping[int, Mapping[str, ShardTimes]]
    measured: bool

    @classmethod
    def of(cls, manifest: Manifest, profile: Profile, threads: int | None) -> _Speed:
        direct, cached = profile.read_bytes_per_s, profile.cached_read_bytes_per_s
        prefer_cached = bool(cached) and max(cached.values()) * _CACHED_SHARE > max(direct.values(), default=0.0)
        bandwidth = cached if prefer_cached else direct
        times: Mapping[int, Mapping[str, ShardTimes]] = profile.times
        if times and threads is not None:
            # Nobody measured with so many threads: the nearest number tells at least what is fast and what is slow.
            nearest = min(times, key=lambda number: abs(number - threads))
            times = {threads: times[nearest]}
        if not times:
            times = {threads or profile.cores: {shard.name: _assumed_times(shard) for shard in manifest.shards}}
        assumed = dict.fromkeys(LOADERS, ASSUMED_READ_BYTES_PER_S)
        return cls(
            read_bytes_per_s=bandwidth or assumed,
            direct=not prefer_cached,
            times=times,
            measured=bool(bandwidth),
        )

    def bandwidth(self, loaders: int) -> float:
        # More agents never read more slowly; where they seem to, the disk had something else to do meanwhile.
        known = [number for number in self.read_bytes_per_s if number <= loaders] or [min(self.read_bytes_per_s)]
        return max(self.read_bytes_per_s[number] for number in known)

    def packing_streamed_pays(self, threads: int) -> bool:
        """For weights that onnxruntime handles far better packed than not (int4 and int8 matrices)."""
        times = self.times[threads].values()
        return sum(t.run_s for t in times) > sum(t.packed_run_s + t.pack_s for t in times)

    def work(self, shards: Sequence[Shard], layout: _Layout) -> list[ShardWork]:
        return [_work(shard, layout, self.times[layout.threads][shard.name]) for shard in shards]


def _work(shard: Shard, layout: _Layout | Plan, times: ShardTimes) -> ShardWork:
    resident = shard.name in layout.resident
    packed = layout.packed if resident else layout.packed_streamed
    # A resident shard has a computer to itself while nothing is streamed; what slows computing down is the reading.
    slowdown = times.loading_run_s / times.run_s if times.run_s else 1.0
    run_s = times.packed_run_s if packed else times.run_s
    return ShardWork(
        cold_bytes=shard.nbytes,
        steady_bytes=0 if resident else shard.nbytes - layout.kept.get(shard.name, 0),
        streamed=not resident,
        session_s=times.pack_s if packed and not resident else times.session_s,
        run_s=run_s,
        loading_run_s=run_s * max(1.0, slowdown),
    )


def _preferred(equal: Sequence[tuple[_Layout, Schedule]]) -> tuple[_Layout, Schedule]:
    """Among equally fast layouts: not packed, early with the first answer, one buffer to spare, little to read."""
    first_s = min(schedule.first_s for _, schedule in equal)

    def order(pair: tuple[_Layout, Schedule]) -> tuple[Any, ...]:
        layout, schedule = pair
        late = schedule.first_s > first_s * (1 + _LATE)
        spare = abs(layout.buffers - layout.loaders - 1) if layout.buffers else 0
        return layout.packed, late, spare, layout.streamed_bytes, layout.loaders, layout.threads

    return min(equal, key=order)


def _layouts(shards: Sequence[Shard], free: int, speed: _Speed, loaders: int | None) -> Iterator[_Layout]:
    """Every layout that is worth a look and fits into `free` bytes."""
    order = _residence_order(shards)
    counts = [loaders] if loaders else [n for n in speed.read_bytes_per_s if n in LOADERS]
    sizes = _buffer_sizes(shards)
    slots = [(count, buffers, size) for count in counts for buffers in range(1, count + 2) for size in sizes]
    slots += [(count, 0, 0) for count in counts]
    for threads in sorted(speed.times, reverse=True):
        # Where it pays there may yet be no memory for the packed copies.
        ways = (False, True) if speed.packing_streamed_pays(threads) else (False,)
        for packed, pack_streamed in product((False, True), ways):
            for count, buffers, size in slots:
                layout = _fill(shards, order, free, buffers, size, packed=packed, pack_streamed=pack_streamed)
                if layout is not None:
                    yield replace(layout, loaders=count, threads=threads)


def _fill(
    shards: Sequence[Shard],
    order: Sequence[Shard],
    free: int,
    buffers: int,
    buffer_bytes: int,
    *,
    packed: bool,
    pack_streamed: bool,
) -> _Layout | None:
    """Fill the memory beside the buffers with what need not be read again; None when the layout does not fit."""
    packing = max(_packing_bytes(shard) for shard in shards) if packed else 0
    copy_bytes = buffer_bytes if pack_streamed else 0
    used = packing + buffers * (buffer_bytes + copy_bytes + SESSION_BYTES)
    # The packed copy of a streamed shard takes memory for all of it.
    places = {shard.name: [0] if pack_streamed else _places(shard) for shard in shards}
    kept: dict[str, int] = {}
    for shard in shards:
        # No more may be streamed of a shard than a buffer holds.
        least = next((p for p in places[shard.name] if _streamed_bytes(shard, p) <= buffer_bytes), shard.nbytes)
        if shard.nbytes == 0 and not buffers:
            least = 0
        kept[shard.name] = least
        used += page_ceil(least)
    whole = {shard.name for shard in shards if not buffers or (kept[shard.name] == shard.nbytes and shard.nbytes)}
    used += len(whole) * SESSION_BYTES
    if used > free:
        return None
    for shard in order:
        extra = page_ceil(shard.nbytes) - page_ceil(kept[shard.name]) + SESSION_BYTES
        if shard.name not in whole and used + extra <= free:
            whole.add(shard.name)
            used += extra
    for shard in order:
        if shard.name in whole:
            continue
        more = [p for p in places[shard.name] if used + page_ceil(p) - page_ceil(kept[shard.name]) <= free]
        if more and more[-1] > kept[shard.name]:
            used += page_ceil(more[-1]) - page_ceil(kept[shard.name])
            kept[shard.name] = more[-1]
    streamed = [shard for shard in shards if shard.name not in whole]
    if bool(buffers) != bool(streamed) or buffers > len(streamed):
        return None
    parts = {shard.name: kept[shard.name] for shard in streamed if kept[shard.name]}
    return _Layout(
        buffers=buffers,
        buffer_bytes=buffer_bytes,
        resident=frozenset(whole),
        kept=parts,
        packed=packed,
        packed_streamed=pack_streamed and bool(streamed),
        packing_bytes=packing,
        used_bytes=used,
        streamed_bytes=sum(shard.nbytes - parts.get(shard.name, 0) for shard in streamed),
    )


def _places(shard: Shard) -> list[int]:
    """Bytes of a shard that may be kept while the rest is streamed: whole tensors, in the order of the file."""
    if shard.weights is None:
        return [0]
    # Tiny tensors at the end of a shard are not worth a place of their own.
    step = shard.nbytes * _TINY_SHARE
    places = [0]
    for spec in shard.tensors:
        place = spec.offset - shard.weights.offset
        if place - places[-1] >= step and shard.nbytes - place >= step:
            places.append(place)
    return places


def _streamed_bytes(shard: Shard, kept: int) -> int:
    """What a buffer must hold of a shard."""
    return page_ceil(shard.nbytes) - page_floor(kept)


def _buffer_sizes(shards: Sequence[Shard]) -> list[int]:
    """Sizes of a buffer worth a try: what can be left of the largest shards."""
    largest = max(shard.nbytes for shard in shards)
    sizes = {_streamed_bytes(s, p) for s in shards for p in _places(s) if s.nbytes > largest * _SMALL_SHARE}
    ordered = sorted(sizes or {page_ceil(largest)}, reverse=True)
    step = -(-len(ordered) // _BUFFER_SIZES)
    return ordered[::step]


def _packing_bytes(shard: Shard) -> int:
    """What packing one shard takes beside its buffer: the packed copy, and once more the tensor in work."""
    largest = max((spec.nbytes for spec in shard.tensors), default=shard.nbytes)
    return page_ceil(shard.nbytes) + page_ceil(largest) + SESSION_BYTES


def _assumed_times(shard: Shard) -> ShardTimes:
    run_s = shard.nbytes / _ASSUMED_RUN_BYTES_PER_S
    return ShardTimes(
        session_s=_ASSUMED_SESSION_S,
        run_s=run_s,
        loading_run_s=run_s,
        pack_s=shard.nbytes / _ASSUMED_PACK_BYTES_PER_S,
        packed_run_s=run_s * _ASSUMED_PACKED_SHARE,
    )


def _residence_order(shards: Sequence[Shard]) -> list[Shard]:
    """Shards in the order in which they become resident."""
    largest = max(shard.nbytes for shard in shards)
    small = [shard for shard in shards if shard.nbytes <= largest * _SMALL_SHARE]
    rest = [shard for shard in shards if shard.nbytes > largest * _SMALL_SHARE]
    return small + [rest[place] for place in _spread(len(rest))]


def _spread(count: int) -> list[int]:
    """0 .. count - 1 so that the first k of them are far apart, for every k (van der Corput's sequence)."""
    bits = count.bit_length() + 1
    reversals = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits if count else 0))
    return list(dict.fromkeys(reversal * count >> bits for reversal in reversals))


def _all_bytes(shards: Sequence[Shard]) -> int:
    return sum(page_ceil(shard.nbytes) + SESSION_BYTES for shard in shards)


def _spare_bytes(budget_bytes: int) -> int:
    return max(_LEAST_SPARE_BYTES, int(budget_bytes * _SPARE_SHARE))


def _too_small(
    manifest: Manifest, budget_bytes: int, process_bytes: int, pass_bytes: int, cache_bytes: int
) -> BudgetError:
    fixed = process_bytes + pass_bytes + cache_bytes
    largest = max(manifest.shards, key=lambda shard: shard.nbytes)
    needed = fixed + page_ceil(largest.nbytes) + SESSION_BYTES + 2 * _LEAST_SPARE_BYTES
    needed = max(needed, int(needed / (1 - 2 * _SPARE_SHARE)))
    needed = (needed // _ROUND_BYTES + 1) * _ROUND_BYTES
    return BudgetError(
        f"A memory budget of {format_bytes(budget_bytes)} cannot work for this model: the smallest that can is "
        f"{format_bytes(needed)} = {format_bytes(process_bytes)} process and runtime + {format_bytes(pass_bytes)} "
        f"activations + {format_bytes(cache_bytes)} caches + the largest shard '{largest.name}' with "
        f"{format_bytes(largest.nbytes)} ({format_bytes(max(0, budget_bytes - fixed))} were left for it), rounded up. "
        f"Raise the budget to at least {needed} bytes, or pass smaller inputs.",
        needed_bytes=needed,
        budget_bytes=budget_bytes,
    )
