"""The bar of long passes, and the text of `--stats`."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
from rich.console import Console
from rich.control import strip_control_codes
from rich.progress import track
from rich.text import Text
from tests.engine.harness import Background

from pipeload.cli.passes import pass_progress, stats_lines
from pipeload.planning.planner import Plan
from pipeload.tracing.stats import PassStats, Stats
from pipeload.tracing.trace import AgentTimes, Progress


class Terminal(Console):
    """A terminal that remembers the text written to it."""

    def __init__(self, *, terminal: bool = True) -> None:
        self.written = io.StringIO()
        super().__init__(file=self.written, force_terminal=terminal, width=100, _environ={"TERM": "xterm"})

    def seen(self) -> str:
        """The text written since the last look, without colours."""
        text = self.written.getvalue()
        self.written.seek(0)
        self.written.truncate()
        return strip_control_codes(Text.from_ansi(text).plain).strip()


def at(index: int, elapsed_s: float, *, count: int = 26, eta_s: float | None = None) -> Progress:
    return Progress(shard=f"block.{index - 2:03}", index=index, count=count, elapsed_s=elapsed_s, eta_s=eta_s)


def test_a_short_pass_shows_nothing() -> None:
    terminal = Terminal()
    with pass_progress(terminal) as progress:
        assert progress is not None
        for index in range(1, 27):
            progress(at(index, index / 26))
    assert terminal.written.getvalue() == ""


def test_a_long_pass_shows_shard_count_and_times() -> None:
    terminal = Terminal()
    with pass_progress(terminal) as progress:
        assert progress is not None
        progress(at(12, 0.9, eta_s=1.1))
        assert terminal.seen() == ""
        progress(at(13, 1.1, eta_s=3.25))
        shown = terminal.seen()
        assert "block.011" in shown
        assert "13/26" in shown
        assert "1.1 s, 3.2 s left" in shown
        progress(at(14, 75.0))
        shown = terminal.seen()
        assert "block.012" in shown
        assert "14/26" in shown
        assert "1 min 15 s" in shown
        assert "left" not in shown


def test_the_bar_goes_away_when_the_pass_ends() -> None:
    terminal = Terminal()
    with pass_progress(terminal) as progress:
        assert progress is not None
        progress(at(13, 2.0))
        terminal.seen()
        progress(at(26, 4.0))
        assert terminal.written.getvalue().endswith("\x1b[1A\x1b[2K")  # up a line, and erase it
        terminal.seen()
    assert terminal.written.getvalue() == ""


def test_each_pass_has_a_bar_of_its_own() -> None:
    terminal = Terminal()
    with pass_progress(terminal) as progress:
        assert progress is not None
        for _ in range(2):
            progress(at(1, 0.1))
            progress(at(2, 0.2))
            assert terminal.seen() == ""
            progress(at(25, 2.5))
            assert "25/26" in terminal.seen()
            progress(at(26, 2.6))
            terminal.seen()


def test_a_pass_that_failed_leaves_no_bar_for_the_next() -> None:
    terminal = Terminal()
    with pass_progress(terminal) as progress:
        assert progress is not None
        progress(at(13, 2.0))
        terminal.seen()
        progress(at(1, 0.1))
        assert "\x1b[2K" in terminal.written.getvalue()
        assert "1/26" not in terminal.seen()
        progress(at(2, 1.5, count=5))
        assert "2/5" in terminal.seen()


def test_the_bar_goes_away_when_the_work_fails() -> None:
    terminal = Terminal()

    def work() -> None:
        with pass_progress(terminal) as progress:
            assert progress is not None
            progress(at(13, 2.0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert terminal.written.getvalue().endswith("\x1b[1A\x1b[2K")


def test_without_a_terminal_there_is_nothing_to_call() -> None:
    terminal = Terminal(terminal=False)
    with pass_progress(terminal) as progress:
        assert progress is None
    assert terminal.written.getvalue() == ""


def test_the_bar_needs_no_thread_and_takes_no_output(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    threads = threading.active_count()
    with pass_progress(terminal) as progress:
        Background(progress, at(13, 2.0)).end()
        assert threading.active_count() == threads
        print("the answer")
    assert capsys.readouterr().out == "the answer\n"


def test_the_bar_stands_below_another_of_the_same_console() -> None:
    terminal = Terminal()
    with pass_progress(terminal) as progress:
        assert progress is not None
        for _ in track(range(2), "Embedding", console=terminal, transient=True, auto_refresh=False):
            progress(at(13, 2.0))
            shown = terminal.seen()
            assert shown.index("Embedding") < shown.index("13/26")
            progress(at(26, 4.0))
            terminal.seen()


_AGENTS = {
    "inference": AgentTimes(kinds={"wait": 0.05, "run": 0.9}, busy_s=0.9, wait_s=0.1),
    "loader-0": AgentTimes(kinds={"reserve": 0.2, "read": 0.7, "session": 0.05}, busy_s=0.75, wait_s=0.25),
}


def _plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "budget_bytes": 512_000_000, "loaders": 2, "buffers": 3, "buffer_bytes": 50_000_000,
        "resident": frozenset({"prologue"}), "packed": False, "threads": 2, "process_bytes": 80_000_000,
        "pass_bytes": 9_000_000, "cache_bytes": 0, "resident_bytes": 260_000_000, "streamed_bytes": 950_000_000,
        "peak_bytes": 509_000_000,
    }  # fmt: skip
    return Plan(**{**fields, **changes})


def _last(**changes: Any) -> PassStats:
    fields = {"seconds": 1.0, "read_bytes": 950_000_000, "read_s": 0.95 / 1.04, "bound_s": 0.96, "agents": _AGENTS}
    return PassStats(**{**fields, **changes})


def _stats(**changes: Any) -> Stats:
    fields: dict[str, Any] = {
        "passes": 3, "first_pass_s": 1.25, "last_pass_s": 1.0, "read_bytes": 2_900_000_000, "peak_bytes": 500_000_000,
    }  # fmt: skip
    return Stats(**{**fields, **changes})


_STAYS = "260.0 MB stay in memory, 950.0 MB are read in each pass"


def test_stats_tell_passes_plan_bound_bandwidth_and_agents() -> None:
    assert stats_lines(_stats(last=_last(), peak_read_bytes_per_s=1.06e9), _plan()) == [
        "3 passes, first 1.250 s, last 1.000 s, 2.90 GB read, peak 500.0 MB of 512.0 MB",
        f"plan: 2 Loading Agents, 3 buffers, 1 resident shard, {_STAYS}",
        "last pass: 1.000 s, T* 0.960 s, efficiency 96.0%",
        "reading: 950.0 MB at 1.04 GB/s, 98% of the measured 1.06 GB/s",
        "  agent      busy     waiting  read     session  run",
        "  inference  0.900 s  0.100 s                    0.900 s",
        "  loader-0   0.750 s  0.250 s  0.700 s  0.050 s",
    ]


def test_stats_leave_out_what_nobody_measured() -> None:
    last = _last(bound_s=None, agents={})
    assert stats_lines(_stats(passes=1, last=last), _plan(loaders=1)) == [
        "1 pass, first 1.250 s, 2.90 GB read, peak 500.0 MB of 512.0 MB",
        f"plan: 1 Loading Agent, 3 buffers, 1 resident shard, {_STAYS}",
        "last pass: 1.000 s",
        "reading: 950.0 MB at 1.04 GB/s",
    ]


def test_a_pass_that_read_nothing_has_no_bandwidth() -> None:
    lines = stats_lines(_stats(last=_last(read_bytes=0, read_s=0.0, agents={}), peak_read_bytes_per_s=1e9), _plan())
    assert not [line for line in lines if line.startswith("reading")]


def test_before_the_first_pass_there_is_little_to_tell() -> None:
    stats = _stats(passes=0, first_pass_s=None, last_pass_s=None, read_bytes=0)
    assert stats_lines(stats, _plan(buffers=0, resident=frozenset()))[0] == (
        "0 passes, 0 B read, peak 500.0 MB of 512.0 MB"
    )
