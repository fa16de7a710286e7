"""Records as a table: for a terminal, and for a page in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pipeload.bench.record import Record
from pipeload.machine.sizes import format_bytes

__all__ = ["markdown", "table"]

Column = tuple[str, Callable[[Record], str]]


def table(records: Sequence[Record]) -> Table:
    """A table for rich to print; a line between the settings."""
    columns = list(_columns(records))
    result = Table(box=SIMPLE_HEAD)
    for index, (name, _) in enumerate(columns):
        result.add_column(name, justify="right" if index else "left", no_wrap=True)
    setting = None
    for record in records:
        if setting not in (None, (record.budget_bytes, record.disk_bytes_per_s)):
            result.add_section()
        setting = (record.budget_bytes, record.disk_bytes_per_s)
        result.add_row(*(cell(record) for _, cell in columns), style=None if record.ok else "dim")
    return result


def markdown(records: Sequence[Record]) -> str:
    """The same table in Markdown, for a page."""
    columns = list(_columns(records))
    lines = [[name for name, _ in columns], ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[cell(record) for _, cell in columns] for record in records]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _columns(records: Sequence[Record]) -> Iterable[Column]:
    """The columns, without those that would repeat one value in every row."""
    yield "contender", _contender
    for name, cell in (("model", lambda r: r.model), ("disk", _disk), ("budget", _budget)):
        if len({cell(record) for record in records}) > 1:
            yield name, cell
    yield "first", lambda r: seconds(r.first_s) if r.first_s or r.ok else _failure(r)
    yield "steady", lambda r: seconds(r.steady_s)
    yield "T*", lambda r: seconds(r.bound_s)
    yield "T*/steady", lambda r: "-" if r.efficiency is None else f"{r.efficiency:.2f}"
    yield "read/pass", lambda r: _bytes(r.read_bytes)
    yield "peak", lambda r: _bytes(r.peak_bytes)
    yield "max error", lambda r: "-" if r.max_error is None else f"{r.max_error:.0e}"
    yield "ok", lambda r: "yes" if r.ok else "NO"


def seconds(value: float | None) -> str:
    """`"1.23 s"` or `"45 ms"`; `"-"` for None."""
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms" if value < 0.1 else f"{value * 1000:.0f} ms"


def _contender(record: Record) -> str:
    return record.contender if record.loaders is None else f"{record.contender}, {record.loaders} loading"


def _disk(record: Record) -> str:
    return "not throttled" if record.disk_bytes_per_s is None else f"{format_bytes(record.disk_bytes_per_s)}/s"


def _budget(record: Record) -> str:
    return "none" if record.budget_bytes is None else format_bytes(record.budget_bytes)


def _failure(record: Record) -> str:
    return "killed" if record.killed else "refused" if "budget" in (record.message or "") else "failed"


def _bytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else format_bytes(nbytes)
