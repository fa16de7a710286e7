"""Spans and counters: the bound, the threads, the arithmetic, and the file that Perfetto opens."""

from __future__ import annotations

import json
import math
import threading
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import PATIENCE_S, Background

from pipeload.tracing.chrome import write_chrome
from pipeload.tracing.trace import Kind, Span, Trace, agent_times, busy_s, lane_order, read_bytes


def span(
    begin_s: float, end_s: float, kind: Kind = "run", agent: str = "inference", shard: str = "block.000", **more: int
) -> Span:
    return Span(agent=agent, kind=kind, shard=shard, begin_s=begin_s, end_s=end_s, **more)


@pytest.mark.parametrize(
    ("intervals", "seconds"),
    [
        ([], 0),
        ([(1, 3)], 2),
        ([(1, 2), (4, 6)], 3),
        ([(1, 2), (2, 3)], 2),
        ([(1, 4), (2, 6)], 5),
        ([(2, 6), (1, 4)], 5),
        ([(1, 9), (2, 3), (4, 5)], 8),
        ([(1, 3), (1, 3)], 2),
        ([(5, 5)], 0),
        ([(1, 4), (2, 3), (3.5, 5), (7, 8)], 5),
    ],
)
def test_busy_is_the_union_of_the_intervals(intervals: list[tuple[float, float]], seconds: float) -> None:
    assert busy_s(span(begin, end) for begin, end in intervals) == pytest.approx(seconds)


def test_only_reads_count_as_bytes_read() -> None:
    spans = [
        span(0, 1, "read", nbytes=30),
        span(1, 2, "session", nbytes=7),
        span(1, 3, "read", agent="loader-1", nbytes=12),
    ]
    assert read_bytes(spans) == 42


def test_times_of_agents_are_cut_to_the_window() -> None:
    spans = [
        span(0, 3, "read", "loader-0"),  # half of it before the window
        span(3, 4, "reserve", "loader-0"),
        span(4, 9, "read", "loader-0"),
        span(9, 14, "session", "loader-0"),  # ends after it
        span(2, 5, "wait"),
        span(5, 9, "run"),
        span(11, 12, "free", "daemon"),  # outside
    ]
    times = agent_times(spans, 2, 10)
    assert list(times) == ["inference", "loader-0"]
    assert times["loader-0"].kinds == {"reserve": 1, "read": 6, "session": 1}
    assert (times["loader-0"].busy_s, times["loader-0"].wait_s) == (7, 1)
    assert times["inference"].kinds == {"wait": 3, "run": 4}
    assert (times["inference"].busy_s, times["inference"].wait_s) == (4, 4)


def test_waiting_for_work_or_budget_is_not_busy() -> None:
    times = agent_times([span(0, 1, "wait"), span(1, 2, "reserve")], 0, 4)["inference"]
    assert (times.busy_s, times.wait_s) == (0, 4)


def test_work_inside_of_waiting_and_of_other_work_counts_once() -> None:
    spans = [span(0, 10, "wait"), span(2, 6, "read"), span(4, 8, "session"), span(5, 6, "run")]
    times = agent_times(spans, 0, 10)["inference"]
    assert (times.busy_s, times.wait_s) == (6, 4)
    assert times.kinds == {"wait": 10, "read": 4, "session": 4, "run": 1}


def test_an_empty_window_has_no_agents() -> None:
    assert agent_times([span(0, 1), span(2, 3)], 1, 2) == {}


def test_agents_come_in_the_order_of_the_lanes() -> None:
    agents = ["watch", "daemon", "loader-10", "loader-2", "inference", "loader-0"]
    assert sorted(agents, key=lane_order) == ["inference", "loader-0", "loader-2", "loader-10", "daemon", "watch"]


def test_the_oldest_spans_and_samples_are_dropped() -> None:
    trace = Trace(limit=3)
    for number in range(5):
        trace.add(span(number, number + 1))
        trace.sample("buffers", number)
    assert [each.begin_s for each in trace.spans] == [2, 3, 4]
    assert [each.value for each in trace.samples] == [2, 3, 4]


