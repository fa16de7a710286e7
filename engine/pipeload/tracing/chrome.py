"""A trace to a file of Chrome trace events, and back: spans, samples, passes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pipeload.errors import ConfigError
from pipeload.machine.files import read_stream, write_whole
from pipeload.tracing.trace import Kind, Sample, Span, Trace, lane_order

__all__ = [
    "Pass",
    "Recording",
    "choose",
    "passes",
    "read",
    "TRACE_FORMAT",
    "write_chrome",
]


TRACE_FORMAT = 1
"""Version of pipeload's additions to the Chrome trace: names of lanes, kinds, counters and arguments."""
_MOST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A trace that was read from a file. Times are seconds since its first event.

    Attributes:
        spans, samples: the agents' work, and the counters.
        facts: the writer's facts about model and plan.
    """

    spans: list[Span]
    samples: list[Sample]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """The time from the beginning of the Inference Agent's first span for one pass to the end of its last one."""

    number: int
    begin_s: float
    end_s: float


class _Event(msgspec.Struct):
    ph: str
    name: str = ""
    cat: str = ""
    tid: int = 0
    ts: float = 0.0
    dur: float = 0.0
    args: dict[str, Any] = {}


class _OtherData(msgspec.Struct):
    pipeload: dict[str, Any]


class _Document(msgspec.Struct):
    trace_events: list[_Event] = msgspec.field(name="traceEvents")
    other_data: _OtherData = msgspec.field(name="otherData")


class _SpanArguments(msgspec.Struct):
    shard: str
    nbytes: int
    pass_number: int = msgspec.field(name="pass")


class _LaneArguments(msgspec.Struct):
    name: str


class _CounterArguments(msgspec.Struct):
    value: float


def read(path: str | os.PathLike[str]) -> Recording:
    """Read a file of `write_chrome`.

    Raises:
        ConfigError: the file cannot be read, or is no trace of pipeload.
    """
    remedy = "Write one with the option --trace of a command that runs a model."
    try:
        document = msgspec.json.decode(read_stream(Path(path), most_bytes=_MOST_BYTES), type=_Document)
        facts = document.other_data.pipeload
        if (found := facts.get("trace_format")) != TRACE_FORMAT:
            raise ConfigError(f"{path} is a trace of format {found}, and this pipeload reads {TRACE_FORMAT}. {remedy}")
        names = [event for event in document.trace_events if event.ph == "M" and event.name == "thread_name"]
        lanes = {event.tid: msgspec.convert(event.args, _LaneArguments).name for event in names}
        spans = [_span(event, lanes) for event in document.trace_events if event.ph == "X"]
        samples = [_sample(event) for event in document.trace_events if event.ph == "C"]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. {remedy}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no trace of pipeload, or not a whole one: {error}. {remedy}") from error
    if not spans:
        raise ConfigError(f"{path} has no spans: nothing ran while it was recorded. {remedy}")
    return Recording(spans=spans, samples=samples, facts=facts)


def passes(spans: Iterable[Span]) -> list[Pass]:
    """The passes that the Inference Agent worked on, in order."""
    work: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        if span.agent == "inference" and span.pass_number:
            work[span.pass_number].append(span)
    return [
        Pass(number=number, begin_s=min(s.begin_s for s in work[number]), end_s=max(s.end_s for s in work[number]))
        for number in sorted(work)
    ]


def choose(found: list[Pass], first: int, last: int) -> list[Pass]:
    """The passes from number `first` to number `last`.

    Raises:
        ConfigError: none of them is in the trace.
    """
    chosen = [each for each in found if first <= each.number <= last]
    if not chosen:
        there = f"has passes {found[0].number}-{found[-1].number}" if found else "has no passes"
        raise ConfigError(f"The trace {there}, and {first}-{last} was asked for.")
    return chosen


def _span(event: _Event, lanes: dict[int, str]) -> Span:
    arguments = msgspec.convert(event.args, _SpanArguments)
    if event.tid not in lanes or event.dur < 0:
        raise msgspec.ValidationError(f"the event '{event.name}' at {event.ts} has no lane or no duration")
    return Span(
        agent=lanes[event.tid],
        kind=msgspec.convert(event.cat, Kind),
        shard=arguments.shard,
        begin_s=event.ts / 1e6,
        end_s=(event.ts + event.dur) / 1e6,
        nbytes=arguments.nbytes,
        pass_number=arguments.pass_number,
    )


def _sample(event: _Event) -> Sample:
    value = msgspec.convert(event.args, _CounterArguments).value
    return Sample(counter=event.name, time_s=event.ts / 1e6, value=value)


def write_chrome(trace: Trace, path: str | os.PathLike[str], facts: Mapping[str, Any] | None = None) -> None:
    """Write the trace as Chrome trace events (JSON): for https://ui.perfetto.dev, and for `pipeload timeline`.

    The file appears when it is complete. Times are microseconds since the first span. Source: "Trace Event Format".

    Args:
        trace: the spans and samples to write.
        path: the file; an older one is replaced.
        facts: facts about model and plan for the reader, such as `model`, `budget_bytes`, `loaders`, `buffers`.

    Raises:
        OSError: it cannot be written.
    """
    document = {
        "traceEvents": _events(trace.spans, trace.samples),
        "displayTimeUnit": "ms",
        "otherData": {"pipeload": {**(facts or {}), "trace_format": TRACE_FORMAT}},
    }
    write_whole(Path(path), msgspec.json.encode(document))


def _events(spans: list[Span], samples: list[Sample]) -> list[dict[str, Any]]:
    lanes = {agent: tid for tid, agent in enumerate(sorted({span.agent for span in spans}, key=lane_order), 1)}
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "pipeload"}}]
    for agent, tid in lanes.items():
        lane = {"ph": "M", "pid": 1, "tid": tid}
        events.append({**lane, "name": "thread_name", "args": {"name": agent}})
        events.append({**lane, "name": "thread_sort_index", "args": {"sort_index": tid}})
    zero_s = min([span.begin_s for span in spans] + [sample.time_s for sample in samples], default=0.0)

    def nanoseconds(time_s: float) -> int:
        # Rounded before they are subtracted: spans that touch must not overlap, or viewers nest them.
        return round((time_s - zero_s) * 1e9)

    # An outer span comes before those inside it.
    for span in sorted(spans, key=lambda span: (lanes[span.agent], span.begin_s, -span.end_s)):
        begin, end = nanoseconds(span.begin_s), nanoseconds(span.end_s)
        arguments: dict[str, Any] = {"shard": span.shard, "nbytes": span.nbytes, "pass": span.pass_number}
        if span.nbytes and end > begin:
            arguments["GB/s"] = round(span.nbytes / (end - begin), 3)
        events.append(
            {
                "ph": "X",
                "pid": 1,
                "tid": lanes[span.agent],
                "name": f"{span.kind} {span.shard}".rstrip(),
                "cat": span.kind,
                "ts": begin / 1000,
                "dur": (end - begin) / 1000,
                "args": arguments,
            }
        )
    events += (
        {
            "ph": "C",
            "pid": 1,
            "name": sample.counter,
            "ts": nanoseconds(sample.time_s) / 1000,
            "args": {"value": sample.value},
        }
        for sample in sorted(samples, key=lambda sample: sample.time_s)
    )
    return events
