"""What was tried, and how often: kept in counts/NAME.json by the commands that try it, shown in docs/reliability.md.

python -m tests.proof.counts    only write the page's tables again
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import msgspec

__all__ = ["Kept", "Line", "keep", "kept", "publish"]

_ROOT = Path(__file__).resolve().parents[2]
_FOLDER = Path(__file__).parent / "counts"
_PAGE = _ROOT / "docs" / "reliability.md"


class Line(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One row of the page.

    Attributes:
        fault: the fault that was made, or the system that was tried.
        outcome: what the caller sees.
        recovered: what works afterwards.
        runs: how often it was tried.
        failures: how many of these broke a promise.
    """

    fault: str
    outcome: str
    recovered: str
    runs: int
    failures: int = 0


class Kept(msgspec.Struct, kw_only=True, frozen=True):
    """What one command has tried.

    Attributes:
        command: that anyone can run again.
        date: of the run.
        seconds: that it took.
        lines: see `Line`.
    """

    command: str
    date: str
    seconds: float
    lines: tuple[Line, ...]


def keep(name: str, command: str, seconds: float, lines: Sequence[Line]) -> None:
    """Write counts/NAME.json, and the tables of the page."""
    tried = Kept(
        command=command,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        seconds=round(seconds, 1),
        lines=tuple(lines),
    )
    _FOLDER.mkdir(exist_ok=True)
    (_FOLDER / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(tried), indent=1) + b"\n")
    publish()


def kept(name: str) -> Kept | None:
    """What an earlier run has kept; None where there was none."""
    path = _FOLDER / f"{name}.json"
    return msgspec.json.decode(path.read_bytes(), type=Kept) if path.is_file() else None


def publish() -> None:
    """Put the table of each kept file between its two marks in the page."""
    page = _PAGE.read_text()
    for path in sorted(_FOLDER.glob("*.json")):
        begin, end = f"<!-- counts: {path.stem} -->", f"<!-- end of {path.stem} -->"
        if begin not in page:
            raise ValueError(f"{_PAGE.name} has no place for {path.name}: add the lines '{begin}' and '{end}'.")
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{_table(msgspec.json.decode(path.read_bytes(), type=Kept))}\n{end}{after}"
    _PAGE.write_text(page)


def _table(tried: Kept) -> str:
    rows = [
        f"| {line.fault} | {line.outcome} | {line.recovered} | {line.runs:,} | {line.failures:,} |"
        for line in tried.lines
    ]
    return "\n".join(
        [
            f"`{tried.command}`, {tried.date}, {tried.seconds:,.0f} s:",
            "",
            "| fault | outcome | afterwards | runs | failures |",
            "| --- | --- | --- | ---: | ---: |",
            *rows,
        ]
    )


if __name__ == "__main__":
    publish()
