"""Memory for weights under the plan in force: reservations, buffers, and the return of freed memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from pipeload.format.manifest import Shard
from pipeload.machine.heap import is_scattered, limit_heap, trim
from pipeload.machine.memory import Peak, PeakWatch, peak_rss_bytes, rss_bytes
from pipeload.pipeline.messages import LoadedShard
from pipeload.pipeline.reservations import Reservations
from pipeload.pipeline.session import shrink_arena
from pipeload.pipeline.shared_weights import SharedWeights
from pipeload.planning.footprint import second_copy_bytes, session_bytes
from pipeload.planning.planner import Plan
from pipeload.storage.buffers import Buffer, BufferPool, Part
from pipeload.tracing.trace import Trace

__all__ = ["WeightsMemory"]

_HEAP_SLACK_BYTES = 256_000_000
"""More than any measured heap kept beside its tensors."""


class WeightsMemory:
    """Memory of the loaded shards, and of the process beside them.

    Args:
        plan: the first plan.
        in_arena: whether activations lie in the arena that sessions share, which can be shrunk.
        trace: takes samples of the figures.

    Attributes:
        plan: the plan in force.
        reservations: bytes of the plan that shards and parts hold.
        sessions: bytes of the plan that sessions of streamed shards hold, where it has fewer of them than buffers.
        shared: weights that several resident shards have in common.
    """

    def __init__(self, plan: Plan, trace: Trace, *, in_arena: bool) -> None:
        self.plan = plan
        self.reservations = Reservations(plan.weights_bytes - plan.sessions_bytes)
        self.sessions = Reservations(plan.sessions_bytes)
        self.shared = SharedWeights()
        self._pool = BufferPool(plan.buffer_bytes, plan.buffers)
        self._trace = trace
        self._in_arena = in_arena
        self._watch = PeakWatch(peak_rss_bytes())
        self._packing_lock = threading.Lock()
        self._packed_structure: str | None = None
        _bound_heap(plan)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the plan that are reserved now."""
        return self.reservations.reserved_bytes + self.sessions.reserved_bytes

    @property
    def occupied_bytes(self) -> int:
        """Memory of all buffers, including those waiting for their next use, and of sessions."""
        return self.reserved_bytes - self.shared.unused_bytes + self._pool.idle_bytes

    @property
    def to_come_bytes(self) -> int:
        """Memory that the plan grants to weights, caches and passes, minus the bytes that weights occupy already."""
        return max(0, self.plan.peak_bytes - self.plan.process_bytes - self.occupied_bytes)

    def beside_bytes(self, *, packing: bool) -> int:
        """Memory of the process now, without weights and caches.

        Args:
            packing: whether a Loading Agent is making a packed copy of a shard.
        """
        weights = self.occupied_bytes + (self.plan.packing_bytes if packing else 0)
        return rss_bytes() - weights - self.plan.cache_bytes

    @property
    def complete(self) -> bool:
        """Whether all buffers of the plan were in use, and shards that are to be packed have their own copies."""
        return self._pool.complete and not self.shared.unused_bytes

    def take_peak(self, unseen_bytes: int) -> Peak:
        """The most that the process has occupied since the last call; see `PeakWatch.take`."""
        return self._watch.take(peak_rss_bytes(), unseen_bytes)

    def fit_heap(self, shard: Shard, *, streamed: bool) -> None:
        """Before a shard is packed: give back what the heap keeps, unless the shard fits into it.

        The heap keeps the memory of streamed shards that were packed. A shard of the same structure fits into the holes
        of the one before, but for at most one tensor of each Loading Agent; one with other sizes may fit into none.
        """
        with self._packing_lock:
            before, self._packed_structure = self._packed_structure, shard.structure if streamed else None
            reuses = streamed and shard.structure == before
            missed_bytes = self.plan.loaders * second_copy_bytes(shard)
            if self.plan.sessions is not None:
                # While one packs, others read and widen: what these take splits the holes. The plan has memory for no
                # more sessions than these, so none may be missed.
                missed_bytes += session_bytes(shard, self.plan.threads)
            if is_scattered():
                # The holes may lie where the threads that pack now do not look.
                together = min(self.plan.loaders, self.plan.sessions or self.plan.buffers)
                missed_bytes += together * session_bytes(shard, self.plan.threads)
            if not reuses or self._rss_bytes() + missed_bytes > self.plan.peak_bytes:
                trim()

    def skip(self, ticket: int) -> None:
        """The load with this ticket reserves nothing more: later tickets wait for it no longer."""
        self.reservations.skip(ticket)
        self.sessions.skip(ticket)

    def wake(self) -> None:
        """Make Loading Agents that wait for memory check whether their tasks are stale."""
        self.reservations.wake()
        self.sessions.wake()

    def end_waits(self) -> None:
        """End every wait for memory, now and later, with ClosedError."""
        self.reservations.close()
        self.sessions.close()

    def take_buffer(self) -> Buffer:
        """A buffer for a streamed shard; its bytes are reserved."""
        return self._pool.take()

    def free(self, shard: LoadedShard, signal_memory: Callable[[bool], None]) -> None:
        """Destroy a shard's session, and give its memory back, even if an error occurs meanwhile.

        Args:
            shard: a shard that ran, or could not be loaded.
            signal_memory: called with True while more is occupied than planned, and then with False.
        """
        freed_bytes = shard.reserved_bytes
        try:
            shard.session = None
            if shard.packed and not shard.pooled:
                # Small copies lie in the heap, which would keep them. Those of streamed shards stay for the next one.
                trim()
            if (buffer := shard.buffer) is not None:
                try:
                    if shard.pooled:
                        self._pool.give(buffer)
                    elif shard.shared is None:
                        buffer.close()
                    elif (left_bytes := self.shared.leave(shard.shared)) is not None:
                        freed_bytes += left_bytes
                        buffer.close()
                finally:
                    # Not before: the next packing waits for this.
                    shard.buffer = None
            if self._is_short():
                signal_memory(True)
                try:
                    self.give_back()
                finally:
                    signal_memory(False)
        finally:
            self.reservations.release(freed_bytes)
            self.sessions.release(shard.session_bytes)

    def release(self, parts: Iterable[Part]) -> None:
        """Give back the memory of parts that are no longer kept."""
        for part in parts:
            try:
                part.buffer.close()
            finally:
                self.reservations.release(part.buffer.nbytes)

    def follow(self, plan: Plan) -> None:
        """Put another plan in force; if its buffers differ, no buffer is in use."""
        before, self.plan = self.plan, plan
        self.reservations.set_limit(plan.weights_bytes - plan.sessions_bytes)
        self.sessions.set_limit(plan.sessions_bytes)
        if (plan.budget_bytes, plan.peak_bytes) != (before.budget_bytes, before.peak_bytes):
            _bound_heap(plan)
        if plan.layout != before.layout:
            self._pool.close()
            self._pool = BufferPool(plan.buffer_bytes, plan.buffers)
            self.give_back()

    def give_back(self) -> None:
        """Give freed memory back to the system."""
        if self._in_arena:
            shrink_arena()
        trim()

    def sample(self) -> None:
        """Note the figures in the trace."""
        self._trace.sample("buffers", self._pool.used)
        self._trace.sample("reserved_bytes", self.reserved_bytes)
        with suppress(OSError):  # a figure for people only
            self._trace.sample("rss_bytes", self._rss_bytes())

    def _is_short(self) -> bool:
        """Whether the process occupies more than planned; not where the system does not tell."""
        with suppress(OSError):
            return self._rss_bytes() > self.plan.peak_bytes
        return False

    def _rss_bytes(self) -> int:
        rss = rss_bytes()
        self._watch.note(rss)
        return rss

    def close(self) -> None:
        """Give back the idle buffers, and the free memory that the heap keeps."""
        self._pool.close()
        self.give_back()


def _bound_heap(plan: Plan) -> None:
    """Keep the heap small where freed memory in it could break the budget."""
    if plan.budget_bytes - plan.peak_bytes < _HEAP_SLACK_BYTES:
        limit_heap()
