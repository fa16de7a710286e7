"""Faults of the system, made for real in child processes: disks, memory, limits, kills, full disks, allocators, clocks.

python -m tests.system                   all rows that this machine can try
python -m tests.system eio bit-flip      some of them
python -m tests.system --short           those that take a few seconds
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.models import REPOSITORY
from tests.proof.counts import Line, keep, kept
from tests.system.rows import Finding
from tests.system.table import ROWS

_KEPT = REPOSITORY / "tests" / "proof" / "counts" / "system.json"


def main() -> int:
    """Try the rows. Returns 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {' '.join(row.name for row in ROWS)}")
    parser.add_argument("--short", action="store_true", help="only rows that take a few seconds")
    parser.add_argument("--keep", action="store_true", help="write the counts to docs/reliability.md")
    given = parser.parse_args()
    if unknown := set(given.names) - {row.name for row in ROWS}:
        parser.error(f"there is no row {', '.join(sorted(unknown))}")
    lines: list[Line] = []
    if given.keep and not given.names:
        _KEPT.unlink(missing_ok=True)
    for row in ROWS:
        if (given.names and row.name not in given.names) or (given.short and (row.slow or row.long)):
            continue
        if reason := row.lacks():
            print(f"      -     -  {row.name}: not tried: {reason}", flush=True)
            continue
        with tempfile.TemporaryDirectory(prefix="pipeload-system-") as place:
            begun_s = time.monotonic()
            try:
                found = row.make(Path(place))
            except AssertionError as error:
                # A process that hangs, or was killed.
                found = Finding(runs=1, failures=[str(error)])
        for failure in found.failures:
            print(f"FAILED {row.name}: {failure}\n  python -m tests.system {row.name}", file=sys.stderr, flush=True)
        print(
            f"{found.runs:7,} {len(found.failures):5,}  {row.name}: {row.fault} ({time.monotonic() - begun_s:.1f} s)",
            flush=True,
        )
        line = Line(
            fault=row.fault,
            outcome=row.outcome,
            recovered=row.recovered,
            runs=found.runs,
            failures=min(len(found.failures), found.runs),
        )
        lines.append(line)
        if given.keep:
            _keep(time.monotonic() - begun_s, line)
    return int(any(line.failures for line in lines))


def _keep(seconds: float, line: Line) -> None:
    """Keep the count of a row, beside those of the others."""
    known, before_s = {}, 0.0
    if (before := kept("system")) is not None:
        known, before_s = {one.fault: one for one in before.lines}, before.seconds
    known[line.fault] = line
    found = [known[row.fault] for row in ROWS if row.fault in known]
    keep("system", "python -m tests.system --keep", before_s + seconds, found)


if __name__ == "__main__":
    sys.exit(main())
