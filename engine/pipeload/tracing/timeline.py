"""A picture of a trace: one lane for each agent, and below it memory and buffers over time.

```
             pass 1                          pass 2
inference    |run|run| wait |run|run| ...    |                 x % busy
loader-0     |read |read |reserve|read |     |
daemon            |f|   |f|      |f|         |
memory       ---------- budget -----------------------
             ~~~~~~~~~~ RSS, reserved ~~~~~~~~~~~~~~~~~
buffers      __|--|___|----|_____
```

Needs matplotlib, from the extra [plot].
"""

from __future__ import annotations

import os
from collections import defaultdict
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeload.errors import ConfigError
from pipeload.machine.sizes import format_bytes
from pipeload.tracing.chrome import Pass, Recording, passes
from pipeload.tracing.trace import KINDS, WAITING, Kind, Sample, Span, agent_times, busy_s, lane_order, read_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SUFFIXES", "draw", "save"]

SUFFIXES = (".png", ".svg")
"""Endings that a picture's name may have."""
_INK, _FAINT = "#333333", "#bbbbbb"

_COLOURS: dict[Kind, tuple[str, str]] = {
    # Okabe and Ito, "Color Universal Design": told apart with every kind of colour vision; a darker one for odd shards.
    "run": ("#0072b2", "#005a8e"),
    "read": ("#f0b441", "#d9931a"),
    "widen": ("#56b4e9", "#56b4e9"),
    "session": ("#009e73", "#009e73"),
    "pack": ("#cc79a7", "#cc79a7"),
    "free": ("#56504a", "#56504a"),
    "wait": ("#e4e4e4", "#e4e4e4"),
    "reserve": ("#f4f4f4", "#f4f4f4"),
}
_MEANINGS: dict[Kind, str] = {
    "run": "run: even, odd shards",
    "read": "read: even, odd shards",
    "widen": "widen to 32 bits",
    "session": "make session",
    "pack": "pack",
    "free": "free",
    "wait": "wait",
    "reserve": "wait for budget",
}
_LEGEND_ORDER: tuple[Kind, ...] = ("run", "read", "widen", "session", "pack", "free", "wait", "reserve")
_HATCHES: dict[Kind, str] = {"reserve": "/////"}
_EDGES: dict[Kind, str] = {"reserve": "#a8a8a8"}
"""Hatches have the colour of the edges."""
_BRIGHT: frozenset[Kind] = frozenset({"read"})
"""Kinds whose bars carry dark letters."""
_RESIDENT, _BETWEEN = "run of a resident shard", "between passes"
_PAUSE = "#fbf0d9"
"""Colour of the time between passes."""
_MEMORY = {"rss_bytes": ("RSS", "#0072b2"), "reserved_bytes": ("reserved for weights", "#d55e00")}
_WIDTH_INCHES, _LEFT_INCHES, _RIGHT_INCHES = 15.0, 1.15, 1.75
_LANE_INCHES, _MEMORY_INCHES, _BUFFERS_INCHES, _GAP_INCHES = 0.58, 1.5, 0.62, 0.2
_TOP_INCHES, _BOTTOM_INCHES = 1.22, 0.58
_LETTER_POINTS = 6.5
_LETTER_WIDTH = 0.64
"""Width of a letter over its size, for the widest usual ones."""
_HALF_BAR = 0.36
_MARK_AT = 0.25
"""A resident shard's line, below the middle of its lane."""
_SECONDS_FROM_S = 2.0
"""Shorter pictures count in milliseconds."""
_BESIDE: dict[str, Any] = {
    "loc": "upper left",
    "bbox_to_anchor": (1.005, 1.04),
    "frameon": False,
    "fontsize": 8.5,
    "labelcolor": _INK,
    "handlelength": 1.2,
    "borderaxespad": 0,
}
"""Legends stand to the right of the data."""
_THIN_POINTS = 2.5
"""Bars thinner than this are drawn without edges, which would hide them; pauses thinner than this are not drawn."""


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture as .png or .svg, by the ending of its name.

    Raises:
        ConfigError: the name has another ending.
        OSError: it cannot be written.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path} ends with neither of {', '.join(SUFFIXES)}: name the picture so.")
    figure.savefig(path, dpi=150)


