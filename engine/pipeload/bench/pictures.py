"""Records as pictures: latency over budget, memory over time, speed-up over the number of Loading Agents.

Panels of one picture share their scales. A run that was killed has no latency, and so no height: it stands in a strip
of its own above the panel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeload.bench.frame import FAINT, NOTE_POINTS, WIDTH_INCHES, entry, framed, plain
from pipeload.bench.harness import Report
from pipeload.bench.machine import machine_line
from pipeload.bench.record import Record, Run
from pipeload.machine.sizes import format_bytes

__all__ = ["agents_figure", "draw", "latency_figure", "memory_figure"]

_STYLES: dict[str, tuple[str, str]] = {
    "pipeload": ("#d1495b", "o"),
    "mmap": ("#30638e", "s"),
    "standard": ("#edae49", "^"),
    "layerwise": ("#7a9e7e", "D"),
    "single": ("#4a4a4a", "P"),
    "pipeswitch": ("#8a6fb0", "v"),
}
"""Colour and marker; they can be told apart by colour-blind readers, and in print."""
_MEANINGS: dict[str, str] = {
    "pipeload": "this engine",
    "mmap": "one session, weights memory-mapped",
    "standard": "shard by shard, loading one ahead",
    "layerwise": "shard by shard, one after the other",
    "single": "one onnxruntime session, all defaults",
    "pipeswitch": "as standard, but keeps a pass's shards",
}
_BASELINE = "#6b7787"
_KILLED, _SILENT = "X", "o"
"""Marks of the strip: killed for memory; no answer for another reason."""
_ROW_INCHES = 0.2
_PANEL_INCHES = 2.25


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw every picture for which the report has figures. Returns the files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    budgets = {record.budget_bytes for record in report.records if record.budget_bytes}
    loaders = {record.loaders for record in report.records if record.loaders}
    figures = {}
    if len(budgets) > 1:
        figures["latency.png"] = latency_figure(report)
    if len(loaders) > 1:
        figures["agents.png"] = agents_figure(report.records, report.machine)
    figures["memory.png"] = memory_figure(report)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / name)
    return [folder / name for name in figures]


def latency_figure(report: Report) -> Any:
    """The seconds of a steady pass over the budget, a panel for each disk, with T*.

    The scale of seconds is logarithmic, so that a distance is the same ratio in every panel.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    records = [record for record in report.records if record.budget_bytes]
    disks = list(dict.fromkeys(record.disk_bytes_per_s for record in records))
    names = [name for name in _STYLES if any(r.contender == name and r.steady_s for r in records)]
    dead = [name for name in _STYLES if any(r.contender == name and not r.steady_s for r in records)]
    free = [r for r in report.records if not r.budget_bytes and r.contender == "single" and r.steady_s]
    strip = _ROW_INCHES * len(dead)
    counted = report.settings.passes * report.settings.rounds
    figure = framed(
        f"{report.settings.directory.name}: seconds of a steady pass over the memory budget",
        [
            f"{_limit_kind(report)}. Median of {counted} passes{' of one token' if _decodes(report) else ''} after the "
            "warm-up passes.",
            f"{machine_line(report.machine)}. A panel for each rate to which the disk is throttled.",
        ],
        _latency_entries(records, names, dead, free),
        height=2.9 + strip,
    )
    grid = figure.add_gridspec(2 if dead else 1, len(disks), height_ratios=[strip, 2.9] if dead else [1], hspace=0.02)
    panels: list[Any] = []
    for column, disk in enumerate(disks):
        panel = figure.add_subplot(
            grid[-1, column], sharex=panels[0] if panels else None, sharey=panels[0] if panels else None
        )
        panels.append(panel)
        plain(panel)
        _plot_latency(panel, [r for r in records if r.disk_bytes_per_s == disk], names)
        for record in free:
            if record.disk_bytes_per_s == disk:
                panel.axhline(record.steady_s, color=_STYLES["single"][0], linewidth=1.2, linestyle=":")
        head = panel
        if dead:
            head = figure.add_subplot(grid[0, column], sharex=panel)
            _plot_dead(head, [r for r in records if r.disk_bytes_per_s == disk], dead, named=column == 0)
        head.set_title(_rate(disk), loc="left", fontsize=10)
        panel.set_xlabel("memory budget, MB", fontsize=9)
        panel.tick_params(labelleft=column == 0)
    _scale_latency(panels[0], records, free)
    panels[0].set_ylabel("steady pass, s (log scale)", fontsize=9)
    return figure


