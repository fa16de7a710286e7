"""A long text from a streamed model: does a token stay as fast, and the process within its plan, as the caches fill?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.generation.small import SmallModel
from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.bench.table import seconds
from pipeload.machine.sizes import format_bytes

__all__ = ["Report", "draw", "measure", "rows"]

PROMPT = "Once upon a time"
_PARTS = 8
"""Rows of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The measurement.

    Attributes:
        machine: the one that it ran on.
        cap_bytes, disk_bytes_per_s: the limits.
        peak_bytes: the cgroup's peak, page cache included.
        tokens_s, rss_bytes: of each token.
        peak_rss_bytes, planned_peak_bytes, budget_bytes: of the process, as measured, planned and allowed.
        cache_bytes: of the KV caches, planned for the whole text from the beginning.
    """

    machine: dict[str, Any]
    cap_bytes: int
    disk_bytes_per_s: int | None
    peak_bytes: int
    tokens: int
    tokens_s: tuple[float, ...]
    rss_bytes: tuple[int, ...]
    peak_rss_bytes: int
    planned_peak_bytes: int
    budget_bytes: int
    cache_bytes: int

    @property
    def ok(self) -> bool:
        """The whole text was written within the plan."""
        return len(self.tokens_s) == self.tokens and self.peak_rss_bytes <= self.planned_peak_bytes


def measure(model: SmallModel, tokens: int) -> Report:
    """Write a text of this number of tokens."""
    told = model.run("long_text", {"prompt": PROMPT, "tokens": tokens})
    return Report(machine=machine_facts(), cap_bytes=model.cap_bytes, disk_bytes_per_s=model.disk_bytes_per_s, **told)


def rows(report: Report) -> str:
    """The table of the page: the median of each part of the text."""
    step = -(-report.tokens // _PARTS)
    lines = []
    for begin in range(0, report.tokens, step):
        part = slice(begin, begin + step)
        lines.append(
            [
                f"{begin + 1} - {min(begin + step, report.tokens)}",
                seconds(median(report.tokens_s[part])),
                format_bytes(max(report.rss_bytes[part])),
            ]
        )
    lines.append(["planned at most", "", format_bytes(report.planned_peak_bytes)])
    return markdown_table(("tokens", "s/token", "RSS"), lines)


def draw(report: Report, target: Path) -> None:
    """Seconds of a token, and RSS, over its position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained", dpi=130)
    times, memory = figure.subplots(1, 2)
    positions = range(1, len(report.tokens_s) + 1)
    times.plot(positions[1:], report.tokens_s[1:], ".", markersize=2, color="#d1495b")
    times.set_ylabel("seconds per token")
    times.set_ylim(bottom=0)
    memory.plot(positions, [nbytes / 1e6 for nbytes in report.rss_bytes], color="#30638e")
    memory.axhline(report.planned_peak_bytes / 1e6, color="black", linestyle="--", linewidth=1, label="plan")
    memory.set_ylabel("RSS, MB")
    memory.set_ylim(0, report.planned_peak_bytes * 1.15e-6)
    memory.legend(frameon=False, loc="lower right")
    for axis in (times, memory):
        axis.set_xlabel("token")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)
