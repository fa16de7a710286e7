"""The frame of a picture: title, notes and legend stand above the panels, where nothing is drawn.

matplotlib (extra [plot]) is imported when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from textwrap import wrap
from typing import Any

from pipeload.errors import ConfigError

__all__ = ["FAINT", "NOTE_POINTS", "WIDTH_INCHES", "entry", "framed", "plain"]

WIDTH_INCHES = 9.0
"""A page shows a picture of this width with letters of about the size of its own text."""
FAINT = "#5c6670"
"""Colour of notes."""
NOTE_POINTS = 8.5
_TITLE_POINTS = 12.0
_TITLE_INCHES, _LINE_INCHES, _GAP_INCHES, _LEFT_INCHES = 0.34, 0.165, 0.09, 0.1
_LETTER_WIDTH = 0.53
"""Mean width of a letter over its size."""
_HANDLE_POINTS = 42.0
"""Width of a legend's entry beside its words."""
_DOTS_PER_INCH = 130


def framed(
    title: str, notes: Sequence[str], entries: Sequence[Any], *, height: float, width: float = WIDTH_INCHES
) -> Any:
    """A figure without panels yet: title, notes and one legend, with room of `height` inches below them.

    Args:
        title: one line.
        notes: texts below it, broken to the width.
        entries: what the legend shows: artists with labels.
        height: of the room for the panels, in inches; the head comes on top of it.
        width: of the whole figure, in inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    Figure = _matplotlib("figure").Figure  # noqa: N806
    letters = int((width - 2 * _LEFT_INCHES) * 72 / (NOTE_POINTS * _LETTER_WIDTH))
    lines = [line for note in notes for line in wrap(note, letters)]
    longest = max((len(entry.get_label()) for entry in entries), default=1) * NOTE_POINTS * _LETTER_WIDTH
    columns = max(1, min(len(entries), int((width - _LEFT_INCHES) * 72 / (longest + _HANDLE_POINTS))))
    legend_inches = -(-len(entries) // columns) * _LINE_INCHES + _GAP_INCHES if entries else 0.0
    head = _TITLE_INCHES + len(lines) * _LINE_INCHES + legend_inches + _GAP_INCHES
    whole = height + head
    figure = Figure(figsize=(width, whole), facecolor="white", dpi=_DOTS_PER_INCH)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, height / whole))
    left = _LEFT_INCHES / width
    figure.text(left, 1 - 0.08 / whole, title, va="top", fontsize=_TITLE_POINTS, fontweight="bold")
    top = _TITLE_INCHES
    for line in lines:
        figure.text(left, 1 - top / whole, line, va="top", fontsize=NOTE_POINTS, color=FAINT)
        top += _LINE_INCHES
    if entries:
        figure.legend(
            handles=entries,
            loc="upper left",
            bbox_to_anchor=(left, 1 - (top + _GAP_INCHES / 2) / whole),
            ncols=columns,
            frameon=False,
            fontsize=NOTE_POINTS,
            borderaxespad=0,
            borderpad=0,
            labelspacing=0.35,
            columnspacing=1.6,
            handlelength=2.2,
        )
    return figure


def entry(label: str, **look: Any) -> Any:
    """An entry of a legend: a line or a mark with its words.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    return _matplotlib("lines").Line2D([], [], label=label, **look)


def plain(axis: Any) -> None:
    """Leave a panel its axes and faint lines for the eye."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=NOTE_POINTS)


def _matplotlib(module: str) -> Any:
    try:
        return import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ConfigError("Pictures need matplotlib: pip install matplotlib.") from error
