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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from pipeload.agents import daemon_agent, inference_agent, loading_agent
from pipeload.budget import Budget
from pipeload.buffers import Buffer, BufferPool, page_ceil
from pipeload.errors import BudgetError, ClosedError
from pipeload.exchange import Exchange, LoadedShard, Request, Task
from pipeload.forward import Forward
from pipeload.manifest import Manifest
from pipeload.memory import limit_heap, peak_rss_bytes, rss_bytes, trim
from pipeload.planner import SESSION_BYTES, Plan
from pipeload.session import ShardSession, Value
from pipeload.storage import Storage

__all__ = ["Pipeline", "Stats", "together"]

T = TypeVar("T")

_HEAP_SLACK_BYTES = 256_000_000
"""More than a heap was ever seen to keep beside the tensors in it."""
_TRIM_SHARE = 0.95
"""Above this part of the budget the Daemon gives freed heap memory back after each shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What the pipeline did so far.

    Attributes:
        passes: finished passes.
        read_bytes: weights that were read, in all.
        first_pass_s, last_pass_s: seconds that the first and the latest pass took; None before.
        peak_bytes: the most memory that the process has occupied since it began.
    """

    passes: int = 0
    read_bytes: int = 0
    first_pass_s: float | None = None
    last_pass_s: float | None = None
    peak_bytes: int = 0


class Pipeline:
    """Agents that run one model under one budget.

    Args:
        manifest: the model.
        storage: its files.
        plan: how to begin.
        replan: (pass_bytes, cache_bytes) -> Plan, when a call needs more memory beside weights, or less.
    """

    def __init__(self, manifest: Manifest, storage: Storage, plan: Plan, replan: Callable[[int, int], Plan]) -> None:
        self._manifest = manifest
        self._storage = storage
        self._forward = Forward(manifest, storage)
        self._replan = replan
        self._plan = plan
        self._budget = Budget(_weights_limit(manifest, plan))
        self._pool = BufferPool(plan.buffer_bytes, plan.buffers)
        self._exchange = Exchange()
        self._residents: dict[int, LoadedShard] = {}
        self._passes = 0
        self._read_bytes = 0
        self._first_pass_s: float | None = None
        self._last_pass_s: float | None = None
        self._counter = threading.Lock()
        self._closing = threading.Lock()
        _bound_heap(plan)
        self._exchange.start(self._resident_flags())
        self._threads = [
            threading.Thread(
                target=loading_agent,
                args=(self._exchange, self._load),
                name=f"pipeload-loader-{i}",
                daemon=True,
            )
            for i in range(plan.loaders)
        ]
        self._threads += [
            threading.Thread(
                target=inference_agent,
                args=(self._exchange, self._recover),
                name="pipeload-inference",
                daemon=True,
            ),
            threading.Thread(
                target=daemon_agent, args=(self._exchange, self._free), name="pipeload-daemon", daemon=True
            ),
        ]
        started: list[threading.Thread] = []
        try:
            for thread in self._threads:
                thread.start()
                started.append(thread)
        except BaseException:
            self._threads = started
            self.close()
            raise

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._plan

    @property
    def stats(self) -> Stats:
        """What happened so far."""
        return Stats(
            passes=self._passes,
            read_bytes=self._read_bytes,
            first_pass_s=self._first_pass_s,
            last_pass_s=self._last_pass_s,
            peak_bytes=peak_rss_bytes(),
        )

    def run(
        self, inputs: Mapping[str, Value], *, pass_bytes: int, cache_bytes: int, last_position: bool
    ) -> dict[str, Value]:
        """One pass; calls from several threads queue up.

        Args:
            inputs: every graph input.
            pass_bytes: memory that this pass needs beside weights and caches.
            cache_bytes: memory of all caches that are open while it runs.
            last_position: see `Forward.run`.

        Raises:
            BudgetError: it does not fit the budget; nothing was read for it.
            ClosedError: the pipeline was closed before or during the pass.
            PipeloadError: whatever made a shard fail; the next call starts afresh.
        """

        def work(request: Request) -> dict[str, Value]:
            self._prepare(pass_bytes, cache_bytes)
            begin = time.perf_counter()
            outputs = self._forward.run(
                inputs,
                lambda index: self._borrow(index, request),
                request.stopper,
                last_position=last_position,
                keep_rows_cached=not self._plan.streamed_bytes,
            )
            self._last_pass_s = time.perf_counter() - begin
            self._first_pass_s = self._first_pass_s or self._last_pass_s
            self._passes += 1
            return outputs

        request = Request(work=work)
        try:
            self._exchange.submit(request)
            outputs: dict[str, Value] = request.result.result()
        except BaseException:
            self._exchange.withdraw(request)
            raise
        return outputs

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
            while self._residents:
                self._free(self._residents.popitem()[1])
            self._exchange.reset(self._budget.wake)
            while (retired := self._exchange.next_retired()) is not None:
                self._free(retired)
            self._pool.close()
            trim()

    # Loading Agents

    def _load(self, task: Task) -> LoadedShard | None:
        shard = self._manifest.shards[task.index]
        plan = self._plan
        packed = task.resident and plan.packed
        kept_bytes = SESSION_BYTES + (page_ceil(shard.nbytes) if task.resident else plan.buffer_bytes)
        # While a packed session is made, its weights are in memory twice: the mapped file and the packed copy.
        extra_bytes = page_ceil(shard.nbytes) if packed else 0

        def stale() -> bool:
            return self._exchange.is_stale(task)

        if not self._budget.reserve(kept_bytes + extra_bytes, task.ticket, stale):
            return None
        loaded = LoadedShard(
            index=task.index,
            session=None,
            buffer=None,
            reserved_bytes=kept_bytes + extra_bytes,
            pooled=not task.resident,
        )
        try:
            graph = self._storage.graph(shard)
            if packed:
                self._storage.verify_mapped(shard)
                loaded.session = ShardSession(shard, graph, None, plan.threads)
                self._storage.forget_cached(shard)
                self._budget.release(extra_bytes)
                loaded.reserved_bytes -= extra_bytes
            else:
                loaded.buffer = self._pool.take() if loaded.pooled else Buffer(shard.nbytes)
                if not self._storage.read_weights(shard, loaded.buffer, stale):
                    self._free(loaded)
                    return None
                loaded.session = ShardSession(shard, graph, loaded.buffer, plan.threads)
        except BaseException:
            self._free(loaded)
            raise
        with self._counter:
            self._read_bytes += shard.nbytes
        return loaded

    # Inference Agent

    @contextmanager
    def _borrow(self, index: int, request: Request) -> Iterator[ShardSession]:
        shard = self._residents.get(index)
        if shard is None:
            task, shard = self._exchange.take(index, request)
            if task.resident:
                self._residents[index] = shard
        assert shard.session is not None
        try:
            yield shard.session
        finally:
            if index not in self._residents:
                self._exchange.retire(shard)

    def _prepare(self, pass_bytes: int, cache_bytes: int) -> None:
        """Make room for what this pass needs, and see that the Loading Agents work."""
        # What a pass needed once it may need again: giving it back and forth would reload resident shards.
        most_bytes = max(pass_bytes, self._plan.pass_bytes)
        if (most_bytes, cache_bytes) != (self._plan.pass_bytes, self._plan.cache_bytes):
            try:
                plan = self._replan(most_bytes, cache_bytes)
            except BudgetError:
                plan = self._replan(pass_bytes, cache_bytes)
            # Shards that are being packed now were granted more than the new plan may leave.
            packing = plan.packed and len(self._residents) < len(self._manifest.shards)
            if packing or _layout(plan) != _layout(self._plan):
                self._exchange.reset(self._budget.wake)
                names = [shard.name for shard in self._manifest.shards]
                for index in list(self._residents):
                    if names[index] not in plan.resident or plan.packed != self._plan.packed:
                        self._exchange.retire(self._residents.pop(index))
                self._wait_freed()
                if self._exchange.closed:
                    raise ClosedError("The model was closed during the call.")
                self._pool.close()
                self._pool = BufferPool(plan.buffer_bytes, plan.buffers)
                _bound_heap(plan)
                trim()
            self._budget.set_limit(_weights_limit(self._manifest, plan))
            self._plan = plan
        if self._exchange.stopped:
            self._exchange.start(self._resident_flags(), list(self._residents))

    def _recover(self) -> None:
        """After a failed pass: throw away what was loaded ahead; the next call begins with its first shard."""
        self._exchange.reset(self._budget.wake)
        self._wait_freed()

    def _wait_freed(self) -> None:
        kept = sum(shard.reserved_bytes for shard in self._residents.values())
        self._exchange.wait_freed(lambda: self._budget.reserved_bytes == kept)

    def _resident_flags(self) -> list[bool]:
        return [shard.name in self._plan.resident for shard in self._manifest.shards]

    # Daemon Agent

    def _free(self, shard: LoadedShard) -> None:
        shard.session = None
        if shard.buffer is not None:
            if shard.pooled:
                self._pool.give(shard.buffer)
            else:
                shard.buffer.close()
            shard.buffer = None
        if rss_bytes() > self._plan.budget_bytes * _TRIM_SHARE:
            self._exchange.signal_memory(short=True)
            trim()
            self._exchange.signal_memory(short=False)
        self._budget.release(shard.reserved_bytes)


