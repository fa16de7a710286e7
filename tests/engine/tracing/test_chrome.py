"""Traces read back from their files: every event comes back, and a file that is no trace is refused with one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.engine.synthetic import BLOCK_BYTES, FACTS, synthetic_trace

from pipeload.errors import ConfigError
from pipeload.tracing import chrome
from pipeload.tracing.chrome import Pass, write_chrome
from pipeload.tracing.trace import Trace, agent_times, read_bytes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    write_chrome(synthetic_trace(), path, FACTS)
    return path


def test_what_was_written_comes_back(path: Path) -> None:
    trace, found = synthetic_trace(), chrome.read(path)
    assert {key: found.facts[key] for key in FACTS} == FACTS
    zero = min(span.begin_s for span in trace.spans)
    expected = sorted((s.agent, s.kind, s.shard, s.nbytes, s.pass_number) for s in trace.spans)
    assert sorted((s.agent, s.kind, s.shard, s.nbytes, s.pass_number) for s in found.spans) == expected
    ends = sorted(span.end_s - zero for span in trace.spans)
    assert sorted(span.end_s for span in found.spans) == pytest.approx(ends, abs=2e-9)
    assert [(s.counter, s.value) for s in found.samples] == [(s.counter, s.value) for s in trace.samples]
    assert read_bytes(found.spans) == read_bytes(trace.spans) > 40 * BLOCK_BYTES


def test_a_pass_is_what_the_inference_agent_did_for_it(path: Path) -> None:
    spans = chrome.read(path).spans
    # Shards were read for a third pass, but it never ran.
    assert {span.pass_number for span in spans} == {1, 2, 3}
    first, second = chrome.passes(spans)
    assert (first.number, second.number) == (1, 2)
    assert first.begin_s < first.end_s <= second.begin_s < second.end_s
    times = agent_times(spans, second.begin_s, second.end_s)
    assert list(times) == ["inference", "loader-0", "loader-1", "daemon"]


def test_spans_of_no_pass_make_none() -> None:
    trace = Trace()
    with trace.span("inference", "run", "block.000"):
        pass
    assert chrome.passes(trace.spans) == []


def _passes(*numbers: int) -> list[Pass]:
    return [Pass(number=number, begin_s=number, end_s=number + 1) for number in numbers]


def test_passes_are_chosen_by_their_numbers() -> None:
    assert chrome.choose(_passes(3, 4, 5, 6), 4, 5) == _passes(4, 5)
    assert chrome.choose(_passes(3, 4), 1, 3) == _passes(3)
    with pytest.raises(ConfigError, match="has passes 3-4, and 5-9 was asked for"):
        chrome.choose(_passes(3, 4), 5, 9)
    with pytest.raises(ConfigError, match="has no passes"):
        chrome.choose([], 1, 2)


def _changed(change: Any) -> Any:
    def apply(text: str) -> str:
        document = json.loads(text)
        change(document)
        return json.dumps(document)

    return apply


def _first(document: Any, phase: str, name: str = "") -> Any:
    return next(e for e in document["traceEvents"] if e["ph"] == phase and e["name"].startswith(name))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda _: "", id="empty"),
        pytest.param(lambda text: text[: len(text) // 2], id="truncated"),
        pytest.param(lambda text: text[:-1], id="one character short"),
        pytest.param(lambda _: "[]", id="the format's bare list"),
        pytest.param(lambda _: "{}", id="other JSON"),
        pytest.param(lambda _: '{"traceEvents": [], "displayTimeUnit": "ms"}', id="another program's trace"),
        pytest.param(_changed(lambda d: d["otherData"]["pipeload"].pop("trace_format")), id="no format"),
        pytest.param(_changed(lambda d: d["otherData"]["pipeload"].update(trace_format=99)), id="newer format"),
        pytest.param(_changed(lambda d: d["traceEvents"].clear()), id="no events"),
        pytest.param(_changed(lambda d: d["traceEvents"].append(5)), id="an event that is none"),
        pytest.param(_changed(lambda d: _first(d, "X")["args"].pop("shard")), id="a span without shard"),
        pytest.param(_changed(lambda d: _first(d, "X").update(cat="sing")), id="an unknown kind"),
        pytest.param(_changed(lambda d: _first(d, "X").update(tid=77)), id="a span without lane"),
        pytest.param(_changed(lambda d: _first(d, "X").update(dur=-1)), id="a negative duration"),
        pytest.param(_changed(lambda d: _first(d, "X").update(ts="now")), id="a time that is none"),
        pytest.param(_changed(lambda d: _first(d, "M", "thread_name").update(args={})), id="a lane without name"),
        pytest.param(_changed(lambda d: _first(d, "C").update(args={})), id="a counter without value"),
    ],
)
def test_what_is_no_whole_trace_is_refused(path: Path, damage: Any) -> None:
    path.write_text(damage(path.read_text()))
    with pytest.raises(ConfigError, match=r"trace\.json .* --trace") as caught:
        chrome.read(path)
    assert "\n" not in str(caught.value)


def test_a_picture_is_no_trace(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(ConfigError, match="no trace of pipeload"):
        chrome.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.json cannot be read: No such file"):
        chrome.read(tmp_path / "nothing.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        chrome.read(tmp_path)
