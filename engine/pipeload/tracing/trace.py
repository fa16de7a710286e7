"""Every agent's work over time: spans and counters -> times per agent, and a Chrome trace.

```
                 begin_s                                   end_s
inference   ....| wait |### run 0 ###|### run 1 ###|..wait..|...      wait_s = window - union of spans without waiting
loader-0    | read 0 |..reserve..|#### read 2 ####|#session#|...      a span that crosses the window's edge is cut there
daemon      .........................|free 0|......|free 1|.....
```

Recording is always on, so it is cheap in time and memory: a span takes a few microseconds and 41 bytes of a ring
that is allocated once. A trace therefore occupies the same memory after a million passes as after a hundred.
"""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from struct import Struct
from typing import Any, Literal, get_args

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

Kind = Literal["wait", "reserve", "read", "widen", "session", "pack", "run", "free"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WAITING: frozenset[str] = frozenset({"wait", "reserve"})
"""Kinds of spans in which an agent does nothing: it waits for a shard, for work, or for budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One activity of one agent, from one moment to another.

    Attributes:
        agent: "inference", "loader-0" ... or "daemon".
        kind: the activity.
        shard: name of the shard that it was for; empty where there is none.
        begin_s, end_s: `time.perf_counter`.
        nbytes: bytes of weights that it read.
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
    """Progress of a pass, reported once for each shard, when it has run.

    Attributes:
        shard: its name.
        index: number of the pass's shards that have run, this one included.
        count: number of shards of the pass.
        elapsed_s: seconds since the pass began.
        eta_s: estimated seconds until the pass ends; None without an estimate.
    """

    __module__ = "pipeload"

    shard: str
    index: int
    count: int
    elapsed_s: float
    eta_s: float | None


class _Ring:
    """The newest records, all of one size, in memory that is allocated once.

    Args:
        record: layout of a record's fields.
        limit: at most this many records are kept.
    """

    def __init__(self, record: Struct, limit: int) -> None:
        self._record = record
        self._limit = limit
        self._memory = bytearray(record.size * limit)
        self._count = 0
        self._lock = threading.Lock()

    def append(self, *fields: float) -> None:
        """Keep a record in place of the oldest one."""
        with self._lock:
            self._record.pack_into(self._memory, self._count % self._limit * self._record.size, *fields)
            self._count += 1

    @property
    def count(self) -> int:
        """The number of records that were ever kept."""
        return self._count

    def since(self, number: int) -> Iterator[tuple[Any, ...]]:
        """The records after the first `number` that were ever kept, in the order in which they were added."""
        size = self._record.size
        with self._lock:
            first = max(number, self._count - self._limit)
            if first >= self._count:
                return iter(())
            begin, end = first % self._limit * size, ((self._count - 1) % self._limit + 1) * size
            around = end <= begin
            copy = self._memory[begin:] + self._memory[:end] if around else self._memory[begin:end]
        return self._record.iter_unpack(copy)


_SPAN = Struct("=IBIddqq")
"""Number of the agent, number of the kind, number of the shard, begin, end, bytes, pass."""
_END = 4
"""Place of the end in such a record."""
_SAMPLE = Struct("=Idd")
"""Number of the counter, time, value."""


class Trace:
    """The newest spans and samples of all agents. Every method may be called from any thread.

    Args:
        limit: at most this many spans, and this many samples, are kept; the oldest are dropped. One of each takes 61
            bytes together.
    """

    def __init__(self, limit: int = 100_000) -> None:
        self._spans = _Ring(_SPAN, limit)
        self._samples = _Ring(_SAMPLE, limit)
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._naming = threading.Lock()

    @property
    def spans(self) -> list[Span]:
        """All spans that are kept, in the order in which they were added."""
        return [self._span(record) for record in self._spans.since(0)]

    @property
    def samples(self) -> list[Sample]:
        """All samples that are kept, in the order in which they were taken."""
        return [
            Sample(counter=self._names[counter], time_s=time_s, value=value)
            for counter, time_s, value in self._samples.since(0)
        ]

    def add(self, span: Span) -> None:
        """Keep a span. An agent adds its spans when they end."""
        self._spans.append(
            self._number(span.agent),
            KINDS.index(span.kind),
            self._number(span.shard),
            span.begin_s,
            span.end_s,
            span.nbytes,
            span.pass_number,
        )

    @contextmanager
    def span(self, agent: str, kind: Kind, shard: str, nbytes: int = 0, pass_number: int = 0) -> Iterator[None]:
        """Add a span over the time that the body takes, also when it raises."""
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
        """Set a counter's value from now on."""
        self._samples.append(self._number(counter), time.perf_counter(), value)

    @property
    def count(self) -> int:
        """The number of spans that were ever added."""
        return self._spans.count

    def spans_since(self, begin_s: float, count: int) -> list[Span]:
        """The spans that ended after a moment, in the order in which they were added.

        Args:
            begin_s: the moment.
            count: `count` at that moment or before: earlier spans are not looked at.
        """
        return [self._span(record) for record in self._spans.since(count) if record[_END] > begin_s]

    def _span(self, record: tuple[Any, ...]) -> Span:
        agent, kind, shard, begin_s, end_s, nbytes, pass_number = record
        return Span(
            agent=self._names[agent],
            kind=KINDS[kind],
            shard=self._names[shard],
            begin_s=begin_s,
            end_s=end_s,
            nbytes=nbytes,
            pass_number=pass_number,
        )

    def _number(self, name: str) -> int:
        """The number that stands for a name in the records."""
        number = self._numbers.get(name)
        if number is None:
            with self._naming:
                number = self._numbers.get(name, len(self._names))
                if number == len(self._names):
                    self._names.append(name)
                    self._numbers[name] = number
        return number


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentTimes:
    """How one agent spent a window of time.

    Attributes:
        kinds: seconds of each kind of span that occurs, waiting included.
        busy_s: seconds in which it did not wait.
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
