"""A Loading Agent's work on a task: reserve, read into a buffer, make the session over it; or pack a shard.

Where the plan has fewer sessions than buffers, a streamed shard reserves twice: its buffer before it is read, and its
session, with what packing takes, once it was. See `docs/adr/0026` for why neither wait can be for ever.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from pipeload.errors import LoadError
from pipeload.foreign import foreign_errors, let_go
from pipeload.format.manifest import Manifest, Shard, first_places
from pipeload.format.pages import room_bytes
from pipeload.format.placement import place
from pipeload.machine.heap import trim
from pipeload.pipeline.affinity import Affinity
from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.messages import LoadedShard, Task
from pipeload.pipeline.session import ShardSession
from pipeload.pipeline.weights_memory import WeightsMemory
from pipeload.planning.footprint import second_copy_bytes, session_bytes
from pipeload.planning.layouts import staying
from pipeload.planning.needs import in_arena
from pipeload.storage.buffers import Buffer, Part
from pipeload.storage.weights import Storage
from pipeload.storage.widening import widen
from pipeload.tracing.trace import Kind, Trace

__all__ = ["MEMORY_REMEDY", "Loader"]

MEMORY_REMEDY = "Lower the memory budget, raise the limits of the process (ulimit -a), or end other programs."


class Loader:
    """Loads and packs shards, for any number of Loading Agents.

    Args:
        manifest: the model.
        storage: its files.
        exchange: holds the resident shards, and says which tasks are stale.
        memory: holds the plan, the reservations and the buffers.
        trace: takes the agents' spans.
        affinity: places the threads of sessions.

    Attributes:
        gave_up_packing: packing has failed once; from then on the shards run as they are.
    """

    def __init__(
        self,
        manifest: Manifest,
        storage: Storage,
        exchange: Exchange,
        memory: WeightsMemory,
        trace: Trace,
        affinity: Affinity,
    ) -> None:
        self._manifest = manifest
        self._storage = storage
        self._exchange = exchange
        self._memory = memory
        self._trace = trace
        self._affinity = affinity
        self._in_arena = in_arena(manifest)
        firsts = Counter(first_places(manifest.shards))
        self._common = {manifest.shards[place].weights for place, count in firsts.items() if count > 1}
        self._lock = threading.Lock()
        self._read_bytes = 0
        self.gave_up_packing = False

    @property
    def read_bytes(self) -> int:
        """Bytes of weights read so far."""
        return self._read_bytes

    def run(self, task: Task) -> LoadedShard | None:
        """Do a task. Returns the loaded shard; None when the task became stale meanwhile, or was to pack a shard.

        Raises:
            ShardError, LoadError: the shard cannot be loaded.
            ClosedError: the pipeline was closed meanwhile.
        """
        shard = self._manifest.shards[task.index]
        with foreign_errors(LoadError, f"Shard '{shard.name}' could not be loaded", MEMORY_REMEDY):
            if not task.packing:
                try:
                    return self._load(task, shard)
                finally:
                    # A load that ended before it reserved must not keep later tickets waiting.
                    self._memory.skip(task.ticket)
            try:
                self._pack(task, shard)
            except BaseException:
                # The next caller gets the error.
                self.gave_up_packing = True
                self._exchange.residents.pack(())
                raise
        return None

    def free(self, shard: LoadedShard) -> None:
        """Destroy a shard, and give its memory back."""
        with self._trace.span("daemon", "free", self._manifest.shards[shard.index].name):
            self._memory.free(shard, lambda short: self._exchange.signal_memory(short=short))
        self._memory.sample()

    def _load(self, task: Task, shard: Shard) -> LoadedShard | None:
        plan, agent = self._memory.plan, _agent()
        packed = shard.packed or (plan.packed_streamed and not task.resident)
        # The session of such a shard has copies of the weights: they need their buffer only until it is made.
        apart = shard.packed and task.resident
        whole = 0, shard.nbytes
        begin, end = whole if task.resident else plan.partly_resident.get(shard.name, whole)
        placement = place(shard, (begin, end))
        # No other agent loads this shard now, so its kept parts are in memory, or this agent loads them.
        kept = self._exchange.residents.parts.get(task.index, ())
        ranges = [] if kept else staying(shard, (begin, end))
        keep_bytes = sum(room_bytes(*part) for part in ranges)
        reserved = placement.nbytes if task.resident else plan.buffer_bytes
        # Until the session is made.
        copy = second_copy_bytes(shard) if packed else 0
        passing = copy + placement.nbytes if apart else copy
        shared = shard.weights if task.resident and not apart and shard.weights in self._common else None
        if shared is not None and not plan.packed:
            # No other agent loads a shard with these weights now, so they are in memory, or this agent reads them.
            keep_bytes, reserved = 0 if shared in self._memory.shared else reserved, 0
        # A packed copy of a streamed shard takes as much as its buffer.
        session = session_bytes(shard, plan.threads) + copy
        session += plan.buffer_bytes if plan.packed_streamed and not task.resident else 0
        waits = plan.sessions is not None and not task.resident
        if not waits:
            reserved, session = reserved + session, 0
            self._memory.sessions.skip(task.ticket)

        def stale() -> bool:
            return self._exchange.is_stale(task)

        with self._trace.span(agent, "reserve", shard.name, pass_number=task.pass_number):
            if not self._memory.reservations.reserve(reserved + keep_bytes, task.ticket, stale):
                return None
        loaded = LoadedShard(
            index=task.index,
            session=None,
            buffer=None,
            reserved_bytes=reserved,
            pooled=not task.resident,
            packed=packed,
            shared=shared,
        )
        begun: list[Part] = []
        complete = True
        try:
            if shared is None:
                loaded.buffer, unread = self._memory.take_buffer() if loaded.pooled else Buffer(placement.nbytes), True
            else:
                loaded.buffer, unread = self._memory.shared.join(shared, placement.nbytes, keep_bytes)
                keep_bytes = 0
            begun.extend(Part(*part, Buffer(room_bytes(*part))) for part in ranges)
            streamed = Part(begin, end, loaded.buffer, placement)
            parts = sorted([streamed, *begun], key=lambda part: (part.begin, part.end))
            if unread:
                nbytes = sum(part.end - part.begin for part in parts)
                with self._trace.span(agent, "read", shard.name, nbytes=nbytes, pass_number=task.pass_number):
                    complete = self._storage.read_weights(shard, parts, stale, direct=plan.direct)
                if complete:
                    with self._lock:
                        self._read_bytes += nbytes
            if complete and unread and placement.places:
                with self._trace.span(agent, "widen", shard.name, pass_number=task.pass_number):
                    widen(shard, [*parts, *kept])
            if complete and waits:
                with self._trace.span(agent, "reserve", shard.name, pass_number=task.pass_number):
                    complete = self._memory.sessions.reserve(session, task.ticket, stale)
                loaded.session_bytes = session if complete else 0
            if complete:
                if packed:
                    self._memory.fit_heap(shard, streamed=not apart)
                kind: Kind = "pack" if packed else "session"
                with self._trace.span(agent, kind, shard.name, pass_number=task.pass_number):
                    loaded.session = self._session(shard, [*parts, *kept], packed=packed, copied=apart)
                if apart and loaded.buffer is not None:
                    loaded.buffer.close()
                    loaded.buffer = None
                    trim()
                if waits:
                    loaded.session_bytes -= copy
                    self._memory.sessions.release(copy)
                else:
                    loaded.reserved_bytes -= passing
                    self._memory.reservations.release(passing)
            self._memory.sample()
        except BaseException as error:
            # Its frames hold the session that failed: that must be gone before another shard may have its memory.
            let_go(error)
            self._abandon(loaded, begun, keep_bytes)
            raise
        if not complete:
            self._abandon(loaded, begun, keep_bytes)
            return None
        if begun:
            self._exchange.residents.keep(task.index, begun)
        return loaded

    def _abandon(self, loaded: LoadedShard, begun: Sequence[Part], keep_bytes: int) -> None:
        try:
            for part in begun:
                part.buffer.close()
        finally:
            self._memory.reservations.release(keep_bytes)
            self.free(loaded)

    def _pack(self, task: Task, shard: Shard) -> None:
        """Make a packed copy of a resident shard, from memory, and let it take the shard's place."""
        loaded = self._exchange.residents.shards.get(task.index)

        def stale() -> bool:
            return self._exchange.is_stale(task)

        if loaded is None or loaded.buffer is None or stale():
            return
        with self._trace.span(_agent(), "pack", shard.name):
            whole = Part(0, shard.nbytes, loaded.buffer, place(shard, (0, shard.nbytes)))
            session = self._session(shard, [whole], packed=True, copied=True)
        packed = LoadedShard(index=task.index, session=session, buffer=None, reserved_bytes=0, pooled=False)
        del session
        if self._exchange.residents.swap(task.index, packed, stale):
            # The plan has room for one copy: the next packing may begin when the original's memory is free.
            self._exchange.wait_freed(lambda: loaded.buffer is None)
        trim()
        self._memory.sample()

    def _session(self, shard: Shard, parts: Sequence[Part], *, packed: bool, copied: bool) -> ShardSession:
        threads = self._memory.plan.threads
        graph = self._storage.graph(shard)
        cores = self._affinity.pool(threads)
        return ShardSession(
            shard, graph, parts, threads, packed=packed, copied=copied, arena=self._in_arena, cores=cores
        )


def _agent() -> str:
    return threading.current_thread().name.removeprefix("pipeload-")
