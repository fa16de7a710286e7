"""Passes as the user sees them: a bar on stderr while a long one runs, and the text of `--stats` at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from pipeload.cli.report import table
from pipeload.machine.sizes import format_bytes
from pipeload.machine.terminal import printable
from pipeload.planning.planner import Plan
from pipeload.tracing.stats import PassStats, Stats
from pipeload.tracing.trace import KINDS, WAITING, Progress

__all__ = ["pass_progress", "stats_lines"]

_LONG_PASS_S = 1.0
"""Shorter passes need no bar."""


@contextmanager
def pass_progress(console: Console | None = None) -> Iterator[Callable[[Progress], None] | None]:
    """A function for `pipeload.load(progress=...)` that draws a bar for each long pass; None without a terminal.

    The bar appears when a pass has taken more than a second, and goes away when the pass ends. The calling thread draws
    it; it has no thread of its own.

    Args:
        console: where to draw; None takes stderr.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    bar = _PassBar(console)
    try:
        yield bar.show
    finally:
        bar.hide()


class _PassBar:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Bars | None = None
        self._done = 0

    def show(self, progress: Progress) -> None:
        if progress.index <= self._done:  # another pass, and the last one never ended
            self.hide()
        self._done = progress.index
        if progress.index >= progress.count:
            self.hide()
        elif progress.elapsed_s > _LONG_PASS_S:
            self._draw(progress)

    def hide(self) -> None:
        self._done = 0
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _draw(self, progress: Progress) -> None:
        if self._bars is None:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[times]}"),
                console=self._console,
                auto_refresh=False,
                transient=True,
                # rich must not redirect the answers on stdout to stderr.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bars.add_task("", total=progress.count, times="")
            self._bars.start()
        left = "" if progress.eta_s is None else f", {_duration(progress.eta_s)} left"
        self._bars.update(
            self._bars.task_ids[0],
            description=escape(printable(progress.shard)),
            completed=progress.index,
            times=f"{_duration(progress.elapsed_s)}{left}",
            refresh=True,
        )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s"


def stats_lines(stats: Stats, plan: Plan) -> list[str]:
    """The text of `--stats`.

    Args:
        stats: the model's figures, after its work is done.
        plan: the plan in force.
    """
    first = "" if stats.first_pass_s is None else f", first {stats.first_pass_s:.3f} s"
    last = "" if stats.last_pass_s is None or stats.passes < 2 else f", last {stats.last_pass_s:.3f} s"
    memory = f"peak {format_bytes(stats.peak_bytes)} of {format_bytes(plan.budget_bytes)}"
    lines = [
        f"{_count(stats.passes, 'pass', 'passes')}{first}{last}, {format_bytes(stats.read_bytes)} read, {memory}",
        f"plan: {_count(plan.loaders, 'Loading Agent')}, {_count(plan.buffers, 'buffer')}, "
        f"{_count(len(plan.resident), 'resident shard')}, {format_bytes(plan.resident_bytes)} stay in memory, "
        f"{format_bytes(plan.streamed_bytes)} are read in each pass",
    ]
    if stats.last is not None:
        lines += _last_pass(stats.last, stats.peak_read_bytes_per_s)
    return lines


def _last_pass(last: PassStats, measured_bytes_per_s: float | None) -> Iterator[str]:
    line = f"last pass: {last.seconds:.3f} s"
    if last.bound_s is not None and last.efficiency is not None:
        line += f", T* {last.bound_s:.3f} s, efficiency {last.efficiency:.1%}"
    yield line
    if last.read_bytes:
        line = f"reading: {format_bytes(last.read_bytes)} at {last.read_bytes_per_s / 1e9:.2f} GB/s"
        if measured_bytes_per_s:
            share = last.read_bytes_per_s / measured_bytes_per_s
            line += f", {share:.0%} of the measured {measured_bytes_per_s / 1e9:.2f} GB/s"
        yield line
    if last.agents:
        kinds = [
            kind for kind in KINDS if kind not in WAITING and any(kind in times.kinds for times in last.agents.values())
        ]
        rows = [("agent", "busy", "waiting", *kinds)]
        for agent, times in last.agents.items():
            own = (f"{times.kinds[kind]:.3f} s" if kind in times.kinds else "" for kind in kinds)
            rows.append((agent, f"{times.busy_s:.3f} s", f"{times.wait_s:.3f} s", *own))
        yield from table(rows).splitlines()


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