def memory_figure(report: Report) -> Any:
    """Memory in use over time at the smallest budget and the first disk, a panel for each contender, with the limit.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    chosen = _runs_shown(report)
    budget = min((record.budget_bytes for record, _ in chosen if record.budget_bytes), default=None)
    columns = _columns(len(chosen))
    width = max(WIDTH_INCHES, 3.0 * columns)
    rows = max(1, -(-len(chosen) // columns))
    figure = framed(
        f"{report.settings.directory.name} {f'under {format_bytes(budget)}' if budget else 'without a limit'}: "
        "memory over time",
        [
            f"{'Memory of the process (RSS)' if report.refusal else 'Memory of the process and its page cache'}"
            f"{'; the dashed line is the limit' if budget else ''}. Seconds from the start of the process on.",
            "a + b + c passes: a to the first answer, b to warm up, which are not timed, and c timed ones."
            f"{' Files leave the page cache before each.' if report.settings.cold else ''}",
            f"{_rate(chosen[0][0].disk_bytes_per_s) if chosen else 'no run'}. {machine_line(report.machine)}.",
        ],
        [],
        height=_PANEL_INCHES * rows,
        width=width,
    )
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    highest = max((used for _, run in chosen for _, used in run.samples), default=1)
    unit, divisor = ("GB", 1e9) if highest >= 1e9 else ("MB", 1e6)
    # A run that is killed may lie at its limit for minutes: the scale is that of those that answered.
    answered = [run for _, run in chosen if run.result is not None] or [run for _, run in chosen]
    last_s = max((run.samples[-1][0] for run in answered), default=1.0)
    grid[0, 0].set_xlim(0, last_s * 1.03)
    grid[0, 0].set_ylim(0, max(highest, budget or 0) / divisor * 1.12)
    for place, axis in enumerate(grid.flat):
        if place >= len(chosen):
            axis.set_visible(False)
            continue
        record, run = chosen[place]
        plain(axis)
        _plot_memory(axis, record, run, divisor)
        _name(axis, record, run, _passes(report, record))
        lowest = place + columns >= len(chosen)
        axis.tick_params(labelbottom=lowest)
        axis.set_xlabel("seconds" if lowest else "", fontsize=9)
        axis.set_ylabel("" if place % columns else f"memory, {unit}", fontsize=9)
    return figure


def agents_figure(records: Sequence[Record], machine: Mapping[str, Any]) -> Any:
    """The speed with n Loading Agents as a multiple of the standard pipeline's, a line for each model and disk.

    The standard pipeline without a limit, if there is one, is held against pipeload at its smallest budget.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    numbers = sorted({record.loaders for record in records if record.loaders})
    groups = list(dict.fromkeys((record.model, record.disk_bytes_per_s) for record in records))
    disks = {disk for _, disk in groups}
    named = any(record.contender == "standard" and record.steady_s for record in records)
    entries, lines = [], []
    for (model, disk), (colour, marker) in zip(groups, _STYLES.values(), strict=False):
        mine = [r for r in records if (r.model, r.disk_bytes_per_s) == (model, disk)]
        usual = sorted((r for r in mine if r.contender == "standard" and r.steady_s), key=_room, reverse=True)
        ours = {r.loaders: r for r in sorted(mine, key=_room, reverse=True) if r.loaders and r.steady_s}
        base = usual[0].steady_s if usual else next((ours[n].steady_s for n in numbers if n in ours), None)
        points = [(n, base / ours[n].steady_s) for n in numbers if base and n in ours]  # type: ignore[operator]
        if points:
            budget = ours[points[0][0]].budget_bytes
            label = f"{model} {f'in {format_bytes(budget)}' if budget else 'without a limit'}"
            label += f", {_rate(disk)}" if len(disks) > 1 else ""
            label += f": up to {max(speed for _, speed in points):.2f}"
            lines.append((points, colour, marker))
            entries.append(entry(label, color=colour, marker=marker, linewidth=2))
    baseline = "standard pipeline without a limit" if named else "pipeload with one Loading Agent"
    entries.append(entry(f"{baseline} = 1", color=_BASELINE, linestyle="--", linewidth=1.2))
    figure = framed(
        "Speed of pipeload by number of Loading Agents",
        [
            *([f"Standard pipeline: {_MEANINGS['standard']}, with default sessions of onnxruntime."] if named else []),
            f"{_rate(next(iter(disks)))}. {machine_line(machine)}." if len(disks) == 1 else f"{machine_line(machine)}.",
        ],
        entries,
        height=3.0,
        width=7.0,
    )
    axis = figure.subplots()
    plain(axis)
    for points, colour, marker in lines:
        axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=2)
    axis.axhline(1, color=_BASELINE, linestyle="--", linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set_xticks(numbers, [str(number) for number in numbers])
    axis.minorticks_off()
    axis.set_ylim(0, axis.get_ylim()[1] * 1.05)
    axis.set_xlabel("Loading Agents", fontsize=9)
    axis.set_ylabel("speed, baseline = 1", fontsize=9)
    return figure


def _latency_entries(
    records: Sequence[Record], names: Sequence[str], dead: Sequence[str], free: Sequence[Record]
) -> list[Any]:
    """The legend of latencies: every engine, T*, and the marks of the strip."""
    entries = []
    for name in names:
        colour, marker = _STYLES[name]
        entries.append(entry(f"{name}: {_MEANINGS[name]}", color=colour, marker=marker, linewidth=2))
    if any(r.contender == "pipeload" and r.bound_s for r in records):
        label = "T*: bound modelled from measured disk and compute"
        entries.append(entry(label, color="black", linestyle="--", linewidth=1.2))
    if free:
        label = f"single without limit: {_MEANINGS['single']}"
        entries.append(entry(label, color=_STYLES["single"][0], linestyle=":", linewidth=1.2))
    for name in dead:
        if name not in names and not (free and name == "single"):
            entries.append(entry(f"{name}: {_MEANINGS[name]}", color=_STYLES[name][0], marker=_KILLED, linestyle=""))
    lost = [r for r in records if not r.steady_s]
    if any(r.killed for r in lost):
        entries.append(entry("killed: it needs more memory", color=FAINT, marker=_KILLED, linestyle=""))
    if any(not r.killed for r in lost):
        entries.append(
            entry("refused, or no answer", color=FAINT, marker=_SILENT, markerfacecolor="none", linestyle="")
        )
    return entries


def _plot_latency(panel: Any, records: Sequence[Record], names: Sequence[str]) -> None:
    for name in names:
        points = sorted((r.budget_bytes / 1e6, r.steady_s) for r in records if r.contender == name and r.steady_s)  # type: ignore[operator]
        if points:
            colour, marker = _STYLES[name]
            panel.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=2, markersize=6)
    bounds = sorted((r.budget_bytes / 1e6, r.bound_s) for r in records if r.contender == "pipeload" and r.bound_s)  # type: ignore[operator]
    if bounds:
        panel.plot(*zip(*bounds, strict=True), color="black", linestyle="--", linewidth=1.2, zorder=3)