def draw(recording: Recording, shown: list[Pass]) -> Figure:
    """Draw neighbouring passes, or the whole record when there are none.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("Pictures need matplotlib: pip install matplotlib.") from error
    spans = recording.spans
    begin_s = shown[0].begin_s if shown else min(span.begin_s for span in spans)
    end_s = shown[-1].end_s if shown else max(span.end_s for span in spans)
    lanes = sorted({span.agent for span in spans}, key=lane_order)
    counters = {sample.counter for sample in recording.samples}
    heights = [_LANE_INCHES * len(lanes)]
    if has_memory := bool(counters & _MEMORY.keys()):
        heights.append(_MEMORY_INCHES)
    if has_buffers := "buffers" in counters:
        heights.append(_BUFFERS_INCHES)
    height = _TOP_INCHES + sum(heights) + _GAP_INCHES * (len(heights) - 1) + _BOTTOM_INCHES
    figure = Figure(figsize=(_WIDTH_INCHES, height), facecolor="white")
    scale = _Scale(begin_s, end_s)
    panels = _panels(figure, heights, scale)
    _draw_lanes(panels[0], spans, lanes, scale)
    _draw_passes(panels, spans, shown, scale)
    marked = _mark_residents(panels[0], spans, lanes, scale)
    paused = _draw_pauses(panels, shown, scale)
    if has_memory:
        _draw_memory(panels[1], recording, scale)
    if has_buffers:
        _draw_buffers(panels[-1], recording, scale)
    kinds = [kind for kind in _LEGEND_ORDER if any(span.kind == kind for span in spans)]
    _draw_head(figure, recording, shown)
    _draw_legend(figure, kinds, marked=marked, paused=paused)
    return figure


class _Scale:
    """Seconds of the trace -> values on the axis of time: seconds or milliseconds since the picture's beginning."""

    def __init__(self, begin_s: float, end_s: float) -> None:
        self.begin_s, self.end_s = begin_s, max(end_s, begin_s + 1e-6)
        seconds = self.end_s - self.begin_s
        self.unit, self._factor = ("s", 1.0) if seconds >= _SECONDS_FROM_S else ("ms", 1000.0)
        self.points_per_s = (_WIDTH_INCHES - _LEFT_INCHES - _RIGHT_INCHES) * 72 / seconds

    def __call__(self, time_s: float) -> float:
        return (time_s - self.begin_s) * self._factor

    def text(self, begin_s: float, end_s: float, size: float, *texts: str) -> str:
        """The first of the texts that fits between two moments, or none."""
        points = (end_s - begin_s) * self.points_per_s - 3
        return next((text for text in texts if len(text) * size * _LETTER_WIDTH <= points), "")


