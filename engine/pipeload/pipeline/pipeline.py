"""The pipeline of agents: it starts, cancels and joins their threads.

```
loader 0:   | read 0 | read 2 | read 4 |  ...         reserve -> read into a buffer -> session over the buffer
loader 1:   | read 1 | read 3 | read 5 |  ...
inference:           | run 0 | run 1 | run 2 | ...    in order; the output of shard i is the input of shard i + 1
daemon:                      | free 0 | free 1 | ...  session destroyed, buffer back to the pool, budget released
```

Prefetch goes on past the end of a pass: while the last shards run, and while no call waits, loaders read the first
streamed shards of the next pass, within the budget.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import copy
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from pipeload.errors import BudgetError, ClosedError, ConfigError, LoadError, RunError
from pipeload.foreign import first_line, foreign_errors
from pipeload.format.manifest import Manifest
from pipeload.machine.memory import peak_rss_bytes
from pipeload.machine.threads import THREADS_REMEDY, start
from pipeload.pipeline import deadlines
from pipeload.pipeline.affinity import Affinity
from pipeload.pipeline.agents import answer, daemon_agent, inference_agent, loading_agent
from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.joining import Batch, Rows, grouped
from pipeload.pipeline.ledger import Ledger
from pipeload.pipeline.lent_outputs import LentOutputs
from pipeload.pipeline.loader import MEMORY_REMEDY, Loader
from pipeload.pipeline.requests import Call
from pipeload.pipeline.room import Room
from pipeload.pipeline.session import ShardSession, Value, shrink_arena
from pipeload.pipeline.sweep import Feed, Sweep
from pipeload.pipeline.weights_memory import WeightsMemory
from pipeload.planning import planner
from pipeload.planning.needs import Needs, in_arena
from pipeload.planning.planner import Plan
from pipeload.planning.replanner import Replanner
from pipeload.planning.schedule import roofline
from pipeload.planning.shares import Share
from pipeload.storage.weights import Storage
from pipeload.tracing.stats import Stats
from pipeload.tracing.trace import Progress, Trace

__all__ = ["Pipeline"]

Coldness: TypeAlias = Literal["cold", "filling", "steady"]
"""A pass that reads everything, one that still loads shards that will stay, or one like all later ones."""

_SPANS = 10_000
"""The trace keeps this many spans and samples: some tens of passes, 0.6 MB that the plan counts with the runtime."""
_GATHER_SHARE = 0.02
"""The next sweep waits up to this fraction of the last one's duration for the same callers to return."""
_CALLER_BYTES = 300_000
"""A calling thread's stack and own data: tokens, inputs, and the results it makes from the outputs."""
_CLOSER_FACT = "The model is closed, but no thread can be started to give its memory back"
_PLAN_FACT = "No room could be made for the pass"
_WATCH_S = 1.0
"""An idle model checks at this interval whether memory has become short."""