def _plot_dead(strip: Any, records: Sequence[Record], dead: Sequence[str], *, named: bool) -> None:
    """A row for each contender that gave no answer at some budget, with a mark at each of those budgets."""
    for row, name in enumerate(dead):
        for record in records:
            if record.contender == name and not record.steady_s:
                face = _STYLES[name][0] if record.killed else "none"
                marker = _KILLED if record.killed else _SILENT
                strip.plot(
                    record.budget_bytes / 1e6,  # type: ignore[operator]
                    row,
                    marker,
                    color=_STYLES[name][0],
                    markerfacecolor=face,
                    markersize=7,
                )
    strip.set_facecolor("#f3f3f3")
    strip.spines[:].set_visible(False)
    strip.set_ylim(len(dead) - 0.5, -0.5)
    strip.set_yticks(range(len(dead)), dead, fontsize=NOTE_POINTS)
    strip.tick_params(length=0, labelbottom=False, labelleft=named)


def _scale_latency(panel: Any, records: Sequence[Record], free: Sequence[Record]) -> None:
    """One logarithmic scale for all panels, from a power of ten, its double or five times it to the next."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    drawn = [s for r in records for s in (r.steady_s, r.bound_s if r.contender == "pipeload" else None) if s]
    drawn += [record.steady_s for record in free if record.steady_s]
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    if drawn:
        panel.set_ylim(min(drawn) / 1.25, max(drawn) * 1.25)
    panel.set_xlim(0, max((r.budget_bytes or 0 for r in records), default=1) / 1e6 * 1.06)


def _runs_shown(report: Report) -> list[tuple[Record, Run]]:
    """The first run of every contender at the first disk and the smallest budget, and of a single session without."""
    pairs = [
        (record, run)
        for record, runs in zip(report.records, report.runs, strict=True)
        for run in runs[:1]
        if run.samples
    ]
    smallest = min((record.budget_bytes for record, _ in pairs if record.budget_bytes), default=None)
    return [
        (record, run)
        for record, run in pairs
        if record.disk_bytes_per_s == pairs[0][0].disk_bytes_per_s
        and (record.budget_bytes == smallest or (record.budget_bytes is None and record.contender == "single"))
    ]


def _columns(panels: int) -> int:
    """Columns of a grid that leaves no more than two places empty."""
    if panels <= 3:
        return max(1, panels)
    return 2 if panels == 4 else 3 if panels <= 6 else 4


def _plot_memory(axis: Any, record: Record, run: Run, divisor: float) -> None:
    colour = _STYLES[record.contender][0]
    times = [second for second, _ in run.samples]
    used = [nbytes / divisor for _, nbytes in run.samples]
    axis.fill_between(times, used, color=colour, alpha=0.25, linewidth=0)
    axis.plot(times, used, color=colour, linewidth=1.2)
    if record.budget_bytes:
        axis.axhline(record.budget_bytes / divisor, color="black", linestyle="--", linewidth=1)


def _name(axis: Any, record: Record, run: Run, passes: str) -> None:
    """Above a panel: the contender, and in small letters what it is, and how its run ended or which passes it made."""
    name: str = record.contender
    if record.loaders:
        name += f", {record.loaders} agent{'' if record.loaders == 1 else 's'}"
    if record.contender == "single" and not record.budget_bytes:
        name += ", no limit"
    answered = run.result is not None and run.result.error is None
    end = f"killed after {run.samples[-1][0]:.1f} s" if run.killed else f"{passes} passes" if answered else "no answer"
    axis.set_title(name, loc="left", fontsize=10, pad=4 + 2.4 * NOTE_POINTS)
    for text, height, look in (
        (_MEANINGS[record.contender], 4 + 1.2 * NOTE_POINTS, {"color": FAINT}),
        (end, 3, {"color": FAINT} if answered else {"color": "black", "fontweight": "bold"}),
    ):
        axis.annotate(
            text,
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, height),
            textcoords="offset points",
            fontsize=NOTE_POINTS,
            **look,
        )


def _passes(report: Report, record: Record) -> str:
    """The passes of a run: to the first answer, to warm up, and timed."""
    settling = report.settings.settling_of(record.contender, decodes=_decodes(report))
    return f"1 + {settling} + {report.settings.passes}"


def _decodes(report: Report) -> bool:
    """Whether a pass decoded a token: other passes of a comparison have no answer for a human reader."""
    return any(record.answer is not None for record in report.records)


def _limit_kind(report: Report) -> str:
    if report.refusal:
        return "The budget is pipeload's own"
    return "The budget is the limit of a memory cgroup, page cache included"


def _room(record: Record) -> float:
    return math.inf if record.budget_bytes is None else record.budget_bytes


def _rate(disk: int | None) -> str:
    return "Disk not throttled" if disk is None else f"Disk at {disk / 1e6:.0f} MB/s"
