"""Records as pictures: latency over budget, memory over time, speed-up over the number of Loading Agents.

matplotlib (extra [plot]) is imported when a picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeload.bench.harness import Report
from pipeload.bench.record import Record, Run
from pipeload.errors import ConfigError

__all__ = ["draw", "draw_agents", "draw_latency", "draw_memory"]

_STYLES: dict[str, tuple[str, str]] = {
    "pipeload": ("#d1495b", "o"),
    "mmap": ("#30638e", "s"),
    "standard": ("#edae49", "^"),
    "layerwise": ("#7a9e7e", "D"),
    "single": ("#4a4a4a", "P"),
    "pipeswitch": ("#8a6fb0", "v"),
}
"""Colour and marker; they can be told apart by colour-blind readers, and in print."""
_GREY = "#8d99ae"


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw every picture for which the report has figures. Returns the files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    budgets = {record.budget_bytes for record in report.records if record.budget_bytes}
    loaders = {record.loaders for record in report.records if record.loaders}
    drawn = []
    if len(budgets) > 1:
        drawn.append(draw_latency(report.records, folder / "latency.png"))
    if len(loaders) > 1:
        drawn.append(draw_agents(report.records, folder / "agents.png"))
    drawn.append(draw_memory(report, folder / "memory.png"))
    return drawn


def draw_latency(records: Sequence[Record], target: Path) -> Path:
    """Draw the seconds of a steady pass over the budget, a panel for each model and disk, with T* below them.

    A cross on the upper edge marks a budget at which the contender was killed, or refused to run.
    """
    panels = list(dict.fromkeys((record.model, record.disk_bytes_per_s) for record in records))
    figure, axes = _figure(len(panels), width=4.6, height=3.9)
    for (model, disk), axis in zip(panels, axes, strict=True):
        mine = [r for r in records if (r.model, r.disk_bytes_per_s) == (model, disk)]
        axis.set_title(f"{model}, disk {_rate(disk)}", loc="left")
        axis.set_xlabel("memory budget, MB")
        _plot_bound(axis, mine)
        dead: list[tuple[float, str]] = []
        for name in _STYLES:
            points = sorted((r.budget_bytes / 1e6, r.steady_s) for r in mine if r.contender == name and r.budget_bytes)
            good = [(x, y) for x, y in points if y is not None]
            dead += [(x, name) for x, y in points if y is None]
            colour, marker = _STYLES[name]
            if good:
                axis.plot(*zip(*good, strict=True), color=colour, marker=marker, label=name, linewidth=2, markersize=6)
        for free in (r for r in mine if r.budget_bytes is None and r.contender == "single" and r.steady_s):
            axis.axhline(free.steady_s, color=_STYLES["single"][0], linewidth=1, linestyle=":")
            axis.annotate(
                "single session, no limit",
                (0, free.steady_s),
                xycoords=("axes fraction", "data"),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=8,
                color=_STYLES["single"][0],
            )
        # Room for the crosses above the slowest contender.
        axis.set_ylim(0, axis.get_ylim()[1] * (1.2 if dead else 1.05))
        _plot_dead(axis, dead)
    axes[0].set_ylabel("steady pass, s")
    _legend(figure, axes)
    return _save(figure, target)


def draw_memory(report: Report, target: Path) -> Path:
    """Draw memory in use over time at the smallest budget, a panel for each contender, with the limit."""
    pairs = [
        (record, run)
        for record, runs in zip(report.records, report.runs, strict=True)
        for run in runs[:1]
        if run.samples
    ]
    budgets = [record.budget_bytes for record, _ in pairs if record.budget_bytes]
    smallest = min(budgets, default=None)
    disk = pairs[0][0].disk_bytes_per_s if pairs else None
    chosen = [
        (record, run)
        for record, run in pairs
        if record.disk_bytes_per_s == disk
        and (record.budget_bytes == smallest or (record.budget_bytes is None and record.contender == "single"))
    ]
    figure, axes = _figure(len(chosen), width=3.0, height=2.6, columns=3)
    highest = max((used for _, run in chosen for _, used in run.samples), default=0) / 1e6
    for (record, run), axis in zip(chosen, axes, strict=True):
        _plot_memory(axis, record, run)
        axis.set_ylim(0, highest * 1.15)
        axis.set_xlim(left=0)
        axis.set_xlabel("seconds")
    for axis in axes[::3]:
        axis.set_ylabel("memory, MB")
    if chosen:
        figure.suptitle(
            f"{chosen[0][0].model}: memory of the whole process and its page cache, disk {_rate(disk)}",
            x=0.01,
            ha="left",
        )
    return _save(figure, target)


def draw_agents(records: Sequence[Record], target: Path) -> Path:
    """Draw the speed with n Loading Agents as a multiple of the standard pipeline's, a line for each model and disk."""
    figure, (axis,) = _figure(1, width=5.6, height=3.9)
    numbers = sorted({record.loaders for record in records if record.loaders})
    groups = list(dict.fromkeys((record.model, record.disk_bytes_per_s) for record in records))
    for (model, disk), (colour, marker) in zip(groups, _STYLES.values(), strict=False):
        mine = [r for r in records if (r.model, r.disk_bytes_per_s) == (model, disk)]
        # The standard pipeline without a limit, if there is one, beside pipeload at its smallest budget.
        usual = sorted((r for r in mine if r.contender == "standard" and r.steady_s), key=_room, reverse=True)
        base = usual[0].steady_s if usual else None
        ours = {r.loaders: r for r in sorted(mine, key=_room, reverse=True) if r.loaders and r.steady_s}
        base = base or next((ours[number].steady_s for number in numbers if number in ours), None)
        points = [(number, base / ours[number].steady_s) for number in numbers if base and number in ours]  # type: ignore[operator]
        if points:
            label = f"{model}, disk {_rate(disk)}: up to {max(speed for _, speed in points):.2f}"
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=2, label=label)
    named = any(record.contender == "standard" and record.steady_s for record in records)
    axis.axhline(1, color=_GREY, linestyle="--", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(numbers, [str(number) for number in numbers])
    axis.minorticks_off()
    axis.set_ylim(0, axis.get_ylim()[1] * 1.1)
    axis.set_xlabel("Loading Agents")
    axis.set_ylabel(f"speed, {'standard pipeline' if named else 'one agent'} = 1")
    axis.legend(frameon=False, loc="lower right")
    return _save(figure, target)


def _room(record: Record) -> float:
    return math.inf if record.budget_bytes is None else record.budget_bytes


def _plot_bound(axis: Any, records: Sequence[Record]) -> None:
    ours = sorted(
        (r.budget_bytes, r.bound_s) for r in records if r.contender == "pipeload" and r.budget_bytes and r.bound_s
    )
    if ours:
        places, bounds = [budget / 1e6 for budget, _ in ours], [bound for _, bound in ours]
        axis.plot(places, bounds, color="black", linestyle="--", linewidth=1.2, label="T* (roofline)")


def _plot_dead(axis: Any, dead: Sequence[tuple[float, str]]) -> None:
    """Crosses below the upper edge, one below the other where several contenders died at one budget."""
    if not dead:
        return
    seen: dict[float, int] = {}
    for place, name in dead:
        row = seen.get(place, 0)
        seen[place] = row + 1
        axis.plot(
            place, 0.96 - 0.05 * row, "X", color=_STYLES[name][0], transform=axis.get_xaxis_transform(), markersize=7
        )
    for name in dict.fromkeys(name for _, name in dead):
        axis.plot([], [], "X", color=_STYLES[name][0], markersize=7, label=f"{name}: killed or refused")


def _plot_memory(axis: Any, record: Record, run: Run) -> None:
    colour = _STYLES[record.contender][0]
    times = [second for second, _ in run.samples]
    used = [nbytes / 1e6 for _, nbytes in run.samples]
    axis.fill_between(times, used, color=colour, alpha=0.25, linewidth=0)
    axis.plot(times, used, color=colour, linewidth=1.2)
    name = record.contender if record.budget_bytes else f"{record.contender}, no limit"
    axis.set_title(f"{name}: killed" if run.killed else name, loc="left", fontsize=10)
    if record.budget_bytes:
        axis.axhline(record.budget_bytes / 1e6, color="black", linestyle="--", linewidth=1)
        axis.annotate(
            f"limit {record.budget_bytes / 1e6:.0f} MB",
            (1, record.budget_bytes / 1e6),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )


def _figure(panels: int, *, width: float, height: float, columns: int = 4) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("Pictures need matplotlib: pip install matplotlib.") from error
    columns = max(1, min(columns, panels))
    rows = max(1, -(-panels // columns))
    figure = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained", dpi=130)
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = list(grid.flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = min(len(entries), 2 * len(axes))
    figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns, frameon=False)


def _rate(disk: int | None) -> str:
    return "not throttled" if disk is None else f"{disk / 1e6:.0f} MB/s"


def _save(figure: Any, target: Path) -> Path:
    figure.savefig(target)
    return target
