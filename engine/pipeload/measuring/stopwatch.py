"""Times every shard of a model, on its real inputs, with one shard in memory at a time.

```
each shard              read | first run, whose memory counts | session, run | session, run | session, run
three of a structure    beside a reader: session, run ...     | packed session, run, run ...
```
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from types import MappingProxyType, SimpleNamespace
from typing import cast

import numpy as np

from pipeload.format.manifest import Manifest, Shard
from pipeload.format.placement import place
from pipeload.machine.cores import computing_cores, pin, reading_cores
from pipeload.machine.heap import trim
from pipeload.machine.memory import auto_budget_bytes, peak_rss_bytes, reset_peak_rss, rss_bytes
from pipeload.machine.threads import together
from pipeload.measuring.bandwidth import REQUEST_BYTES, filled_buffer
from pipeload.measuring.lasting import LastingClock
from pipeload.notify import Notify
from pipeload.pipeline.session import ShardSession, Stopper, Value, to_array, to_value
from pipeload.pipeline.sweep import Feed, Sweep
from pipeload.planning.needs import in_arena
from pipeload.planning.profile import ShardTimes
from pipeload.storage.buffers import Part
from pipeload.storage.weights import Storage
from pipeload.storage.widening import widen

__all__ = ["Stopwatch"]

_RUNS = 3
_CHOSEN_RUNS, _CHOSEN_S = 10, 0.15
"""Timings taken on sample shards only repeat until either limit is reached, and at least `_RUNS` times."""

_PACKING_FACTOR = 2.5
"""Making a packed session takes up to this many times the shard's bytes, beside the buffer."""


