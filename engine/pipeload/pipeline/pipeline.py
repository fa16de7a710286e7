"""The pipeline of agents. The only module that starts threads: it spawns, cancels and joins them.

```
loader 0:   | read 0 | read 2 | read 4 |  ...         reserve -> read into a buffer -> session over the buffer
loader 1:   | read 1 | read 3 | read 5 |  ...
inference:           | run 0 | run 1 | run 2 | ...    in order; the output of shard i is the input of shard i + 1
daemon:                      | free 0 | free 1 | ...  session destroyed, buffer back to the pool, budget released
```

Prefetch goes on past the end of a pass: while the last shards run, and while nobody calls, the first streamed shards of
the next pass are read, as far as the budget lets them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeAlias

from pipeload.errors import BudgetError, ClosedError, ConfigError, LoadError, RunError
from pipeload.foreign import foreign_errors
from pipeload.format.manifest import Manifest, Shard
from pipeload.format.pages import page_ceil, room_bytes
from pipeload.machine.heap import limit_heap, trim, widen_heap
from pipeload.machine.memory import peak_rss_bytes, rss_bytes
from pipeload.machine.threads import Result
from pipeload.pipeline.agents import answer, daemon_agent, inference_agent, loading_agent
from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.lent_outputs import LentOutputs
from pipeload.pipeline.messages import LoadedShard, Task
from pipeload.pipeline.requests import Call, Request, Served
from pipeload.pipeline.reservations import Budget
from pipeload.pipeline.session import ShardSession, Value, shrink_arena
from pipeload.pipeline.sweep import Forward
from pipeload.planning.layouts import session_bytes, staying
from pipeload.planning.needs import in_arena
from pipeload.planning.planner import Plan
from pipeload.planning.replanner import Replanner
from pipeload.planning.schedule import roofline
from pipeload.storage.buffers import Buffer, BufferPool, Part
from pipeload.storage.weights import Storage
from pipeload.tracing.stats import PassStats, Stats, pass_stats
from pipeload.tracing.trace import Kind, Progress, Trace

__all__ = ["Pipeline"]

Coldness: TypeAlias = Literal["cold", "filling", "steady"]
"""A pass that reads everything, one that still loads shards that will stay, or one like all later ones."""

_HEAP_SLACK_BYTES = 256_000_000
"""More than a heap was ever seen to keep beside the tensors in it."""
_SPANS = 10_000
"""Kept in the trace, and as many samples: some tens of passes, in 3 MB that no plan counts."""
_HEAP_PLENTY_BYTES = 1_000_000_000
"""More than all arenas of a heap that may grow will keep."""
_GATHER_SHARE = 0.02
"""For this part of a sweep's time the next one waits for those whom it served together."""
_PLAN_FACT = "No room could be made for the pass"
_MEMORY_REMEDY = "Lower the memory budget, raise the limits of the process (ulimit -a), or end other programs."
_THREADS_REMEDY = "Raise the limit of processes and threads (ulimit -u), or end other programs."
_WATCH_S = 1.0
"""How often an idle model looks whether memory has become short."""