def test_a_span_measures_its_body() -> None:
    trace = Trace()
    with trace.span("loader-0", "read", "block.001", nbytes=5, pass_number=2):
        trace.sample("buffers", 1)
    (found,) = trace.spans
    assert (found.agent, found.kind, found.shard, found.nbytes, found.pass_number) == (
        "loader-0",
        "read",
        "block.001",
        5,
        2,
    )
    assert found.begin_s <= trace.samples[0].time_s <= found.end_s


def test_a_span_is_added_when_its_body_raises() -> None:
    trace = Trace()
    with pytest.raises(SystemExit), trace.span("loader-0", "read", "block.001"):
        raise SystemExit
    assert [each.kind for each in trace.spans] == ["read"]


def test_spans_since_a_moment_are_those_that_ended_after_it() -> None:
    trace = Trace()
    spans = [span(0, 5), span(4, 11), span(9, 10), span(9, 12), span(12, 12.5)]
    for each in spans:
        trace.add(each)
    assert trace.spans_since(10, 0) == [spans[1], spans[3], spans[4]]
    assert trace.spans_since(20, 0) == []
    assert trace.spans_since(-1, 0) == spans


def test_spans_after_a_count_are_looked_at_and_no_others() -> None:
    trace = Trace(limit=8)
    for number in range(6):
        trace.add(span(number, number + 1))
    before = trace.count
    for number in range(6, 10):
        trace.add(span(number, number + 1))
    assert (before, trace.count) == (6, 10)
    assert trace.spans_since(0, before) == [span(number, number + 1) for number in range(6, 10)]
    assert trace.spans_since(8, before) == [span(8, 9), span(9, 10)]
    assert trace.spans_since(0, trace.count) == []


@pytest.mark.parametrize("count", range(1, 14))
def test_the_newest_spans_are_kept_in_their_order(count: int) -> None:
    trace = Trace(limit=4)
    for number in range(count):
        trace.add(span(number, number + 1))
    assert trace.spans == [span(number, number + 1) for number in range(max(0, count - 4), count)]


def test_a_full_trace_occupies_the_same_memory_for_ever() -> None:
    trace = Trace(limit=500)

    def record(count: int) -> int:
        for number in range(count):
            trace.add(span(number * 1.1, number * 1.1 + 1, agent=f"loader-{number % 4}"))
            trace.sample("rss_bytes", number * 1.1)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        few = record(10)
        assert record(5000) - few < 2000
    finally:
        tracemalloc.stop()


def test_many_threads_may_record_and_read_at_once() -> None:
    trace = Trace(limit=5000)
    ready = threading.Barrier(5)

    def record(agent: str) -> None:
        ready.wait(PATIENCE_S)
        for number in range(1000):
            trace.add(span(number, number + 1, agent=agent))
            trace.sample("buffers", number)

    def read() -> int:
        ready.wait(PATIENCE_S)
        most = 0
        while most < 4000:
            assert len(trace.samples) <= 4000
            most = max(most, len(trace.spans), len(trace.spans_since(0, 0)))
        return most

    writers = [Background(record, f"loader-{number}") for number in range(4)]
    reader = Background(read)
    for writer in writers:
        writer.end()
    assert reader.end() == 4000
    for number in range(4):
        own = [each.begin_s for each in trace.spans if each.agent == f"loader-{number}"]
        assert own == list(range(1000))


def written(trace: Trace, path: Path, **facts: Any) -> dict[str, Any]:
    write_chrome(trace, path, facts)
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_the_chrome_trace_names_its_lanes_in_order(tmp_path: Path) -> None:
    trace = Trace()
    for agent in ("daemon", "loader-1", "loader-0", "inference"):
        trace.add(span(1, 2, agent=agent))
    events = written(trace, tmp_path / "trace.json")["traceEvents"]
    metadata = [event for event in events if event["ph"] == "M"]
    assert metadata[0] == {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "pipeload"}}
    names = {event["tid"]: event["args"]["name"] for event in metadata if event["name"] == "thread_name"}
    places = {event["tid"]: event["args"]["sort_index"] for event in metadata if event["name"] == "thread_sort_index"}
    lanes = ["inference", "loader-0", "loader-1", "daemon"]
    assert [names[tid] for tid in sorted(places, key=lambda tid: places[tid])] == lanes
    # Viewers take lane 0 for the idle task of a processor.
    assert 0 not in names


