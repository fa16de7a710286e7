"""Pictures of records: shared scales, no height for a run without an answer, and words beside the data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tests.engine.bench.records import record_of, report_of, run_of

from pipeload.bench.harness import Report
from pipeload.bench.pictures import agents_figure, draw, latency_figure, memory_figure
from pipeload.bench.record import Record, Run
from pipeload.bench.spec import CONTENDERS
from pipeload.errors import ConfigError

pytest.importorskip("matplotlib")

BUDGETS = (100_000_000, 200_000_000)
DISKS = (400_000_000, None)


def _report() -> Report:
    """Every contender at two budgets and two disks; `single` is killed, and the second disk is ten times as fast."""
    rows: list[tuple[Record, Run]] = []
    for disk in DISKS:
        for budget in BUDGETS:
            for contender in CONTENDERS:
                seconds = None if contender == "single" else 2.0 if disk else 0.2
                rows.append((record_of(contender, seconds=seconds, budget=budget, disk=disk), run_of(seconds)))
    return report_of(*rows)


def _agents() -> Any:
    ours = [record_of(loaders=number, seconds=1 / number, disk=None) for number in (1, 2, 4)]
    return agents_figure([record_of("standard"), *ours], _report().machine)


def _panels(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if axis.get_visible() and axis.get_xlabel()]


def _strips(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if not axis.get_xlabel()]


def _words(figure: Any) -> str:
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    return "\n".join(text.get_text() for text in texts)


def _notes(axis: Any) -> list[str]:
    return [axis.get_title(loc="left"), *(text.get_text() for text in axis.texts)]


def test_a_run_without_an_answer_has_no_height() -> None:
    figure = latency_figure(_report())
    heights = {y for panel in _panels(figure) for line in panel.lines for y in line.get_ydata()}
    # Those of answers and of T*.
    assert heights == {2.0, 0.2, 1.0}
    assert [label.get_text() for label in _strips(figure)[0].get_yticklabels()] == ["single"]
    for strip in _strips(figure):
        assert sorted(line.get_xdata()[0] for line in strip.lines) == [budget / 1e6 for budget in BUDGETS]
        assert {line.get_marker() for line in strip.lines} == {"X"}
    assert len(_strips(figure)) == len(DISKS)


def test_killed_and_refused_look_different() -> None:
    rows = [(record_of(budget=budget), run_of()) for budget in BUDGETS]
    refused = Run(result=None, message="The budget is too small.", samples=((0.0, 1),))
    rows.append((record_of("mmap", budget=BUDGETS[0], run=refused), refused))
    rows.append((record_of("single", budget=BUDGETS[0], seconds=None), run_of(None)))
    figure = latency_figure(report_of(*rows))
    (strip,) = _strips(figure)
    assert [label.get_text() for label in strip.get_yticklabels()] == ["mmap", "single"]
    assert {line.get_ydata()[0]: line.get_marker() for line in strip.lines} == {0: "o", 1: "X"}
    assert "killed: it needs more memory" in _words(figure)
    assert "refused, or no answer" in _words(figure)


def test_without_a_killed_run_there_is_no_strip() -> None:
    figure = latency_figure(report_of(*((record_of(budget=budget), run_of()) for budget in BUDGETS)))
    assert not _strips(figure)
    assert "killed" not in _words(figure)


@pytest.mark.parametrize("figure", [latency_figure, memory_figure])
def test_panels_of_a_picture_share_their_scales(figure: Any) -> None:
    panels = figure(_report()).axes if figure is memory_figure else _panels(figure(_report()))
    assert len(panels) > 1
    assert len({(panel.get_xlim(), panel.get_ylim()) for panel in panels}) == 1


def test_a_killed_run_that_lay_at_its_limit_does_not_stretch_the_time() -> None:
    killed = Run(result=None, killed=True, samples=((0.0, 10**8), (500.0, 10**8)))
    answered = run_of()
    figure = memory_figure(report_of((record_of(), answered), (record_of("single", run=killed), killed)))
    assert answered.samples[-1][0] <= figure.axes[0].get_xlim()[1] < 3
    assert _notes(figure.axes[1])[-1] == "killed after 500.0 s"


def test_a_panel_says_which_contender_and_how_many_passes_warmed_it_up() -> None:
    rows = [(record_of(loaders=number), run_of()) for number in (1, 8)]
    rows += [(record_of("mmap"), run_of()), (record_of("single", budget=None), run_of())]
    figure = memory_figure(report_of(*rows, settling=6, passes=3))
    ours, eight, mapped, single = (_notes(axis) for axis in figure.axes)
    assert (ours[0], ours[-1]) == ("pipeload, 1 agent", "1 + 6 + 3 passes")
    assert eight[0] == "pipeload, 8 agents"
    assert (mapped[0], mapped[-1]) == ("mmap", "1 + 1 + 3 passes")
    assert single[0] == "single, no limit"
    assert "b to warm up, which are not timed" in _words(figure)


def test_a_title_names_model_limit_and_machine() -> None:
    report = _report()
    for figure in (latency_figure(report), memory_figure(report)):
        assert "some-model" in _words(figure)
        assert "2 cores, Some CPU, onnxruntime 1.2.3" in _words(figure)
    assert "under 100.0 MB" in _words(memory_figure(report))
    assert "without a limit" in _words(memory_figure(report_of((record_of(budget=None), run_of()))))
    assert "RSS" in _words(memory_figure(report_of((record_of(), run_of()), refusal="no cgroups")))


def test_every_line_of_agents_has_its_entry_and_the_baseline_its_name() -> None:
    figure = _agents()
    (axis,) = figure.axes
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["some-model in 1.00 GB: up to 8.00", "standard pipeline without a limit = 1"]
    assert len(axis.lines) == len(words)
    assert axis.get_legend() is None


@pytest.mark.slow
@pytest.mark.parametrize("picture", ["latency", "memory", "agents"])
def test_words_above_the_panels_overlap_neither_each_other_nor_the_data(picture: str) -> None:
    figure = (
        {"latency": latency_figure, "memory": memory_figure}[picture](_report()) if picture != "agents" else _agents()
    )
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    boxes = [artist.get_window_extent() for artist in (*figure.texts, *figure.legends)]
    panels = [axis.get_tightbbox() for axis in figure.axes if axis.get_visible()]
    for number, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[:number] + panels)
    for number, panel in enumerate(panels):
        assert not any(panel.overlaps(other) for other in panels[:number])


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path: Path) -> None:
    drawn = draw(_report(), tmp_path / "pictures")
    assert [path.name for path in drawn] == ["latency.png", "memory.png"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


@pytest.mark.parametrize("module", ["matplotlib.figure", "matplotlib.lines"])
def test_pictures_without_matplotlib_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        draw(_report(), tmp_path)