def _layout(plan: Plan) -> tuple[object, ...]:
    """What cannot change while shards are loaded."""
    return plan.resident, plan.buffers, plan.buffer_bytes, plan.packed


def _bound_heap(plan: Plan) -> None:
    """Keep the heap small where freed memory in it could break the budget; else leave it as fast as it is."""
    if plan.budget_bytes - plan.peak_bytes < _HEAP_SLACK_BYTES:
        limit_heap()


def _weights_limit(manifest: Manifest, plan: Plan) -> int:
    """What the plan leaves to weights: resident shards and buffers, or everything while sessions are packed."""
    if plan.packed:
        return plan.budget_bytes - plan.process_bytes - plan.pass_bytes - plan.cache_bytes
    resident = [page_ceil(s.nbytes) + SESSION_BYTES for s in manifest.shards if s.name in plan.resident]
    return sum(resident) + plan.buffers * (plan.buffer_bytes + SESSION_BYTES)


def together(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Run jobs at the same time, each in a thread of its own. Returns their results, in order.

    All begin when all threads are there, so jobs may wait for one another; none begins when a thread cannot be
    started. All have ended when this returns or raises, unless it is interrupted twice.

    Raises:
        BaseException: whatever the first of the jobs that failed has raised.
    """
    begin = threading.Event()
    futures: list[Future[T]] = [Future() for _ in jobs]

    def work(job: Callable[[], T], future: Future[T]) -> None:
        begin.wait()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                future.set_exception(error)

    threads = [
        threading.Thread(target=work, args=pair, name=f"pipeload-loader-{i}", daemon=True)
        for i, pair in enumerate(zip(jobs, futures, strict=True))
    ]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    finally:
        begin.set()
        try:
            for thread in started:
                thread.join()
        except BaseException:
            for thread in started:
                thread.join()
            raise
    return [future.result() for future in futures]
