"""Every fault in turn: the n-th read, allocation, start of a thread ... fails, for n = 1, 2, 3 ... until none is left.

python -m tests.faults                                       all operations and kinds
python -m tests.faults run export --kind read                some
python -m tests.faults run --kind read --fault EIO --at 12   one point again
python -m tests.faults --every 5                             each fifth point
python -m tests.faults --keep                                also write the table of docs/reliability.md
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before onnxruntime is imported: its telemetry opens descriptors and sockets at moments of its own.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from tests.faults.injector import FAULTS, KINDS
from tests.faults.operations import OPERATIONS, prepare
from tests.faults.trial import Hang
from tests.faults.walk import Cell, Untouched, all_points, untouched, walk
from tests.proof.counts import Line, keep

_MEANINGS = {
    "open": "a file is not opened (EMFILE, EIO, ENOMEM)",
    "read": "a read fails (EIO, ENOMEM), is short, or brings nothing",
    "stat": "a file's state is not told (EIO)",
    "control": "`fcntl`, `flock` or `fadvise` fails (EIO)",
    "write": "a write fails (ENOSPC, EIO)",
    "sync": "`fsync` fails (EIO)",
    "name": "a file or folder is not made, renamed or linked (ENOSPC, EIO)",
    "allocation": "a buffer or an array gets no memory",
    "thread": "a thread does not start",
    "process": "a child process does not start (EAGAIN)",
    "session": "onnxruntime makes no session (memory, threads)",
    "run": "onnxruntime fails in a run",
    "callback": "a callback of the caller raises",
    "interrupt": "Ctrl-C where the caller's thread looks at signals",
}


def main() -> int:
    """Parse the command line, try, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=f"of {' '.join(OPERATIONS)}")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind; may be repeated")
    parser.add_argument("--fault", help="only this way of failing, such as EIO")
    parser.add_argument("--at", type=int, metavar="N", help="only the N-th event, with its place and outcome")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th point")
    parser.add_argument("--keep", action="store_true", help="keep the counts")
    given = parser.parse_args()
    if unknown := set(given.operations) - set(OPERATIONS):
        parser.error(f"there is no operation {sorted(unknown)}")
    begin_s = time.monotonic()
    cells = list[Cell]()
    with tempfile.TemporaryDirectory(prefix="pipeload-faults-models-") as folder:
        models = prepare(Path(folder))
        try:
            for name in given.operations or OPERATIONS:
                found = untouched(OPERATIONS[name], models)
                gc.collect()
                gc.freeze()
                for kind in given.kind or KINDS:
                    cells.append(_tried(name, kind, models, found, given))
        except Hang as hang:
            print(f"HANGS: {hang}", flush=True)
            os._exit(1)
    failures = sum(len(cell.failures) for cell in cells)
    print(f"{sum(cell.tried for cell in cells)} faults, {failures} broke a promise")
    if given.keep:
        keep("faults", " ".join(["python -m tests.faults", *sys.argv[1:]]), time.monotonic() - begin_s, _lines(cells))
    return 1 if failures else 0


def _tried(name: str, kind: str, models: Path, found: Untouched, given: argparse.Namespace) -> Cell:
    cell = Cell(operation=name, kind=kind)
    faults = [one for one in FAULTS[kind] if given.fault in (None, one)]
    points: Iterable[tuple[str, int]]
    if given.at:
        points = [(fault, given.at) for fault in faults]
    elif kind == "interrupt":
        points = [(fault, number) for fault in faults for number in found.looks[:: given.every]]
    else:
        points = all_points(cell, faults, given.every)
    for result in walk(cell, models, found, points):
        if given.at:
            print(f"{result.place or 'no such event'}: {result.outcome}", flush=True)
    told = ", ".join(f"{count} {outcome}" for outcome, count in cell.outcomes.most_common() if count)
    print(f"{name:14} {kind:11} {cell.tried:5} {told}", flush=True)
    for again, why in cell.failures.items():
        print(f"  BROKEN {why}\n         {again}", flush=True)
    return cell


def _lines(cells: Sequence[Cell]) -> list[Line]:
    lines = []
    for kind in KINDS:
        own = [cell for cell in cells if cell.kind == kind]
        outcomes: Counter[str] = sum((cell.outcomes for cell in own), Counter())
        if not (runs := sum(cell.tried for cell in own)):
            continue
        told = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common() if count)
        closed = any(outcome.startswith("closed") for outcome in outcomes)
        lines.append(
            Line(
                fault=f"{_MEANINGS[kind]}, in {len(own)} operations",
                outcome=told,
                recovered="the same call, or ClosedError" if closed else "the same call",
                runs=runs,
                failures=sum(len(cell.failures) for cell in own),
            )
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