def test_the_chrome_trace_has_the_spans_in_microseconds(tmp_path: Path) -> None:
    trace = Trace()
    trace.add(span(100.0, 100.002, "read", "loader-0", "block.001", nbytes=4_000_000, pass_number=3))
    trace.add(span(100.001, 100.0015, "wait", shard=""))
    events = written(trace, tmp_path / "trace.json")["traceEvents"]
    wait, read = (event for event in events if event["ph"] == "X")
    assert (read["name"], read["cat"], read["ts"], read["dur"]) == ("read block.001", "read", 0, 2000)
    assert read["args"] == {"shard": "block.001", "nbytes": 4_000_000, "pass": 3, "GB/s": 2.0}
    assert (wait["name"], wait["ts"], wait["dur"]) == ("wait", 1000, 500)
    assert "GB/s" not in wait["args"]


def test_in_each_lane_of_the_chrome_trace_time_goes_on_and_spans_nest(tmp_path: Path) -> None:
    trace = Trace()
    edges = [0.1 + number / 3e5 for number in range(200)]
    for agent in ("loader-1", "inference"):
        for begin_s, end_s in reversed(list(pairwise(edges))):
            trace.add(span(begin_s, end_s, agent=agent))
        trace.add(span(edges[0], edges[3], "session", agent=agent))
    events = [event for event in written(trace, tmp_path / "trace.json")["traceEvents"] if event["ph"] == "X"]
    for lane in (1, 2):
        open_until = [math.inf]
        previous = -1.0
        for event in (event for event in events if event["tid"] == lane):
            begin, end = round(event["ts"] * 1000), round((event["ts"] + event["dur"]) * 1000)
            assert begin >= previous
            while open_until[-1] <= begin:
                open_until.pop()
            assert end <= open_until[-1]
            open_until.append(end)
            previous = begin


def test_the_chrome_trace_has_counters(tmp_path: Path) -> None:
    trace = Trace()
    with trace.span("inference", "run", "block.000"):
        trace.sample("buffers", 2)
        trace.sample("rss_bytes", 1e9)
    events = written(trace, tmp_path / "trace.json")["traceEvents"]
    buffers, rss = (event for event in events if event["ph"] == "C")
    assert (buffers["name"], buffers["args"]) == ("buffers", {"value": 2})
    assert (rss["name"], rss["args"]) == ("rss_bytes", {"value": 1e9})
    assert 0 < buffers["ts"] < rss["ts"]


def test_a_sample_before_the_first_span_has_no_negative_time(tmp_path: Path) -> None:
    trace = Trace()
    trace.sample("buffers", 0)
    with trace.span("inference", "run", "block.000"):
        pass
    events = written(trace, tmp_path / "trace.json")["traceEvents"]
    assert min(event["ts"] for event in events if "ts" in event) == 0


def test_the_chrome_trace_carries_facts_about_the_model(tmp_path: Path) -> None:
    document = written(Trace(), tmp_path / "trace.json", model="toy", budget_bytes=5)
    assert document["otherData"]["pipeload"] == {"model": "toy", "budget_bytes": 5, "trace_format": 1}
    assert document["displayTimeUnit"] == "ms"


def test_an_older_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_chrome(Trace(), path, {"model": object()})
    assert path.read_text() == "old"
    write_chrome(Trace(), path)
    assert [each.name for each in tmp_path.iterdir()] == ["trace.json"]


def test_a_trace_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "trace.json"
    with pytest.raises(FileNotFoundError) as caught:
        write_chrome(Trace(), path)
    assert caught.value.filename == str(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        write_chrome(Trace(), folder)
    assert list(tmp_path.iterdir()) == [folder]
