"""Progress of the export and the verification: bars on stderr, only on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from pipeload.cli.loudness import LOUDNESS
from pipeload.machine.terminal import printable
from pipeload.notify import Notify

__all__ = ["progress_bars"]

_FEW = 10_000
"""A total below this counts items, not bytes."""
_SPEED_S = 120
"""The time that is left follows from the speed of the last two minutes: between files of blocks there are pauses."""


@contextmanager
def progress_bars() -> Iterator[Notify]:
    """A function `progress(what, done, total)` that draws a bar for each `what`; silent without a terminal.

    A total of 0 means unknown: the bar then only shows that work goes on, and the time it has taken.
    """
    console = Console(stderr=True)
    if LOUDNESS.quiet or not console.is_terminal:
        yield lambda *_: None
        return
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        _Amount(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        speed_estimate_period=_SPEED_S,
    )
    tasks: dict[str, TaskID] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            # The next step has begun, so the earlier ones are over, even those whose total was unknown.
            for task in bars.tasks:
                bars.update(task.id, total=task.total or 1, completed=task.total or 1)
            bars.start()
            tasks[what] = bars.add_task(escape(printable(what)), total=total or None)
        bars.update(tasks[what], completed=done, total=total or None)

    try:
        yield progress
    finally:
        bars.stop()


class _Amount(DownloadColumn):
    def render(self, task: Any) -> Any:
        if not task.total or task.total < _FEW:
            return ""
        return super().render(task)