class Stopwatch:
    """Runs the shards one after another, each on the outputs of those before it, and times them.

    Where cores differ, the calling thread goes from those that make sessions to those that compute, as a pipeline's
    agents are placed, and stays on the last ones.

    Args:
        storage: the model's files.
        manifest: the model.
        threads: numbers of intra-op threads.
        progress: called with (what, done, total).
        capacities: see `core_capacities`.

    Attributes:
        activation_bytes: the most that a shard was seen to need beside weights, its inputs and outputs included; None
            where the system does not tell.
        settled_bytes: memory of the process, beside weights and tensors, after it had run the largest shard once.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        threads: Sequence[int],
        progress: Notify,
        capacities: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self._storage, self._manifest, self._threads, self._progress = storage, manifest, threads, progress
        self._capacities = capacities
        self._clock = LastingClock()
        self._buffer = filled_buffer(max(shard.nbytes for shard in manifest.shards))
        self._placements = {shard.name: place(shard, (0, 0)) for shard in manifest.shards}
        self._wide = filled_buffer(max(placement.nbytes for placement in self._placements.values()))
        self._largest = max(manifest.shards, key=lambda shard: shard.nbytes).name
        self.activation_bytes: int | None = None
        self.settled_bytes = 0
        # (field of ShardTimes, threads, name of the shard or structure) -> seconds that were seen.
        self._seen: dict[tuple[str, int, str], list[float]] = defaultdict(list)
        self._chosen = _chosen(manifest.shards)
        used = {name for shard in manifest.shards for name in shard.inputs}
        self._unused = manifest.cache_outputs - used

    def run(self, inputs: Mapping[str, Value]) -> dict[int, dict[str, ShardTimes]]:
        """Intra-op threads -> shard name -> seconds. May be called once.

        Args:
            inputs: every graph input, caches included.

        Raises:
            ConfigError: an index is beyond its table.
            ShardError, LoadError, RunError: a shard cannot be read, made or run.
        """
        sweep = Sweep(self._manifest, self._storage)
        try:
            self._progress("Running", 0, len(self._manifest.shards))
            sweep.run([Feed(pieces=[inputs], positions=1 if self._manifest.caches else None)], self._borrow)
        finally:
            self._buffer.close()
            self._wide.close()
        return {
            threads: {shard.name: self._times(threads, shard) for shard in self._manifest.shards}
            for threads in self._threads
        }

    def _times(self, threads: int, shard: Shard) -> ShardTimes:
        def typical(kind: str, name: str) -> float:
            return median(self._seen[kind, threads, name])

        session_s, run_s = typical("session_s", shard.name), typical("run_s", shard.name)
        packed = ("pack_s", threads, shard.structure) in self._seen
        return ShardTimes(
            session_s=session_s,
            run_s=run_s,
            loading_run_s=typical("loading_run_s", shard.structure),
            # Where there was no room to pack, nothing is gained by it. What is always packed was timed as a session.
            pack_s=typical("pack_s", shard.structure) if packed else session_s,
            packed_run_s=typical("packed_run_s", shard.structure) if packed else run_s,
        )

    @contextmanager
    def _borrow(self, index: int) -> Iterator[ShardSession]:
        shard = self._manifest.shards[index]
        self._storage.read_weights(shard, [Part(0, shard.nbytes, self._buffer)], lambda: False)
        # A pass runs each session only once.
        yield cast(ShardSession, SimpleNamespace(run=partial(self._measure, shard)))
        self._progress("Running", index + 1, len(self._manifest.shards))

    def _measure(
        self, shard: Shard, inputs: Mapping[str, Value], stopper: Stopper, in_place: Mapping[str, Value] | None = None
    ) -> list[Value]:
        def run(session: ShardSession) -> list[Value]:
            return list(session.run(inputs, stopper, in_place))

        # Work of the first run only, such as loading code, is no part of any time.
        results = run(self._open(shard, self._threads[0]))
        passed_bytes = sum(to_array(value).nbytes for value in inputs.values())
        if shard.name == self._largest:
            trim()
            made_bytes = sum(to_array(value).nbytes for value in results)
            self.settled_bytes = rss_bytes() - self._buffer.nbytes - self._wide.nbytes - passed_bytes - made_bytes
        if shard.name in self._chosen:
            # Memory that an arena keeps for the next run would not be seen.
            self._watch_memory(passed_bytes, lambda: run(self._open(shard, self._threads[0], arena=False)))
        for threads in self._threads:
            for session_s, run_s in self._stream(shard, threads, run, 0.0):
                self._seen["session_s", threads, shard.name].append(session_s)
                self._seen["run_s", threads, shard.name].append(run_s)
            if shard.name in self._chosen:
                beside = partial(self._stream, shard, threads, run, _CHOSEN_S)
                for _, run_s in self._beside_reader(shard, beside, reading_cores(self._capacities, threads)):
                    self._seen["loading_run_s", threads, shard.structure].append(run_s)
                if not shard.packed and _PACKING_FACTOR * shard.memory_bytes <= auto_budget_bytes() - rss_bytes():
                    pack_s, runs = self._pack(shard, threads, run)
                    self._seen["pack_s", threads, shard.structure].append(pack_s)
                    self._seen["packed_run_s", threads, shard.structure].extend(runs)
        # New caches of all blocks together may be larger than a shard, and no later shard takes them.
        empty = to_value(np.zeros(0, np.float32))
        return [empty if name in self._unused else value for name, value in zip(shard.outputs, results, strict=True)]

    def _watch_memory(self, passed_bytes: int, job: Callable[[], object]) -> None:
        trim()
        before_bytes = rss_bytes()
        if reset_peak_rss():
            job()
            needed_bytes = max(0, peak_rss_bytes() - before_bytes) + passed_bytes
            self.activation_bytes = max(self.activation_bytes or 0, needed_bytes)

    def _stream(
        self, shard: Shard, threads: int, run: Callable[[ShardSession], object], enough_s: float
    ) -> list[tuple[float, float]]:
        """Seconds to widen and to make a session, and of its first run: a streamed shard's session gets no other."""
        seen: list[tuple[float, float]] = []
        while _go_on([run_s for _, run_s in seen], enough_s):
            begin = self._clock.now()
            session = self._open(shard, threads)
            session_s, middle = self._clock.since(begin), self._clock.now()
            run(session)
            seen.append((session_s, self._clock.since(middle)))
            del session
        return seen

    def _pack(self, shard: Shard, threads: int, run: Callable[[ShardSession], object]) -> tuple[float, list[float]]:
        """Seconds to widen and to pack, and of the runs but the first: a packed shard's session stays."""
        runs: list[float] = []
        trim()
        begin = self._clock.now()
        session = self._open(shard, threads, packed=True)
        pack_s = self._clock.since(begin)
        run(session)
        while _go_on(runs, _CHOSEN_S):
            begin = self._clock.now()
            run(session)
            runs.append(self._clock.since(begin))
        return pack_s, runs

    def _beside_reader(
        self, shard: Shard, job: Callable[[], list[tuple[float, float]]], cores: Collection[int] = ()
    ) -> list[tuple[float, float]]:
        """Do the job while an agent reads the other shards, again and again."""
        others = [other for other in self._manifest.shards if other.nbytes and other.name != shard.name] or [shard]
        reading, over = threading.Event(), threading.Event()
        scratch = filled_buffer(REQUEST_BYTES[0])

        def read() -> list[tuple[float, float]]:
            try:
                pin(0, cores)
                while not over.is_set():
                    for _ in (nbytes for other in others for nbytes in self._storage.stream_weights(other, scratch)):
                        reading.set()
                        if over.is_set():
                            break
                return []
            finally:
                reading.set()

        def work() -> list[tuple[float, float]]:
            try:
                reading.wait()
                return job()
            finally:
                over.set()

        try:
            # In this order, so that it is the reader's error that is raised when both fail.
            return together([read, work])[1]
        finally:
            scratch.close()

    def _open(self, shard: Shard, threads: int, *, packed: bool = False, arena: bool = True) -> ShardSession:
        computing = computing_cores(self._capacities, threads)
        pin(0, reading_cores(self._capacities, threads))
        parts = [Part(0, shard.nbytes, self._buffer)]
        placement = self._placements[shard.name]
        if placement.places:
            parts.append(Part(0, 0, self._wide, placement))
            widen(shard, parts)
        arena = arena and in_arena(self._manifest)
        graph = self._storage.graph(shard)
        session = ShardSession(
            shard, graph, parts, threads, packed=packed or shard.packed, arena=arena, cores=computing
        )
        pin(0, computing)
        return session


def _go_on(seconds: Sequence[float], enough_s: float) -> bool:
    return len(seconds) < _RUNS or (sum(seconds) < enough_s and len(seconds) < _CHOSEN_RUNS)


def _chosen(shards: Sequence[Shard]) -> set[str]:
    """Names of the first, middle and last shard of each structure: a moment of noise affects only one of them."""
    alike: dict[str, list[str]] = defaultdict(list)
    for shard in shards:
        alike[shard.structure].append(shard.name)
    return {name for names in alike.values() for name in (names[0], names[len(names) // 2], names[-1])}
