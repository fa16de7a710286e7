"""A long text from a streamed model: does a token stay as fast, and the process within its plan, as the caches fill?"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.generation.small import MODEL, SmallModel
from benchmarks.study import markdown_table
from pipeload.bench.frame import entry, framed, plain
from pipeload.bench.machine import machine_facts, machine_line
from pipeload.bench.table import seconds
from pipeload.machine.sizes import format_bytes

__all__ = ["Report", "figure", "measure", "rows"]

PROMPT = "Once upon a time"
_PARTS = 8
"""Rows of the table."""
_MEDIAN_OF = 50
_TIMES, _MEMORY = "#d1495b", "#30638e"


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


def figure(report: Report) -> Any:
    """Seconds of a token, and RSS, over its position in the text; the first, which waits for weights, is left out.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    limit = f"Memory cgroup of {format_bytes(report.cap_bytes)}, page cache included; disk "
    limit += f"at {format_bytes(report.disk_bytes_per_s)}/s" if report.disk_bytes_per_s else "not throttled"
    drawn = framed(
        f"{MODEL} writes {report.tokens:,} tokens in {format_bytes(report.cap_bytes)}",
        [
            f"{limit}. {machine_line(report.machine)}.",
            f"The first token took {seconds(report.tokens_s[0])}, since the weights are read for it; it is left out.",
        ],
        [
            entry("time of one token", color=_TIMES, marker=".", linestyle=""),
            entry(f"median of {_MEDIAN_OF} tokens", color="black", linewidth=1.5),
            entry("RSS: memory of the process", color=_MEMORY, linewidth=2),
            entry(
                f"planned peak of RSS: {format_bytes(report.planned_peak_bytes)}",
                color="black",
                linestyle="--",
                linewidth=1.2,
            ),
        ],
        height=2.7,
    )
    times, memory = drawn.subplots(1, 2, sharex=True)
    positions = range(2, len(report.tokens_s) + 1)
    times.plot(positions, report.tokens_s[1:], ".", markersize=2, color=_TIMES)
    middles = [
        (begin + _MEDIAN_OF / 2, median(report.tokens_s[begin : begin + _MEDIAN_OF]))
        for begin in range(1, len(report.tokens_s) - _MEDIAN_OF + 1, _MEDIAN_OF)
    ]
    times.plot(*zip(*middles, strict=True), color="black", linewidth=1.5)
    times.set_ylabel("seconds a token", fontsize=9)
    times.set_ylim(bottom=0)
    memory.plot(positions, [nbytes / 1e6 for nbytes in report.rss_bytes[1:]], color=_MEMORY, linewidth=2)
    memory.axhline(report.planned_peak_bytes / 1e6, color="black", linestyle="--", linewidth=1.2)
    memory.set_ylabel("memory, MB", fontsize=9)
    memory.set_ylim(0, report.planned_peak_bytes * 1.15e-6)
    for axis in (times, memory):
        plain(axis)
        axis.set_xlabel("position of the token in the text", fontsize=9)
        axis.set_xlim(0, report.tokens)
    return drawn
