"""A trace like a real one: two Loading Agents, a large encoder of 24 blocks, a budget for three buffers."""

from __future__ import annotations

import random
from math import inf

from pipeload.tracing.trace import Kind, Span, Trace

BLOCK_BYTES = 50_400_000
BUDGET_BYTES = 480_000_000
BASE_BYTES = 120_000_000
BUFFERS = 3
LOADERS = 2
FACTS = {"model": "bert-large", "budget_bytes": BUDGET_BYTES, "loaders": LOADERS, "buffers": BUFFERS}
RESIDENT = frozenset({"prologue", "block.007", "block.015", "block.023", "epilogue"})
SHARDS = ["prologue", *(f"block.{number:03}" for number in range(24)), "epilogue"]


class _Clock(Trace):
    """A trace whose samples are taken at the moments that the simulation says."""

    def sample_at(self, counter: str, time_s: float, value: float) -> None:
        self._samples.append(self._number(counter), time_s, value)


def synthetic_trace(passes: int = 2) -> Trace:
    """The times that the recurrence of the schedule gives, with some noise: the same at every call."""
    noise = random.Random(3)
    trace = _Clock()
    loader_free = [1000.0] * LOADERS
    buffer_free = [1000.0] * BUFFERS
    inference_free, daemon_free = 1000.0005, 1000.0
    changes: list[tuple[float, int, int]] = []
    residents: set[str] = set()

    def add(agent: str, kind: Kind, shard: str, begin_s: float, end_s: float, number: int, nbytes: int = 0) -> None:
        trace.add(
            Span(
                agent=agent,
                kind=kind,
                shard=shard,
                begin_s=begin_s,
                end_s=end_s,
                nbytes=nbytes,
                pass_number=number,
            )
        )

    for number in range(1, passes + 2):
        ahead = number > passes  # a pass without a caller: shards that fit are read for it
        for shard in SHARDS:
            nbytes = BLOCK_BYTES if shard.startswith("block") else 3_000_000
            ready = 0.0
            streamed = shard not in RESIDENT
            if ahead and (not streamed or min(buffer_free) == inf):
                continue
            if shard not in residents:
                loader = loader_free.index(min(loader_free))
                agent = f"loader-{loader}"
                begin = loader_free[loader]
                granted = begin
                if streamed:
                    slot = buffer_free.index(min(buffer_free))
                    granted = max(begin, buffer_free[slot])
                    if granted > begin:
                        add(agent, "reserve", shard, begin, granted, number)
                else:
                    residents.add(shard)
                read = granted + nbytes / 0.62e9 * noise.uniform(0.9, 1.15)
                session = read + 0.0025 * noise.uniform(0.8, 1.4)
                add(agent, "read", shard, granted, read, number, nbytes)
                add(agent, "session", shard, read, session, number)
                loader_free[loader] = ready = session
                changes.append((granted, nbytes, int(streamed)))
            if ahead:
                buffer_free[slot] = inf
                continue
            if ready > inference_free:
                add("inference", "wait", shard, inference_free, ready, number)
                inference_free = ready
            seconds = (0.046 if shard.startswith("block") else 0.006) * noise.uniform(0.93, 1.1)
            add("inference", "run", shard, inference_free, inference_free + seconds, number)
            inference_free += seconds + 0.0002
            if streamed:
                begin = max(daemon_free, inference_free)
                daemon_free = begin + 0.004 * noise.uniform(0.7, 1.5)
                add("daemon", "free", shard, begin, daemon_free, number)
                buffer_free[slot] = daemon_free
                changes.append((daemon_free, -nbytes, -1))
        inference_free += 0.0008
    reserved = buffers = 0
    for time_s, nbytes, slots in sorted(changes):
        reserved += nbytes
        buffers += slots
        trace.sample_at("reserved_bytes", time_s, reserved)
        trace.sample_at("buffers", time_s, buffers)
        trace.sample_at("rss_bytes", time_s, BASE_BYTES + 0.97 * reserved + noise.uniform(0, 6e6))
    return trace