class Pipeline:
    """Agents that run one model under one budget.

    Args:
        manifest: the model.
        storage: its files.
        plan: the first plan.
        replanner: plans anew between passes.
        progress: called after each shard of each pass, by the Inference Agent.
        cache_bytes: tells the memory of all caches that are open; None for a model without caches.

    Attributes:
        share: the model's, of its budget.
        rooms: shares of memory beside it that is in use until the pipeline is closed.
    """

    def __init__(
        self,
        manifest: Manifest,
        storage: Storage,
        plan: Plan,
        replanner: Replanner,
        progress: Callable[[Progress], None] | None = None,
        cache_bytes: Callable[[], int] | None = None,
    ) -> None:
        self.share = replanner.share
        self.rooms: list[Share] = []
        self._cache_bytes = cache_bytes
        self._manifest = manifest
        self._storage = storage
        self._replanner = replanner
        self._progress = progress
        self._in_arena = in_arena(manifest)
        self._kind: object = None
        self.trace = Trace(_SPANS)
        self._ledger = Ledger(self.trace)
        self._lent = LentOutputs()
        self._exchange = Exchange()
        self._memory = WeightsMemory(plan, self.trace, in_arena=self._in_arena)
        self._affinity = Affinity(replanner.profile.core_capacities)
        self._loader = Loader(manifest, storage, self._exchange, self._memory, self.trace, self._affinity)
        self._room = Room(manifest, self._exchange, self._memory, replanner, self._lent)
        self._sweep = Sweep(manifest, storage)
        self.share.occupied = lambda: self._memory.occupied_bytes
        self._closing = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._room.start(next_pass=1)
        try:
            self._spawn("inference", inference_agent, self._exchange, self._room.recover, self._settle)
            self._spawn("daemon", daemon_agent, self._exchange, self._loader.free, self._watch, _WATCH_S)
            self._spawn_loaders()
        except BaseException:
            self.close()
            raise

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._memory.plan

    @property
    def to_come_bytes(self) -> int:
        """Memory that the plan grants to weights, caches and passes, minus the bytes that weights occupy already."""
        return 0 if self._exchange.closed else self._memory.to_come_bytes

    @property
    def process_bytes(self) -> int:
        """The process beside all models, as this one knows it; with what opening this one has brought into it."""
        return self._replanner.profile.process_bytes

    @property
    def runtime_bytes(self) -> int:
        """See `Profile.runtime_bytes`."""
        return self._replanner.profile.runtime_bytes

    @property
    def beside_bytes(self) -> int:
        """Memory that the plan leaves to all other models of the budget."""
        return self._replanner.beside_bytes(self.plan.budget_bytes)

    @property
    def usable_bytes(self) -> int:
        """Memory that the plan may use for this model."""
        plan = self.plan
        return plan.budget_bytes - planner.process_bytes(self._replanner.profile) - self.beside_bytes

    @property
    def used_bytes(self) -> int:
        """Memory that the plan does use for it."""
        return self.plan.peak_bytes - self.plan.process_bytes

    @property
    def extremes(self) -> tuple[int, int]:
        """The least memory that works for passes like the latest one, with the caches open now; and the most of use."""
        return self._replanner.extremes(self._room.with_lent(self._needs))

    @property
    def idle(self) -> bool:
        """Whether no call runs or waits."""
        return self._exchange.calls.idle

    @property
    def lent_bytes(self) -> int:
        """Bytes of the outputs that callers keep now."""
        return self._lent.nbytes

    @property
    def stats(self) -> Stats:
        """The figures of all passes so far."""
        bandwidths = self._replanner.profile.read_bytes_per_s.values()
        return self._ledger.stats(
            read_bytes=self._loader.read_bytes,
            peak_bytes=peak_rss_bytes(),
            budget_bytes=self.plan.budget_bytes,
            peak_read_bytes_per_s=max(bandwidths, default=None),
        )

    def submit(
        self, feed: Feed, needs: Needs, *, kind: object = None, rows: Rows | None = None, passes: int = 0
    ) -> Call[dict[str, Value]]:
        """Queue one pass. For the arguments see `Call`, for the order `Calls`.

        While shards are streamed, one sweep serves all passes that are queued when it begins. Passes whose rows may
        share a batch do so.

        Returns:
            The outputs by name, when the pass is over. Waiting for them raises BudgetError when the pass does not fit
            the budget (nothing was read for it); ClosedError when the pipeline was closed before or during the pass;
            and LoadError, ShardError or RunError when a shard failed: the next call starts afresh.

        Raises:
            ClosedError: the pipeline is closed.
        """
        return self.call(Call(self._serve, feed, needs, kind=kind, rows=rows, passes=passes))

    def call(self, call: Call[Any]) -> Call[Any]:
        """Queue a call, and return it.

        Raises:
            ClosedError: the pipeline is closed.
            ConfigError: an agent itself wants to wait for the call.
            DeadlineError: the caller's deadline has passed.
        """
        if threading.current_thread() in self._threads:
            raise ConfigError("A progress callback runs inside a pass and cannot wait for another one. Call it later.")
        deadlines.check("before a pass began")
        return self._exchange.calls.submit(call)

    def set_budget(self, budget_bytes: int | None) -> None:
        """Change the budget (None: all free memory); this returns after the memory beyond it was given back.

        Raises:
            BudgetError: the new budget is too small; the old one stays in force.
            ClosedError: the pipeline was closed.
        """
        self.change(lambda: self._replanner.trying(budget_bytes), strict=budget_bytes is None).result()

    def change(self, made: Callable[[], AbstractContextManager[object]], *, strict: bool = False) -> Call[None]:
        """Queue a change of what plans are made from.

        Args:
            made: the change; it stays if the body plans a pass with it.
            strict: see `Replanner.before_pass`.

        Returns:
            A call that ends after the memory that has no place any more was given back. Waiting for it raises
            BudgetError where no pass like the latest one is possible.

        Raises:
            ClosedError: the pipeline is closed.
            ConfigError: see `call`.
        """

        def work(_: Call[None]) -> None:
            with foreign_errors(LoadError, _PLAN_FACT, MEMORY_REMEDY), made():
                self._prepare(self._needs, strict=strict)

        return self.call(Call(work))

    @property
    def closed(self) -> bool:
        """Whether it is closed, or is being closed."""
        return self._exchange.closed

    def close(self) -> None:
        """End every call with ClosedError, join every thread, give all memory back. May be called again.

        Raises:
            LoadError: an agent's own thread has called this, and no thread can be started to do the rest.
        """
        self._exchange.close()
        self._memory.end_waits()
        if threading.current_thread() in self._threads:
            # The garbage collector may run this in an agent's thread, which cannot wait for itself.
            with foreign_errors(LoadError, _CLOSER_FACT, f"{THREADS_REMEDY} Then close the model from another thread."):
                threading.Thread(target=self.close, name="pipeload-closer").start()
            return
        with self._closing:
            for thread in self._threads:
                thread.join()
            self._threads = []
            for index in self._exchange.residents.shards:
                self._exchange.residents.drop(index)
            self._room.stop()
            while (retired := self._exchange.next_retired()) is not None:
                self._loader.free(retired)
            for index in self._exchange.residents.parts:
                self._memory.release(self._exchange.residents.forget(index))
            self._memory.close()
            for share in (self.share, *self.rooms):
                share.leave()

    def _spawn(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name=f"pipeload-{name}", daemon=True)
        fact = f"The thread of the agent '{name}' cannot be started"
        with foreign_errors(LoadError, fact, THREADS_REMEDY):
            try:
                start(thread)
            except MemoryError as error:
                raise LoadError(f"{fact}: {first_line(error)}. {MEMORY_REMEDY}") from error
            finally:
                # Also where the caller is interrupted when it has just been started.
                if thread.ident is not None:
                    self._threads.append(thread)
        self._affinity.place([thread], self.plan.threads)

    def _spawn_loaders(self) -> None:
        """Start the plan's number of Loading Agents, and one more to pack while the others wait for their turn to load.

        Surplus agents of an earlier plan stay idle.
        """
        running = sum(thread.name.startswith("pipeload-loader") for thread in self._threads)
        for number in range(running, self.plan.loaders + self.plan.packed):
            self._spawn(f"loader-{number}", loading_agent, self._exchange, self._loader.run)

    @property
    def _needs(self) -> Needs:
        """Of a pass like the latest one, with the caches that are open now."""
        needs = self._room.needs
        return needs if self._cache_bytes is None else replace(needs, cache_bytes=self._cache_bytes(), growth_bytes=0)

    # Inference Agent: calls

    def _serve(self, call: Call[dict[str, Value]]) -> dict[str, Value]:
        """Serve a call, and the calls waiting behind it. Returns its outputs."""
        with suppress(_RowsFailed):
            return self._serve_joined(call)
        if self._exchange.broken:
            with foreign_errors(LoadError, _PLAN_FACT, MEMORY_REMEDY):
                self._room.recover()
        return self._serve_joined(call)

    def _serve_joined(self, call: Call[dict[str, Value]]) -> dict[str, Value]:
        """The same. Raises `_RowsFailed` where the call has failed with rows of others, and is to run alone."""
        calls, batches = [call], list[Batch]()
        failure: BaseException | None = None
        try:
            if self.plan.streamed_bytes:
                calls += self._exchange.calls.join()
            elif call.rows is not None:
                calls += self._exchange.calls.join(lambda waiting: self._grouped([call, *waiting])[0][1:])
            self.share.pass_begins()
            batches = self._admit(calls)
            cold = self._coldness()
            begin_s = self._ledger.begin()
            self._sweep.run(
                [one.feed for one in batches],
                lambda index: self._borrow(index, calls, begin_s),
                keep_rows_cached=not self.plan.streamed_bytes,
            )
            end_s = time.perf_counter()
            self._ledger.add(begin_s, end_s, self._bound_s(cold), len(calls))
            if self.plan.streamed_bytes:
                self._exchange.calls.expect(len(calls), _GATHER_SHARE * (end_s - begin_s))
        except BaseException as error:  # noqa: BLE001 - every caller gets it
            failure = error
        again = [one for batch in batches if batch.settle() for one in batch.calls]
        answered = [one for one in calls if one not in again]
        try:
            self._exchange.calls.part([one for one in again if one is not call])
            if failure is None:
                for one in answered:
                    if one.feed.positions is None:
                        self._lent.add(one.feed.outputs.values())
        except BaseException as error:  # noqa: BLE001 - likewise
            failure = error
        for one in answered:
            if one is not call:
                # A copy for each caller: raising adds frames, and with them the caller's own arrays.
                ended = one.feed.outputs if failure is None else _copy_of(failure)
                answer(self._exchange, one, one.feed.error or ended)
        if call in again:
            raise _RowsFailed
        if call.feed.error is not None:
            # It ended the call, perhaps before the sweep failed, and has a cause of its own.
            raise call.feed.error
        if failure is not None:
            raise failure
        return call.feed.outputs

    def _grouped(self, calls: Sequence[Call[Any]]) -> list[list[Call[Any]]]:
        return grouped(calls, self.plan.pass_bytes + max(0, self.plan.budget_bytes - self.plan.peak_bytes))

    def _admit(self, calls: list[Call[dict[str, Value]]]) -> list[Batch]:
        """Make room for a sweep, in batches. Calls that do not fit in together leave the list, and wait."""
        while True:
            batches = [Batch(group) for group in self._grouped(calls)]
            kinds = tuple(one.kind for one in batches)
            kind = kinds[0] if len(kinds) == 1 else kinds
            if kind != self._kind and self._in_arena:
                # Its pieces have the sizes of the latest passes.
                shrink_arena()
            self._kind = kind
            needs = _joint([one.needs for one in batches], len(calls))
            if self._cache_bytes is not None:
                # Other caches have grown since these calls came, or were closed; no call knows of another one's growth.
                needs = replace(needs, cache_bytes=self._cache_bytes() + needs.growth_bytes)
            try:
                with foreign_errors(RunError, _PLAN_FACT, MEMORY_REMEDY):
                    self._prepare(needs, strict=len(calls) > 1)
                return batches
            except BudgetError:
                if len(calls) == 1:
                    raise
                half = len(calls) // 2
                self._exchange.calls.part(calls[half:])
                del calls[half:]

    @contextmanager
    def _borrow(self, index: int, calls: Sequence[Call[Any]], begin_s: float) -> Iterator[ShardSession]:
        name = self._manifest.shards[index].name
        number = self._ledger.passes + 1
        shard, resident = self._exchange.residents.borrow(index), True
        if shard is None:
            with self.trace.span("inference", "wait", name, pass_number=number):
                task, shard = self._exchange.take(index, *calls)
            resident = task.resident
        assert shard.session is not None
        try:
            with self.trace.span("inference", "run", name, pass_number=number):
                yield shard.session
        finally:
            if resident:
                self._exchange.residents.give_back(index, shard)
            else:
                self._exchange.retire(shard)
        if self._progress is not None:
            self._progress(self._progress_at(index, time.perf_counter() - begin_s))

    def _progress_at(self, index: int, elapsed_s: float) -> Progress:
        shards = self._manifest.shards
        done = sum(shard.nbytes for shard in shards[: index + 1])
        rest = sum(shard.nbytes for shard in shards[index + 1 :])
        eta_s = elapsed_s * rest / done if done else None
        return Progress(shard=shards[index].name, index=index + 1, count=len(shards), elapsed_s=elapsed_s, eta_s=eta_s)

    def _coldness(self) -> Coldness:
        wanted = len(self.plan.resident), len(self.plan.partly_resident)
        residents = self._exchange.residents
        complete = (len(residents.shards), len(residents.parts)) == wanted
        return "steady" if complete and self._ledger.passes else "filling" if self._ledger.passes else "cold"

    def _bound_s(self, cold: Coldness) -> float | None:
        """T* of the pass that has ended; None if it is unknown."""
        if cold == "filling" or not self._replanner.knows(self._kind):
            return None
        bound = roofline(self._manifest, self._replanner.profile, self.plan.resident_bytes)
        return bound.first_s if cold == "cold" else bound.steady_s

    # Inference Agent: between passes

    def _prepare(self, needs: Needs | None = None, *, strict: bool = False) -> None:
        """Make room for the next pass; see `Room.prepare`. Another plan may have more Loading Agents."""
        self._room.prepare(self._ledger.passes + 1, needs, strict=strict)
        self._spawn_loaders()
        self._affinity.place(self._threads, self.plan.threads)

    def _settle(self) -> None:
        """After a pass, when its caller has the answer: learn from it, and improve the choice of resident shards."""
        if not self._ledger.passes or self._exchange.stopped:
            return
        self._storage.save_stamps()
        # Calls without a pass come here too, and another plan would misread the spans.
        ended = self._ledger.take_unsettled()
        residents = self._exchange.residents
        if ended is not None and not residents.packing:
            spans, seconds = ended
            self._room.learn_peak(complete=self._coldness() == "steady")
            if self._replanner.after_pass(self.plan, spans, seconds, self._kind):
                # The caller has its answer; where no room can be made now, the next call meets it again.
                with suppress(BudgetError, LoadError), foreign_errors(LoadError, _PLAN_FACT, MEMORY_REMEDY):
                    self._prepare()
        if self.plan.packed and not residents.packing and not self._loader.gave_up_packing:
            residents.pack(index for index, loaded in residents.shards.items() if loaded.buffer is not None)

    # Daemon Agent

    def _watch(self) -> None:
        """While no call runs or waits: shrink the plan when memory became short outside the process."""
        idle = self._exchange.calls.idle
        if idle and self._replanner.limit_bytes(self.plan) < self.plan.budget_bytes:
            with suppress(ClosedError):
                self._exchange.calls.submit(Call(lambda _: self._prepare()))


class _RowsFailed(Exception):  # noqa: N818 - no caller sees it
    """A shard failed for rows of several calls."""


def _joint(needs: Sequence[Needs], callers: int) -> Needs:
    """What one sweep needs that serves all of these: the shards run for one feed at a time."""
    running = max(one.pass_bytes - one.held_bytes for one in needs)
    held_bytes = sum(one.held_bytes for one in needs) + (callers - 1) * _CALLER_BYTES
    return Needs(
        pass_bytes=running + held_bytes,
        held_bytes=held_bytes,
        lent_bytes=max(one.lent_bytes for one in needs),
        cache_bytes=max(one.cache_bytes for one in needs),
        growth_bytes=sum(one.growth_bytes for one in needs),
    )


def _copy_of(error: BaseException) -> BaseException:
    """An error with the same cause and without frames, or the error itself where it cannot be copied."""
    with suppress(Exception):
        found = copy(error)
        found.__cause__ = error.__cause__ or error
        # Where Dask is imported, copies of errors have them.
        found.__traceback__ = None
        return found
    return error