def _panels(figure: Figure, heights: list[float], scale: _Scale) -> list[Axes]:
    """Axes below each other that share the time, with tick labels at the lowest."""
    whole = figure.get_figheight()
    width = (_WIDTH_INCHES - _LEFT_INCHES - _RIGHT_INCHES) / _WIDTH_INCHES
    panels = []
    top = whole - _TOP_INCHES
    for height in heights:
        panel = figure.add_axes((_LEFT_INCHES / _WIDTH_INCHES, (top - height) / whole, width, height / whole))
        panel.set_xlim(scale(scale.begin_s), scale(scale.end_s))
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(_FAINT)
        panel.tick_params(colors=_INK, labelsize=8.5, length=3, color=_FAINT, labelbottom=False)
        panel.grid(axis="x", color="#ececec", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.locator_params(axis="x", nbins=16)
        panels.append(panel)
        top -= height + _GAP_INCHES
    panels[-1].tick_params(labelbottom=True)
    panels[-1].set_xlabel(f"time ({scale.unit})", color=_INK, fontsize=9)
    return panels


def _draw_lanes(panel: Axes, spans: list[Span], lanes: list[str], scale: _Scale) -> None:
    bars: dict[tuple[Kind, int], list[tuple[int, Span]]] = defaultdict(list)
    for span in spans:
        if span.end_s > scale.begin_s and span.begin_s < scale.end_s:
            bars[span.kind, _shard_number(span) % 2].append((lanes.index(span.agent), span))
    for kind, parity in sorted(bars, key=lambda bar: KINDS.index(bar[0])):
        _draw_bars(panel, bars[kind, parity], kind, parity, scale)
    panel.set_ylim(len(lanes) - 0.5, -0.5)
    panel.set_yticks(range(len(lanes)), lanes, fontsize=9.5)
    panel.tick_params(axis="y", length=0)
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.tick_params(axis="x", length=0)
    times = agent_times(spans, scale.begin_s, scale.end_s)
    for place, agent in enumerate(lanes):
        share = times[agent].busy_s / (scale.end_s - scale.begin_s) if agent in times else 0.0
        panel.text(
            1.008,
            place,
            f"{share:.0%} busy",
            transform=panel.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color=_INK,
        )


def _draw_bars(panel: Axes, bars: list[tuple[int, Span]], kind: Kind, parity: int, scale: _Scale) -> None:
    from matplotlib.collections import PolyCollection

    corners, edges = [], []
    for lane, span in bars:
        begin_s, end_s = max(span.begin_s, scale.begin_s), min(span.end_s, scale.end_s)
        left, right, low, high = scale(begin_s), scale(end_s), lane - _HALF_BAR, lane + _HALF_BAR
        corners.append([(left, low), (left, high), (right, high), (right, low)])
        edges.append(0.6 if (end_s - begin_s) * scale.points_per_s >= _THIN_POINTS else 0.0)
        short = str(_shard_number(span)) if span.shard.startswith("block.") else span.shard
        label = scale.text(begin_s, end_s, _LETTER_POINTS, span.shard, short)
        if label and kind not in WAITING:
            panel.text(
                (left + right) / 2,
                lane,
                label,
                ha="center",
                va="center",
                fontsize=_LETTER_POINTS,
                color=_INK if kind in _BRIGHT else "white",
                clip_on=True,
            )
    collection = PolyCollection(
        corners, facecolors=_COLOURS[kind][parity], linewidths=edges, edgecolors=_EDGES.get(kind, "white")
    )
    # Rounded to whole pixels, thin bars would vanish; instead, the thinner a bar, the paler it is.
    collection.set_snap(False)
    if kind in _HATCHES:
        collection.set_hatch(_HATCHES[kind])
    panel.add_collection(collection, autolim=False)


def _shard_number(span: Span) -> int:
    """7 of "block.007"; 0 where there is none."""
    digits = span.shard.rpartition(".")[2]
    return int(digits) if digits.isdecimal() else 0


def _draw_passes(panels: list[Axes], spans: list[Span], shown: list[Pass], scale: _Scale) -> None:
    """A line where each pass begins and ends, with its duration above."""
    points = (scale.end_s - scale.begin_s) * scale.points_per_s / max(len(shown), 1)
    thickness = min(0.9, points / 50)  # many passes must not end up as nothing but lines
    reads: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        if span.kind == "read":
            reads[span.pass_number].append(span)
    for edge in sorted({each.begin_s for each in shown} | {each.end_s for each in shown}):
        for panel in panels:
            panel.axvline(scale(edge), color=_INK, linewidth=thickness, linestyle=(0, (4, 3)), zorder=3, clip_on=False)
    for each in shown:
        title, seconds = f"pass {each.number}", f"{each.end_s - each.begin_s:.3g} s"
        texts = [f"{title}: {seconds}", title, str(each.number)]
        if read_s := busy_s(reads[each.number]):
            nbytes = read_bytes(reads[each.number])
            texts.insert(0, f"{title}: {seconds}, {format_bytes(nbytes)} read at {nbytes / read_s / 1e9:.2f} GB/s")
        label = scale.text(each.begin_s, each.end_s, 9, *texts)
        middle = scale((each.begin_s + each.end_s) / 2)
        panels[0].text(middle, -0.56, label, ha="center", va="bottom", fontsize=9, color=_INK, fontweight="bold")


def _mark_residents(panel: Axes, spans: list[Span], lanes: list[str], scale: _Scale) -> bool:
    """A line in the bars of runs whose shard stayed from an earlier pass: none was read for this one. Any at all?"""
    runs = [span for span in spans if span.kind == "run"]
    read = {(span.pass_number, span.shard) for span in spans if span.kind == "read"}
    first = min((span.pass_number for span in runs), default=0)  # what came before it may have left the record
    xs, ys = [], []
    for span in runs:
        inside = span.end_s > scale.begin_s and span.begin_s < scale.end_s
        if inside and span.pass_number > first and (span.pass_number, span.shard) not in read:
            begin, end = scale(max(span.begin_s, scale.begin_s)), scale(min(span.end_s, scale.end_s))
            inset = (end - begin) * 0.15
            xs += [begin + inset, end - inset, nan]
            ys += [lanes.index(span.agent) + _MARK_AT] * 2 + [nan]
    if xs:
        panel.plot(xs, ys, color="white", linewidth=1.8, solid_capstyle="butt", label=_RESIDENT)
    return bool(xs)


def _draw_pauses(panels: list[Axes], shown: list[Pass], scale: _Scale) -> bool:
    """The time between neighbouring passes, with its length above. Is there any?"""
    pauses = [
        (before.end_s, after.begin_s)
        for before, after in pairwise(shown)
        if (after.begin_s - before.end_s) * scale.points_per_s >= _THIN_POINTS
    ]
    for begin_s, end_s in pauses:
        for panel in panels:
            panel.axvspan(scale(begin_s), scale(end_s), color=_PAUSE, linewidth=0, zorder=0)
        length = scale.text(begin_s, end_s, 7, f"{(end_s - begin_s) * 1000:.0f} ms")
        panels[0].text(scale((begin_s + end_s) / 2), -0.56, length, ha="center", va="bottom", fontsize=7, color=_INK)
    return bool(pauses)


def _draw_memory(panel: Axes, recording: Recording, scale: _Scale) -> None:
    budget = recording.facts.get("budget_bytes")
    shown = {name: _steps(recording.samples, name, scale) for name in _MEMORY}
    most = max([value for _, values in shown.values() for value in values] + [budget or 0, 1])
    unit, divisor = ("GB", 1e9) if most >= 1e9 else ("MB", 1e6)
    for name, (label, colour) in _MEMORY.items():
        moments, values = shown[name]
        if values:
            heights = [value / divisor for value in values]
            if name == "rss_bytes":
                panel.fill_between(moments, heights, color=colour, alpha=0.12, linewidth=0)
                panel.plot(
                    moments, heights, color=colour, linewidth=1.5, label=f"{label}, peak {format_bytes(max(values))}"
                )
            else:
                panel.step(moments, heights, where="post", color=colour, linewidth=1.3, label=label)
    if budget:
        panel.axhline(
            budget / divisor, color=_INK, linewidth=1.3, linestyle="--", label=f"budget {format_bytes(budget)}"
        )
    panel.set_ylim(0, most / divisor * 1.12)
    panel.set_ylabel(f"memory ({unit})", color=_INK, fontsize=9)
    panel.legend(**_BESIDE)


def _draw_buffers(panel: Axes, recording: Recording, scale: _Scale) -> None:
    moments, values = _steps(recording.samples, "buffers", scale)
    planned = recording.facts.get("buffers")
    panel.fill_between(moments, values, step="post", color="#009e73", alpha=0.55, linewidth=0, label="buffers in use")
    if planned:
        panel.axhline(planned, color=_INK, linewidth=1.1, linestyle=":", label=f"planned: {planned}")
    top = int(max([*values, planned or 0, 1]))
    panel.set_ylim(0, top * 1.15)
    panel.set_yticks(range(0, top + 1, max(1, top // 4)))
    panel.set_ylabel("buffers", color=_INK, fontsize=9)
    panel.legend(**_BESIDE)


def _draw_head(figure: Figure, recording: Recording, shown: list[Pass]) -> None:
    facts = recording.facts
    whole = figure.get_figheight()
    left = _LEFT_INCHES / _WIDTH_INCHES
    title = str(facts.get("model") or "pipeload")
    if shown:
        first, last, found = shown[0].number, shown[-1].number, passes(recording.spans)
        title += f", pass {first}" if first == last else f", passes {first}-{last}"
        title += f" of {found[-1].number}"
    said = [f"budget {format_bytes(facts['budget_bytes'])}"] if facts.get("budget_bytes") else []
    for key, word in (("loaders", "Loading Agent"), ("buffers", "buffer")):
        if count := facts.get(key):
            said.append(f"{count} {word}{'' if count == 1 else 's'}")
    figure.text(left, 1 - 0.32 / whole, title, fontsize=14, fontweight="bold", color=_INK)
    figure.text(left, 1 - 0.56 / whole, ", ".join(said), fontsize=9.5, color="#666666")


def _draw_legend(figure: Figure, kinds: list[Kind], *, marked: bool, paused: bool) -> None:
    """Every colour below the head: a kind of two shades has both, the darker one of odd shards."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def patch(kind: Kind, colour: str) -> Patch:
        return Patch(facecolor=colour, edgecolor=_EDGES.get(kind, "white"), hatch=_HATCHES.get(kind), linewidth=0.6)

    entries: dict[str, tuple[Any, ...]] = {
        _MEANINGS[kind]: tuple(patch(kind, colour) for colour in dict.fromkeys(_COLOURS[kind])) for kind in kinds
    }
    if marked:
        entries[_RESIDENT] = (patch("run", _COLOURS["run"][0]), Line2D([], [], color="white", linewidth=1.8))
    if paused:
        entries[_BETWEEN] = (Patch(facecolor=_PAUSE),)
    # Shades stand beside each other; the line of a resident shard lies on its bar.
    shades = HandlerTuple(ndivide=None, pad=0)
    handles: list[Any] = list(entries.values())
    figure.legend(
        handles,
        list(entries),
        handler_map={entry: shades for name, entry in entries.items() if name != _RESIDENT},
        loc="upper left",
        bbox_to_anchor=(_LEFT_INCHES / _WIDTH_INCHES, 1 - 0.7 / figure.get_figheight()),
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        handlelength=1.8,
        columnspacing=1.4,
        borderaxespad=0,
        borderpad=0,
    )


def _steps(samples: list[Sample], counter: str, scale: _Scale) -> tuple[list[float], list[float]]:
    """Moments and values of a counter, from the picture's one edge to the other."""
    own = [sample for sample in samples if sample.counter == counter and sample.time_s <= scale.end_s]
    first = next((i for i, sample in enumerate(own) if sample.time_s >= scale.begin_s), len(own))
    inside = own[max(first - 1, 0) :]
    moments = [scale(max(sample.time_s, scale.begin_s)) for sample in inside]
    values = [sample.value for sample in inside]
    return ([*moments, scale(scale.end_s)], values + values[-1:]) if inside else ([], [])
