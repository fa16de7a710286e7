"""What every agent did, and when: spans and counters -> times per agent, and a Chrome trace.

```
                 begin_s                                   end_s
inference   ....| wait |### run 0 ###|### run 1 ###|..wait..|...      wait_s = window - union of what is no waiting
loader-0    | read 0 |..reserve..|#### read 2 ####|#session#|...      a span that crosses the window's edge is cut there
daemon      .........................|free 0|......|free 1|.....
```

Recording is on always, so it is cheap: one append for each span, a few microseconds, and no lock.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, get_args

__all__ = [
    "KINDS",
    "WAITING",
    "AgentTimes",
    "Kind",
    "Progress",
    "Sample",
    "Span",
    "Trace",
    "agent_times",
    "busy_s",
    "lane_order",
    "read_bytes",
]

Kind = Literal["wait", "reserve", "read", "session", "pack", "run", "free"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WAITING: frozenset[str] = frozenset({"wait", "reserve"})
"""Kinds of spans in which an agent does nothing: it waits for a shard, for work, or for budget."""
_LATE_S = 1.0
"""An agent may lose its core between the end of a span and adding it, so spans are not quite in order of their ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that one agent did from one moment to another.

    Attributes:
        agent: "inference", "loader-0" ... or "daemon".
        kind: what it did.
        shard: with which shard; empty where there is none.
        begin_s, end_s: `time.perf_counter`.
        nbytes: weights that were read.
        pass_number: the pass that it was for, from 1; 0 when it was for none.
    """

    agent: str
    kind: Kind
    shard: str
    begin_s: float
    end_s: float
    nbytes: int = 0
    pass_number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The value of a counter from one moment on, such as "buffers", "reserved_bytes" or "rss_bytes"."""

    counter: str
    time_s: float
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a pass is, told once for each shard, when it has run.

    Attributes:
        shard: its name.
        index: how many shards of the pass have run, this one included.
        count: shards of the pass.
        elapsed_s: since the pass began.
        eta_s: until the pass ends, as far as it can be told.
    """

    shard: str
    index: int
    count: int
    elapsed_s: float
    eta_s: float | None


class Trace:
    """The newest spans and samples of all agents. Every method may be called from any thread.

    Args:
        limit: how many spans, and how many samples, are kept; the oldest are dropped.
    """

    def __init__(self, limit: int = 100_000) -> None:
        self._spans: deque[Span] = deque(maxlen=limit)
        self._samples: deque[Sample] = deque(maxlen=limit)

    @property
    def spans(self) -> list[Span]:
        """All spans that are kept, in the order in which they were added."""
        # Iterating fails while another thread appends; copying is one step of the interpreter.
        return list(self._spans.copy())

    @property
    def samples(self) -> list[Sample]:
        """All samples that are kept, in the order in which they were taken."""
        return list(self._samples.copy())

    def add(self, span: Span) -> None:
        """Keep a span. An agent adds its spans when they end."""
        self._spans.append(span)

    @contextmanager
    def span(self, agent: str, kind: Kind, shard: str, nbytes: int = 0, pass_number: int = 0) -> Iterator[None]:
        """Add the time that the body takes, also when it raises."""
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(
                Span(
                    agent=agent,
                    kind=kind,
                    shard=shard,
                    begin_s=begin_s,
                    end_s=time.perf_counter(),
                    nbytes=nbytes,
                    pass_number=pass_number,
                )
            )

    def sample(self, counter: str, value: float) -> None:
        """Say what a counter's value is from now on."""
        self._samples.append(Sample(counter=counter, time_s=time.perf_counter(), value=value))

    def spans_since(self, begin_s: float) -> list[Span]:
        """The spans that ended after a moment, in the order in which they were added.

        Takes time in proportion to what it returns, not to what is kept. A span that was added more than a second
        after its end may be missed.
        """
        while True:
            try:
                newest = list(takewhile(lambda span: span.end_s > begin_s - _LATE_S, reversed(self._spans)))
            except RuntimeError:  # another thread added a span meanwhile
                continue
            return [span for span in reversed(newest) if span.end_s > begin_s]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentTimes:
    """How one agent spent a window of time.

    Attributes:
        kinds: seconds of each kind of span that occurs, waiting included.
        busy_s: seconds in which it did anything but wait.
        wait_s: the rest of the window.
    """

    kinds: dict[str, float]
    busy_s: float
    wait_s: float


def busy_s(spans: Iterable[Span]) -> float:
    """Seconds that at least one of the spans covers: the length of the union of their intervals."""
    return _union_s((span.begin_s, span.end_s) for span in spans)


def read_bytes(spans: Iterable[Span]) -> int:
    """Bytes that the reads among the spans brought into memory."""
    return sum(span.nbytes for span in spans if span.kind == "read")


def agent_times(spans: Iterable[Span], begin_s: float, end_s: float) -> dict[str, AgentTimes]:
    """How each agent that did anything spent the window from `begin_s` to `end_s`, in the order of the lanes."""
    pieces: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for span in spans:
        if span.begin_s < end_s and span.end_s > begin_s:
            pieces[span.agent][span.kind].append((max(span.begin_s, begin_s), min(span.end_s, end_s)))
    times = {}
    for agent in sorted(pieces, key=lane_order):
        kinds = pieces[agent]
        busy = _union_s(piece for kind, group in kinds.items() if kind not in WAITING for piece in group)
        times[agent] = AgentTimes(
            kinds={kind: _union_s(kinds[kind]) for kind in KINDS if kind in kinds},
            busy_s=busy,
            wait_s=max(0.0, end_s - begin_s - busy),
        )
    return times


def lane_order(agent: str) -> tuple[int, int, str]:
    """Sorts agents as the pictures have them: inference, the Loading Agents by number, the Daemon, others."""
    loader = re.fullmatch(r"loader-(\d+)", agent)
    place = 0 if agent == "inference" else 1 if loader else 2 if agent == "daemon" else 3
    return place, int(loader[1]) if loader else 0, agent


def _union_s(intervals: Iterable[tuple[float, float]]) -> float:
    total_s, covered_to_s = 0.0, float("-inf")
    for begin_s, end_s in sorted(intervals):
        if end_s > covered_to_s:
            total_s += end_s - max(begin_s, covered_to_s)
            covered_to_s = end_s
    return total_s
