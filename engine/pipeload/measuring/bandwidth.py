"""Bandwidth of a model's files: by agents, by size of the requests, past the page cache and through it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np

from pipeload.format.manifest import PAGE_BYTES, Shard
from pipeload.machine.cores import pin
from pipeload.machine.threads import together
from pipeload.notify import Notify
from pipeload.storage.buffers import Buffer
from pipeload.storage.weights import Storage

__all__ = ["REQUEST_BYTES", "Bandwidth", "filled_buffer", "measure_bandwidth", "one_agent_bandwidth"]

REQUEST_BYTES = (8 << 20, 1 << 20)
"""Sizes of one read; the engine begins with the first."""
_AGENTS = (1, 2, 4, 8)
_WARM_S = 0.2
"""Reads of this time are not counted: a throttled disk first grants the credit that it has saved while idle."""
_ENOUGH_S, _ENOUGH_BYTES = 0.8, 64_000_000
_FEW_READS = 4
"""Fewer reads tell too little about the time between them."""
_ROUNDS = 2
"""Each number of agents reads this many times, in turns: the disk's other load changes from second to second."""
_SLOW_S = 3.0
"""A disk that takes longer for the bytes above is measured with fewer."""
_SMALL_MODEL_S = 0.1
"""A model that is read in less time is read repeatedly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """Bytes per second. As the fields of `Profile`, by agents and by bytes of one read."""

    read_bytes_per_s: dict[int, float]
    cached_read_bytes_per_s: dict[int, float]
    read_bytes_per_s_by_request: dict[int, float]


def measure_bandwidth(
    storage: Storage, shards: Sequence[Shard], progress: Notify, cores: Collection[int] = ()
) -> Bandwidth:
    """Read the shards' weights in several ways, for about a second each; nothing is kept.

    Args:
        storage: the model's files.
        shards: what is read.
        progress: called with (what, done, total).
        cores: logical processors on which agents read; none for any.

    Raises:
        ShardError, LoadError: a file could not be read.
    """
    shards = [shard for shard in shards if shard.nbytes]
    if not shards:
        return Bandwidth(read_bytes_per_s={}, cached_read_bytes_per_s={}, read_bytes_per_s_by_request={})
    engine_bytes, other_bytes = REQUEST_BYTES
    ways = [(agents, engine_bytes, True) for _ in range(_ROUNDS) for agents in _AGENTS]
    ways += [(agents, engine_bytes, False) for agents in _AGENTS] + [(1, other_bytes, True)]
    seen: dict[tuple[int, int, bool], list[float]] = {}
    for number, way in enumerate(ways):
        progress("Reading", number, len(ways))
        seen.setdefault(way, []).append(_bandwidth(storage, shards, *way, cores))
    progress("Reading", len(ways), len(ways))
    found = {way: fmean(rounds) for way, rounds in seen.items()}
    return Bandwidth(
        read_bytes_per_s={agents: found[agents, engine_bytes, True] for agents in _AGENTS},
        cached_read_bytes_per_s={agents: found[agents, engine_bytes, False] for agents in _AGENTS},
        read_bytes_per_s_by_request={size: found[1, size, True] for size in sorted(REQUEST_BYTES)},
    )


def one_agent_bandwidth(storage: Storage, shards: Sequence[Shard]) -> float:
    """Bytes per second of one Loading Agent past the page cache, in about a second; 0.0 without weights.

    Raises:
        ShardError, LoadError: a file could not be read.
    """
    shards = [shard for shard in shards if shard.nbytes]
    return _bandwidth(storage, shards, 1, REQUEST_BYTES[0], True) if shards else 0.0


def filled_buffer(nbytes: int) -> Buffer:
    """A buffer whose pages are there already: making them is no part of reading."""
    buffer = Buffer(nbytes)
    pages = buffer.piece(0, buffer.nbytes)[::PAGE_BYTES]
    pages[:] = bytes(len(pages))
    return buffer


def _bandwidth(
    storage: Storage,
    shards: Sequence[Shard],
    agents: int,
    request_bytes: int,
    direct: bool,
    cores: Collection[int] = (),
) -> float:
    """Bytes per second of agents that each read the next shard that no agent has begun, until they have read enough."""
    for shard in shards:
        storage.forget_cached(shard)
    model_bytes = sum(shard.nbytes for shard in shards)
    turns, over = itertools.count(), threading.Event()
    reads: list[tuple[float, int]] = []

    def enough(seconds: float) -> bool:
        read_bytes = sum(nbytes for _, nbytes in reads)
        wanted_s = _SMALL_MODEL_S if read_bytes >= model_bytes else _WARM_S + _ENOUGH_S
        return seconds >= _SLOW_S or (read_bytes >= min(_ENOUGH_BYTES, model_bytes) and seconds >= wanted_s)

    def read(agent: int) -> None:
        try:
            pin(0, cores)
            while not over.is_set():
                shard = shards[next(turns) % len(shards)]
                for nbytes in storage.stream_weights(shard, scratches[agent], direct=direct):
                    seconds = time.perf_counter() - begin
                    reads.append((seconds, nbytes))
                    if over.is_set() or enough(seconds):
                        over.set()
                        break
        finally:
            # An agent that fails ends the others too.
            over.set()

    scratches = [filled_buffer(request_bytes) for _ in range(agents)]
    try:
        begin = time.perf_counter()
        together([partial(read, agent) for agent in range(agents)])
    finally:
        for scratch in scratches:
            scratch.close()
    return _slope(reads)


def _slope(reads: Sequence[tuple[float, int]]) -> float:
    """Bytes per second of reads that ended at (seconds, bytes): of the line that fits their sum best.

    The first or last of several reads at a time would make as much as a tenth of a second's bytes of difference.
    """
    ends, sizes = np.array(sorted(reads)).T
    counted = ends > (_WARM_S if ends[-1] > 2 * _WARM_S else 0.0)
    if np.unique(ends[counted]).size < _FEW_READS:
        return float(sizes.sum() / ends[-1])
    return float(np.polyfit(ends[counted], sizes.cumsum()[counted], 1)[0])