class Pipeline:
    """Agents that run one model under one budget.

    Args:
        manifest: the model.
        storage: its files.
        plan: how to begin.
        replanner: plans anew between passes.
        progress: called after each shard of each pass, by the Inference Agent.
    """

    def __init__(
        self,
        manifest: Manifest,
        storage: Storage,
        plan: Plan,
        replanner: Replanner,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._manifest = manifest
        self._storage = storage
        self._forward = Forward(manifest, storage)
        self._replanner = replanner
        self._progress = progress
        self._plan = plan
        self._needs = plan.pass_bytes, plan.cache_bytes
        self._kind: object = None
        self._budget = Budget(plan.weights_bytes)
        self._pool = BufferPool(plan.buffer_bytes, plan.buffers)
        self._exchange = Exchange()
        self._lent = LentOutputs()
        self._in_arena = in_arena(manifest)
        self.trace = Trace(_SPANS)
        self._passes = 0
        self._read_bytes = 0
        self._first_pass_s: float | None = None
        self._last_pass: PassStats | None = None
        self._unsettled_s: float | None = None
        self._counter = threading.Lock()
        self._closing = threading.Lock()
        self._gave_up_packing = False
        self._threads: list[threading.Thread] = []
        _bound_heap(plan)
        self._exchange.start(self._resident_flags(), plan.loaders, 1)
        try:
            self._spawn("inference", inference_agent, self._exchange, self._recover, self._settle)
            self._spawn("daemon", daemon_agent, self._exchange, self._free, self._watch, _WATCH_S)
            self._spawn_loaders()
        except BaseException:
            self.close()
            raise

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._plan

    @property
    def to_come_bytes(self) -> int:
        """Memory that the plan has for weights, caches and passes, and that is not occupied by weights yet."""
        plan = self._plan
        if self._exchange.closed:
            return 0
        occupied = self._budget.reserved_bytes + self._pool.idle_bytes
        return max(0, plan.peak_bytes - plan.process_bytes - occupied)

    @property
    def stats(self) -> Stats:
        """What happened so far."""
        bandwidths = self._replanner.profile.read_bytes_per_s.values()
        return Stats(
            passes=self._passes,
            read_bytes=self._read_bytes,
            first_pass_s=self._first_pass_s,
            last_pass_s=self._last_pass.seconds if self._last_pass else None,
            peak_bytes=peak_rss_bytes(),
            budget_bytes=self._plan.budget_bytes,
            peak_read_bytes_per_s=max(bandwidths, default=None),
            last=self._last_pass,
        )

    def submit(self, served: Served) -> Call[dict[str, Value]]:
        """Queue one pass; passes run in the order in which they were queued.

        While shards are streamed, one sweep serves all passes that wait when it begins.

        Returns:
            The outputs by name, when the pass is over. Waiting for them raises BudgetError when it does not fit the
            budget (nothing was read for it); ClosedError when the pipeline was closed before or during the pass; and
            whatever made a shard fail: the next call starts afresh.

        Raises:
            ClosedError: the pipeline is closed.
        """
        return self._call(self._sweep, served)

    def set_budget(self, budget_bytes: int | None) -> None:
        """Another budget, or None for what is free, from now on; memory beyond it is given back before this returns.

        Raises:
            BudgetError: it cannot work; the old one stays.
            ClosedError: the pipeline was closed.
        """

        def work(_: Request) -> None:
            with foreign_errors(LoadError, _PLAN_FACT, _MEMORY_REMEDY), self._replanner.trying(budget_bytes):
                self._prepare(strict=budget_bytes is None)

        self._call(work).result()

    def close(self) -> None:
        """End every call with ClosedError, join every thread, give all memory back. May be called again."""
        self._exchange.close()
        self._budget.close()
        if threading.current_thread() in self._threads:
            # The garbage collector may find an abandoned model in an agent, which cannot wait for itself.
            threading.Thread(target=self.close, name="pipeload-closer").start()
            return
        with self._closing:
            for thread in self._threads:
                thread.join()
            self._threads = []
            for index in self._exchange.residents:
                self._exchange.drop(index)
            self._exchange.reset(self._budget.wake)
            while (retired := self._exchange.next_retired()) is not None:
                self._free(retired)
            for index in self._exchange.kept:
                self._forget(index)
            self._pool.close()
            self._give_back()

    def _call(self, work: Callable[[Request], Result], served: Served | None = None) -> Call[Result]:
        if threading.current_thread() in self._threads:
            raise ConfigError("A progress callback runs inside a pass and cannot wait for another one. Call it later.")
        return Call(self._exchange, work, served)

    def _spawn(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name=f"pipeload-{name}", daemon=True)
        with foreign_errors(LoadError, f"The thread of the agent '{name}' cannot be started", _THREADS_REMEDY):
            thread.start()
        self._threads.append(thread)

    def _spawn_loaders(self) -> None:
        """As many Loading Agents as the plan has, and one more to pack while these wait for their turn to load.

        Those of an earlier plan that are too many find nothing to do.
        """
        running = sum(thread.name.startswith("pipeload-loader") for thread in self._threads)
        for number in range(running, self._plan.loaders + self._plan.packed):
            self._spawn(f"loader-{number}", loading_agent, self._exchange, self._load)

    # Loading Agents

    def _load(self, task: Task) -> LoadedShard | None:
        name = self._manifest.shards[task.index].name
        with foreign_errors(LoadError, f"Shard '{name}' could not be loaded", _MEMORY_REMEDY):
            return self._load_or_pack(task)

    def _load_or_pack(self, task: Task) -> LoadedShard | None:
        if task.packing:
            try:
                self._pack(task)
            except BaseException:
                # Whoever calls next gets the error, and from then on the shards run as they are.
                self._gave_up_packing = True
                self._exchange.pack(())
                raise
            finally:
                self._exchange.packed()
            return None
        shard = self._manifest.shards[task.index]
        plan, agent = self._plan, _agent()
        packed = plan.packed_streamed and not task.resident
        whole = 0, shard.nbytes
        begin, end = whole if task.resident else plan.partly_resident.get(shard.name, whole)
        # No other agent loads this shard now, so what it keeps is there, or is this one's to load.
        kept = self._exchange.kept.get(task.index, ())
        ranges = [] if kept else staying(shard, (begin, end))
        keep_bytes = sum(room_bytes(*part) for part in ranges)
        reserved = page_ceil(shard.nbytes) if task.resident else plan.buffer_bytes * (1 + packed)
        reserved += session_bytes(plan.threads)

        def stale() -> bool:
            return self._exchange.is_stale(task)

        with self.trace.span(agent, "reserve", shard.name, pass_number=task.pass_number):
            if not self._budget.reserve(reserved + keep_bytes, task.ticket, stale):
                return None
        loaded = LoadedShard(
            index=task.index, session=None, buffer=None, reserved_bytes=reserved, pooled=not task.resident
        )
        begun: list[Part] = []
        try:
            graph = self._storage.graph(shard)
            loaded.buffer = self._pool.take() if loaded.pooled else Buffer(shard.nbytes)
            begun.extend(Part(*part, Buffer(room_bytes(*part))) for part in ranges)
            missing = sorted([Part(begin, end, loaded.buffer), *begun], key=lambda part: part.begin)
            parts = [*missing, *kept]
            nbytes = sum(part.end - part.begin for part in missing)
            with self.trace.span(agent, "read", shard.name, nbytes=nbytes, pass_number=task.pass_number):
                complete = self._storage.read_weights(shard, missing, stale, direct=plan.direct)
            if complete:
                kind: Kind = "pack" if packed else "session"
                with self.trace.span(agent, kind, shard.name, pass_number=task.pass_number):
                    loaded.session = self._session(shard, graph, parts, packed=packed)
            with self._counter:
                self._read_bytes += nbytes if complete else 0
            self._sample()
        except BaseException:
            self._abandon(loaded, begun, keep_bytes)
            raise
        if not complete:
            self._abandon(loaded, begun, keep_bytes)
            return None
        if begun:
            self._exchange.keep(task.index, begun)
        return loaded

    def _session(self, shard: Shard, graph: Path, parts: Sequence[Part], *, packed: bool) -> ShardSession:
        try:
            return ShardSession(shard, graph, parts, self._plan.threads, packed=packed, arena=self._in_arena)
        except LoadError:
            # Where the file changed or vanished after it was checked, that is the true reason.
            self._storage.graph(shard)
            raise

    def _abandon(self, loaded: LoadedShard, begun: Sequence[Part], keep_bytes: int) -> None:
        try:
            for part in begun:
                part.buffer.close()
        finally:
            self._budget.release(keep_bytes)
            self._free(loaded)

    def _pack(self, task: Task) -> None:
        """Make a packed copy of a resident shard, from memory, and let it take the shard's place."""
        shard = self._manifest.shards[task.index]
        loaded = self._exchange.resident(task.index)
        if loaded.buffer is None or self._exchange.is_stale(task):
            return
        with self.trace.span(_agent(), "pack", shard.name):
            whole = [Part(0, shard.nbytes, loaded.buffer)]
            session = self._session(shard, self._storage.graph(shard), whole, packed=True)
        packed = LoadedShard(index=task.index, session=session, buffer=None, reserved_bytes=0, pooled=False)
        del session
        if self._exchange.swap(task, packed):
            # The plan has room for one copy: the next may begin when the memory of this one's original is free.
            self._exchange.wait_freed(lambda: loaded.buffer is None)
        trim()
        self._sample()

    # Inference Agent

    def _sweep(self, request: Request) -> dict[str, Value]:
        """Serve a request, and those that wait behind it. Returns its outputs."""
        requests = [request]
        if self._plan.streamed_bytes:
            requests += self._exchange.join()
        try:
            self._admit(requests)
            feeds = [one.served.feed for one in requests]
            cold = self._coldness()
            begin_s = time.perf_counter()
            self._forward.run(
                feeds,
                lambda index: self._borrow(index, requests, begin_s),
                keep_rows_cached=not self._plan.streamed_bytes,
            )
            end_s = time.perf_counter()
            self._account(begin_s, end_s, cold)
            if self._plan.streamed_bytes:
                self._exchange.expect(len(requests), _GATHER_SHARE * (end_s - begin_s))
        except BaseException as error:
            for other in requests[1:]:
                answer(self._exchange, other, other.served.feed.error or error)
            own = request.served.feed.error
            if own is not None and own is not error:
                # It ended this call before the sweep failed, and has a cause of its own.
                raise own  # noqa: B904
            raise
        for feed in feeds:
            if feed.positions is None:
                self._lent.add(feed.outputs.values())
        for other in requests[1:]:
            answer(self._exchange, other, other.served.feed.error or other.served.feed.outputs)
        if request.served.feed.error is not None:
            raise request.served.feed.error
        outputs: dict[str, Value] = request.served.feed.outputs
        return outputs

    def _admit(self, requests: list[Request]) -> None:
        """Make room for a sweep. Requests that do not fit into it together are taken out of the list, and wait."""
        while True:
            served = [one.served for one in requests]
            kinds = tuple(one.kind for one in served)
            kind = kinds[0] if len(kinds) == 1 else kinds
            if kind != self._kind and self._in_arena:
                # Its pieces have the sizes of the latest passes.
                shrink_arena()
            self._kind = kind
            largest = max(served, key=lambda one: one.pass_bytes - one.held_bytes)
            pass_bytes = largest.pass_bytes + sum(one.held_bytes for one in served if one is not largest)
            try:
                with foreign_errors(RunError, _PLAN_FACT, _MEMORY_REMEDY):
                    self._prepare(pass_bytes, max(one.cache_bytes for one in served), strict=len(served) > 1)
                return
            except BudgetError:
                if len(requests) == 1:
                    raise
                half = len(requests) // 2
                self._exchange.part(requests[half:])
                del requests[half:]

    @contextmanager
    def _borrow(self, index: int, requests: Sequence[Request], begin_s: float) -> Iterator[ShardSession]:
        name = self._manifest.shards[index].name
        number = self._passes + 1
        shard, resident = self._exchange.borrow_resident(index), True
        if shard is None:
            with self.trace.span("inference", "wait", name, pass_number=number):
                task, shard = self._exchange.take(index, *requests)
            resident = task.resident
        assert shard.session is not None
        try:
            with self.trace.span("inference", "run", name, pass_number=number):
                yield shard.session
        finally:
            self._exchange.give_back(index, shard, resident=resident)
        if self._progress is not None:
            self._progress(self._progress_at(index, time.perf_counter() - begin_s))

    def _progress_at(self, index: int, elapsed_s: float) -> Progress:
        shards = self._manifest.shards
        done = sum(shard.nbytes for shard in shards[: index + 1])
        eta_s = elapsed_s * (self._manifest.weight_bytes - done) / done if done else None
        return Progress(shard=shards[index].name, index=index + 1, count=len(shards), elapsed_s=elapsed_s, eta_s=eta_s)

    def _prepare(self, pass_bytes: int | None = None, cache_bytes: int = 0, *, strict: bool = False) -> None:
        """Plan the next pass, make room for it, and see that the Loading Agents work.

        Without needs it is for another pass like the latest one. For `strict` see `Replanner.before_pass`.
        """
        needs = self._needs if pass_bytes is None else (pass_bytes, cache_bytes)
        taken = needs[0] + self._lent.nbytes
        occupied = self._occupied_bytes()
        if self._replanner.growth_bytes(self._plan, taken, occupied) > 0:
            self._give_back()
            occupied = self._occupied_bytes()
        plan = self._replanner.before_pass(self._plan, taken, needs[1], occupied, strict=strict)
        # What was refused is not needed again.
        self._needs = needs
        if plan.layout != self._plan.layout:
            self._exchange.reset(self._budget.wake)
            for index, loaded in self._exchange.residents.items():
                name = self._manifest.shards[index].name
                packed = loaded.buffer is None and self._manifest.shards[index].nbytes > 0
                if name not in plan.resident or plan.threads != self._plan.threads or (packed and not plan.packed):
                    self._exchange.drop(index)
            self._wait_freed()
            for index in self._exchange.kept:
                name = self._manifest.shards[index].name
                if plan.partly_resident.get(name) != self._plan.partly_resident.get(name):
                    self._forget(index)
            if self._exchange.closed:
                raise ClosedError("The model was closed during the call.")
            self._pool.close()
            self._pool = BufferPool(plan.buffer_bytes, plan.buffers)
            self._give_back()
        if plan.budget_bytes != self._plan.budget_bytes or plan.peak_bytes != self._plan.peak_bytes:
            _bound_heap(plan)
        self._budget.set_limit(plan.weights_bytes)
        self._plan = plan
        self._spawn_loaders()
        if self._exchange.stopped:
            self._exchange.start(self._resident_flags(), plan.loaders, self._passes + 1)

    def _coldness(self) -> Coldness:
        wanted = len(self._plan.resident), len(self._plan.partly_resident)
        complete = (len(self._exchange.residents), len(self._exchange.kept)) == wanted
        return "steady" if complete and self._passes else "filling" if self._passes else "cold"

    def _account(self, begin_s: float, end_s: float, cold: Coldness) -> None:
        bound_s = None
        if self._replanner.knows(self._kind) and cold != "filling":
            bound = roofline(self._manifest, self._replanner.profile, self._plan.resident_bytes)
            bound_s = bound.first_s if cold == "cold" else bound.steady_s
        self._last_pass = pass_stats(self.trace.spans_since(begin_s), begin_s, end_s, bound_s)
        self._unsettled_s = begin_s
        self._first_pass_s = self._first_pass_s or self._last_pass.seconds
        self._passes += 1

    def _settle(self) -> None:
        """After a pass, when its caller has the answer: learn from it, and improve what stays in memory."""
        if self._last_pass is None or self._exchange.stopped:
            return
        self._storage.save_stamps()
        # Calls that ran no pass come here too, and under another plan its spans would be misread.
        begin_s, self._unsettled_s = self._unsettled_s, None
        if begin_s is not None and not self._exchange.packing:
            spans = self.trace.spans_since(begin_s)
            if self._replanner.after_pass(self._plan, spans, self._last_pass.seconds, self._kind):
                with suppress(BudgetError):  # the next call meets it again
                    self._prepare()
        if self._plan.packed and not self._exchange.packing and not self._gave_up_packing:
            self._exchange.pack(i for i, loaded in self._exchange.residents.items() if loaded.buffer is not None)

    def _recover(self) -> None:
        """After a failed pass: throw away what was loaded ahead; the next call begins with its first shard."""
        self._exchange.reset(self._budget.wake)
        self._wait_freed()

    def _wait_freed(self) -> None:
        expected = sum(loaded.reserved_bytes for loaded in self._exchange.residents.values())
        expected += sum(part.buffer.nbytes for parts in self._exchange.kept.values() for part in parts)
        self._exchange.wait_freed(lambda: self._budget.reserved_bytes == expected)

    def _forget(self, index: int) -> None:
        for part in self._exchange.forget(index):
            self._budget.release(part.buffer.nbytes)
            part.buffer.close()

    def _give_back(self) -> None:
        """Give freed memory back to the system."""
        if self._in_arena:
            shrink_arena()
        trim()

    def _occupied_bytes(self) -> int:
        """Memory of the process without weights and caches."""
        weights = self._budget.reserved_bytes + self._pool.idle_bytes
        weights += self._plan.packing_bytes if self._exchange.packing else 0
        return rss_bytes() - weights - self._plan.cache_bytes

    def _resident_flags(self) -> list[bool]:
        return [shard.name in self._plan.resident for shard in self._manifest.shards]

    # Daemon Agent

    def _free(self, shard: LoadedShard) -> None:
        with self.trace.span("daemon", "free", self._manifest.shards[shard.index].name):
            try:
                shard.session = None
                buffer, shard.buffer = shard.buffer, None
                if buffer is not None:
                    if shard.pooled:
                        self._pool.give(buffer)
                    else:
                        buffer.close()
                if rss_bytes() > self._plan.peak_bytes:
                    self._exchange.signal_memory(short=True)
                    try:
                        self._give_back()
                    finally:
                        self._exchange.signal_memory(short=False)
            finally:
                self._budget.release(shard.reserved_bytes)
        self._sample()

    def _watch(self) -> None:
        """While nobody calls: when memory became short outside of the process, give back what the plan must."""
        if self._exchange.idle and self._replanner.limit_bytes(self._plan) < self._plan.budget_bytes:
            with suppress(ClosedError):
                self._exchange.submit(Request(work=lambda _: self._prepare()))

    def _sample(self) -> None:
        self.trace.sample("buffers", self._pool.used)
        self.trace.sample("reserved_bytes", self._budget.reserved_bytes)
        self.trace.sample("rss_bytes", rss_bytes())


def _agent() -> str:
    return threading.current_thread().name.removeprefix("pipeload-")


def _bound_heap(plan: Plan) -> None:
    """Keep the heap small where freed memory in it could break the budget, and fast where there is plenty."""
    spare_bytes = plan.budget_bytes - plan.peak_bytes
    if spare_bytes < _HEAP_SLACK_BYTES:
        limit_heap()
    elif spare_bytes > _HEAP_PLENTY_BYTES:
        widen_heap()
