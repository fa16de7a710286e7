"""How fast a model's files are read: by agents, by size of the requests, past the page cache and through it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pipeload.buffers import Buffer
from pipeload.manifest import PAGE_BYTES, Shard
from pipeload.pipeline import together
from pipeload.storage import Storage

__all__ = ["REQUEST_BYTES", "Bandwidth", "filled_buffer", "measure_bandwidth"]

REQUEST_BYTES = (8 << 20, 1 << 20)
"""Sizes of one read; the first is the one that the engine uses."""
_AGENTS = (1, 2, 4, 8)
_ENOUGH_S, _ENOUGH_BYTES = 0.5, 64_000_000
_SLOW_S = 2.0
"""A disk on which the bytes above take longer is measured with fewer."""
_SMALL_MODEL_S = 0.1
"""A model that is read sooner is read again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """Bytes per second. As the fields of `Profile`, by agents and by bytes of one read."""

    read_bytes_per_s: dict[int, float]
    cached_read_bytes_per_s: dict[int, float]
    read_bytes_per_s_by_request: dict[int, float]


def measure_bandwidth(
    storage: Storage, shards: Sequence[Shard], progress: Callable[[str, int, int], None]
) -> Bandwidth:
    """Read the shards' weights in many ways, for half a second each; nothing is kept.

    Raises:
        ShardError, LoadError: a file could not be read.
    """
    shards = [shard for shard in shards if shard.nbytes]
    if not shards:
        return Bandwidth(read_bytes_per_s={}, cached_read_bytes_per_s={}, read_bytes_per_s_by_request={})
    done, total = itertools.count(1), len(REQUEST_BYTES) + 2 * len(_AGENTS) - 1

    def measured(agents: int, request_bytes: int, direct: bool) -> float:
        bandwidth = _bandwidth(storage, shards, agents, request_bytes, direct)
        progress("Reading", next(done), total)
        return bandwidth

    progress("Reading", 0, total)
    by_request = {request_bytes: measured(1, request_bytes, True) for request_bytes in REQUEST_BYTES}
    best = max(by_request, key=by_request.__getitem__)
    return Bandwidth(
        read_bytes_per_s={1: by_request[best]} | {agents: measured(agents, best, True) for agents in _AGENTS[1:]},
        cached_read_bytes_per_s={agents: measured(agents, best, False) for agents in _AGENTS},
        read_bytes_per_s_by_request=dict(sorted(by_request.items())),
    )


def filled_buffer(nbytes: int) -> Buffer:
    """A buffer whose pages are there already: making them is no part of reading."""
    buffer = Buffer(nbytes)
    pages = buffer.piece(0, buffer.nbytes)[::PAGE_BYTES]
    pages[:] = bytes(len(pages))
    return buffer


def _bandwidth(storage: Storage, shards: Sequence[Shard], agents: int, request_bytes: int, direct: bool) -> float:
    """Bytes per second of agents that each read the next shard which nobody has begun, until that is enough."""
    for shard in shards:
        storage.forget_cached(shard)
    model_bytes = sum(shard.nbytes for shard in shards)
    turns, counts, over = itertools.count(), [0] * agents, threading.Event()

    def enough(seconds: float) -> bool:
        read_bytes = sum(counts)
        wanted_s = _SMALL_MODEL_S if read_bytes >= model_bytes else _ENOUGH_S
        return seconds >= _SLOW_S or (read_bytes >= min(_ENOUGH_BYTES, model_bytes) and seconds >= wanted_s)

    def read(agent: int) -> None:
        try:
            while not over.is_set():
                shard = shards[next(turns) % len(shards)]
                for nbytes in storage.stream_weights(shard, scratches[agent], direct=direct):
                    counts[agent] += nbytes
                    if over.is_set() or enough(time.perf_counter() - begin):
                        over.set()
                        break
        finally:
            # One that fails ends the others too.
            over.set()

    scratches = [filled_buffer(request_bytes) for _ in range(agents)]
    try:
        begin = time.perf_counter()
        together([partial(read, agent) for agent in range(agents)])
        return sum(counts) / (time.perf_counter() - begin)
    finally:
        for scratch in scratches:
            scratch.close()
