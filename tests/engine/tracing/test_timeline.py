"""The picture of a trace: its lanes, bars, passes, counters and words; and the command that draws it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.synthetic import BUDGET_BYTES, FACTS, RESIDENT, synthetic_trace

from pipeload import cli
from pipeload.errors import ConfigError
from pipeload.tracing import chrome
from pipeload.tracing.chrome import Recording, write_chrome
from pipeload.tracing.timeline import draw, save
from pipeload.tracing.trace import Span, Trace

pytest.importorskip("matplotlib")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    write_chrome(synthetic_trace(3), path, FACTS)
    return path


@pytest.fixture
def trace(path: Path) -> Recording:
    return chrome.read(path)


def words(artist: Any) -> list[str]:
    return [text.get_text() for text in artist.texts]


def legend(panel: Any) -> list[str]:
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_every_agent_has_a_lane(trace: Recording) -> None:
    lanes, memory, buffers = draw(trace, chrome.passes(trace.spans)[-2:]).axes
    assert [label.get_text() for label in lanes.get_yticklabels()] == ["inference", "loader-0", "loader-1", "daemon"]
    assert lanes.get_ylim()[0] > lanes.get_ylim()[1]  # inference on top
    assert (memory.get_ylabel(), buffers.get_ylabel()) == ("memory (MB)", "buffers")
    assert buffers.get_xlabel() == "time (s)"
    shares = [word for word in words(lanes) if word.endswith("busy")]
    assert len(shares) == 4
    assert all(0 <= int(share.removesuffix("% busy")) <= 100 for share in shares)


def test_a_bar_stands_where_its_span_was(trace: Recording) -> None:
    chosen = chrome.passes(trace.spans)[1:2]
    lanes = draw(trace, chosen).axes[0]
    bars = [path.get_extents() for collection in lanes.collections for path in collection.get_paths()]
    begin_s, end_s = chosen[0].begin_s, chosen[0].end_s
    inside = [span for span in trace.spans if span.end_s > begin_s and span.begin_s < end_s]
    agents = ["inference", "loader-0", "loader-1", "daemon"]
    expected = [
        (
            agents.index(span.agent),
            1000 * (max(span.begin_s, begin_s) - begin_s),
            1000 * (min(span.end_s, end_s) - begin_s),
        )
        for span in inside
    ]
    found = [((bar.y0 + bar.y1) / 2, bar.x0, bar.x1) for bar in bars]
    assert len(found) > 60
    assert np.array(sorted(found)) == pytest.approx(np.array(sorted(expected)))


def test_kinds_have_different_colours_and_odd_shards_are_darker(trace: Recording) -> None:
    lanes = draw(trace, chrome.passes(trace.spans)).axes[0]
    colours = {tuple(collection.get_facecolor()[0]) for collection in lanes.collections}
    # run and read in two shades; session, free, wait, reserve in one each.
    assert len(colours) == 8
    assert {tuple(collection.get_hatch() or "") for collection in lanes.collections} == {(), ("/",) * 5}


def test_blocks_are_named_in_their_bars_and_passes_over_them(trace: Recording) -> None:
    one = draw(trace, chrome.passes(trace.spans)[1:2]).axes[0]
    # Reading takes long enough for the whole name, running for the number alone.
    assert {"block.003", "block.022", "3", "22"} <= set(words(one))
    assert [word.partition(":")[0] for word in words(one) if word.startswith("pass")] == ["pass 2"]
    (title,) = (word for word in words(one) if word.startswith("pass"))
    assert " s, 1.06 GB read at 0." in title
    three = draw(trace, chrome.passes(trace.spans)).axes[0]
    assert not {"block.003", "block.022"} & set(words(three))
    assert [word.partition(":")[0] for word in words(three) if word.startswith("pass")] == [
        "pass 1",
        "pass 2",
        "pass 3",
    ]


def test_a_name_never_leaves_its_bar(trace: Recording) -> None:
    figure = draw(trace, chrome.passes(trace.spans)[-1:])
    figure.canvas.draw()
    lanes = figure.axes[0]
    bars = [path.get_extents(lanes.transData) for c in lanes.collections for path in c.get_paths()]
    names = [text for text in lanes.texts if text.get_text().startswith("block") or text.get_text().isdecimal()]
    assert len(names) > 40
    for name in names:
        box = name.get_window_extent()
        assert any(bar.x0 <= box.x0 and box.x1 <= bar.x1 and bar.y0 <= box.y0 and box.y1 <= bar.y1 for bar in bars)


def test_runs_of_shards_that_were_not_read_for_their_pass_are_marked(trace: Recording) -> None:
    chosen = chrome.passes(trace.spans)[1:]
    figure = draw(trace, chosen)
    (marks,) = (line for line in figure.axes[0].lines if line.get_label() == "run of a resident shard")
    middles = np.nanmean(marks.get_xdata().reshape(-1, 3), axis=1) + chosen[0].begin_s
    runs = [span for span in trace.spans if span.kind == "run" and span.pass_number in (2, 3)]
    under = [next(span.shard for span in runs if span.begin_s <= middle <= span.end_s) for middle in middles]
    assert sorted(under) == sorted([*RESIDENT] * 2)
    # In the first pass everything is read.
    alone = draw(trace, chrome.passes(trace.spans)[:1])
    assert not any(line.get_label() == "run of a resident shard" for line in alone.axes[0].lines)
    assert "run of a resident shard" not in [text.get_text() for text in alone.legends[0].get_texts()]


def test_time_between_passes_is_marked_in_every_panel() -> None:
    spans = [
        Span(agent="inference", kind="run", shard="block.000", begin_s=begin, end_s=begin + 1, pass_number=number)
        for number, begin in ((1, 0.0), (2, 1.5))
    ]
    figure = draw(Recording(spans=spans, samples=[], facts={}), chrome.passes(spans))
    (pause,) = figure.axes[0].patches
    assert (pause.get_x(), pause.get_x() + pause.get_width()) == pytest.approx((1.0, 1.5))
    assert "500 ms" in words(figure.axes[0])
    assert "between passes" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_passes_begin_and_end_with_a_line_through_every_panel(trace: Recording) -> None:
    chosen = chrome.passes(trace.spans)[:2]
    for panel in draw(trace, chosen).axes:
        upright = {line.get_xdata()[0] for line in panel.lines if list(line.get_ydata()) == [0, 1]}
        edges = {each.begin_s - chosen[0].begin_s for each in chosen} | {
            each.end_s - chosen[0].begin_s for each in chosen
        }
        assert edges <= upright


def test_memory_is_drawn_under_the_budget(trace: Recording) -> None:
    memory = draw(trace, chrome.passes(trace.spans)[-2:]).axes[1]
    names = legend(memory)
    assert [name.partition(",")[0] for name in names] == ["RSS", "reserved for weights", "budget 480.0 MB"]
    peak = max(sample.value for sample in trace.samples if sample.counter == "rss_bytes")
    assert names[0] == f"RSS, peak {peak / 1e6:.1f} MB"
    (rss,) = (line for line in memory.lines if line.get_label() == names[0])
    assert max(rss.get_ydata()) == pytest.approx(peak / 1e6)
    assert memory.get_ylim()[0] == 0
    assert memory.get_ylim()[1] > BUDGET_BYTES / 1e6


def test_counters_reach_from_edge_to_edge(trace: Recording) -> None:
    memory = draw(trace, chrome.passes(trace.spans)[1:2]).axes[1]
    (reserved,) = (line for line in memory.lines if line.get_label() == "reserved for weights")
    assert (min(reserved.get_xdata()), max(reserved.get_xdata())) == pytest.approx(memory.get_xlim())


def test_buffers_are_drawn_beside_what_was_planned(trace: Recording) -> None:
    buffers = draw(trace, chrome.passes(trace.spans)[-2:]).axes[2]
    assert legend(buffers) == ["buffers in use", "planned: 3"]
    assert list(buffers.get_yticks()) == [0, 1, 2, 3]


def test_the_head_says_model_plan_and_colours(trace: Recording) -> None:
    figure = draw(trace, chrome.passes(trace.spans)[-2:])
    assert words(figure) == ["bert-large, passes 2-3 of 3", "budget 480.0 MB, 2 Loading Agents, 3 buffers"]
    kinds = [text.get_text() for text in figure.legends[0].get_texts()]
    assert kinds == [
        "run: even, odd shards",
        "read: even, odd shards",
        "make session",
        "free",
        "wait",
        "wait for budget",
        "run of a resident shard",
    ]
    assert words(draw(trace, chrome.passes(trace.spans)[:1]))[0] == "bert-large, pass 1 of 3"


def test_words_do_not_overlap_each_other_or_the_data(trace: Recording) -> None:
    figure = draw(trace, chrome.passes(trace.spans)[-2:])
    figure.canvas.draw()
    panels = [panel.get_window_extent() for panel in figure.axes]
    outside = [text.get_window_extent() for text in figure.texts]
    outside += [figure.legends[0].get_window_extent()]
    outside += [panel.get_legend().get_window_extent() for panel in figure.axes[1:]]
    outside += [text.get_window_extent() for text in figure.axes[0].texts if text.get_text().endswith("busy")]
    passes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text().startswith("pass")]
    width, height = figure.canvas.get_width_height()
    for number, box in enumerate(outside + passes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
        assert not any(box.overlaps(other) for other in (outside + passes)[:number])
    assert not any(box.overlaps(panel) for box in outside for panel in panels)


def test_a_trace_without_passes_counters_or_facts_is_drawn_whole() -> None:
    trace = Trace()
    trace.add(Span(agent="loader-0", kind="read", shard="weights", begin_s=1.0, end_s=1.5))
    trace.add(Span(agent="loader-0", kind="pack", shard="", begin_s=1.5, end_s=1.5))
    figure = draw(Recording(spans=trace.spans, samples=[], facts={}), [])
    (lanes,) = figure.axes
    assert words(figure) == ["pipeload", ""]
    assert lanes.get_xlim() == (0, 500)
    assert lanes.get_xlabel() == "time (ms)"


def test_a_moment_has_a_picture_too() -> None:
    span = Span(agent="inference", kind="run", shard="block.000", begin_s=1.0, end_s=1.0, pass_number=1)
    figure = draw(Recording(spans=[span], samples=[], facts={}), chrome.passes([span]))
    figure.canvas.draw()


@pytest.mark.parametrize(("name", "begin"), [("out.png", b"\x89PNG"), ("out.SVG", b"<?xml")])
def test_pictures_are_written_as_their_names_say(trace: Recording, tmp_path: Path, name: str, begin: bytes) -> None:
    save(draw(trace, chrome.passes(trace.spans)[-1:]), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_other_pictures_are_refused(trace: Recording, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out\.jpg ends with neither of \.png, \.svg"):
        save(draw(trace, []), tmp_path / "out.jpg")
    assert not (tmp_path / "out.jpg").exists()


Call = Callable[..., int]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """Run `pipeload timeline`; its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["pipeload", "timeline", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def test_the_command_draws_the_last_passes_beside_the_trace(
    path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(path) == 0
    assert capsys.readouterr().out == f"{path.with_suffix('.png')}\n"
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ([], [2, 3]),
        (["--passes", "1-2"], [1, 2]),
        (["--passes", "2"], [2]),
        (["--last", "1"], [3]),
        (["--last", "9"], [1, 2, 3]),
    ],
)
def test_the_command_draws_the_passes_asked_for(
    path: Path, call: Call, monkeypatch: pytest.MonkeyPatch, options: list[str], numbers: list[int]
) -> None:
    drawn: list[int] = []

    def watched(trace: Recording, shown: list[chrome.Pass]) -> Any:
        drawn.extend(each.number for each in shown)
        return draw(trace, shown)

    monkeypatch.setattr("pipeload.cli.commands.timeline.draw", watched)
    picture = path.with_name("out.svg")
    assert call(path, "-o", picture, *options) == 0
    assert drawn == numbers
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize("passes", ["", "x", "2-1", "-3", "1-", "1-2-3", "1.5"])
def test_passes_that_are_none_are_wrong_usage(path: Path, call: Call, passes: str) -> None:
    assert call(path, f"--passes={passes}") == 2


def test_wrong_usage_is_said_before_anything_is_read(tmp_path: Path, call: Call) -> None:
    missing = tmp_path / "missing.json"
    assert call(missing, "-o", tmp_path / "out.pdf") == 2
    assert call(missing, "-o", tmp_path / "nowhere" / "out.png") == 2
    assert call(missing, "--passes", "1", "--last", "1") == 2
    assert call(missing, "--last", "0") == 2


def test_faults_of_the_trace_are_one_line(path: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(path, "--passes", "7-8") == 1
    assert capsys.readouterr().err == "error: The trace has passes 1-3, and 7-8 was asked for.\n"
    path.write_text("no trace")
    assert call(path) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} is no trace of pipeload")
    assert error.count("\n") == 1
    assert not path.with_suffix(".png").exists()


def test_without_matplotlib_one_line_names_the_extra(
    path: Path, call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert call(path) == 1
    assert capsys.readouterr().err == "error: Pictures need matplotlib: pip install matplotlib.\n"
