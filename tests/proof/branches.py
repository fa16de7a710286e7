"""The branches of pipeline, storage, format and planning that no test of theirs takes: `make coverage`.

python -m tests.proof.branches TEST ...           measure, and print what is missing
python -m tests.proof.branches TEST ... --keep    also keep the counts
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from tests.proof.counts import Line, keep

_COVERAGE = [sys.executable, "-m", "coverage"]
_TAKEN = (
    "statements and branches of `pipeline`, `storage`, `format` and `planning`, by their quick tests and those of "
    "whole models"
)


class _Totals(msgspec.Struct, kw_only=True, frozen=True):
    """What coverage counts."""

    num_statements: int
    missing_lines: int
    num_branches: int
    missing_branches: int


class _Report(msgspec.Struct, kw_only=True, frozen=True):
    totals: _Totals


def main() -> int:
    """Measure, print, and keep the counts. Returns 1 where a test fails or a branch is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="+", metavar="TEST", help="a file or folder of tests")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
    parser.add_argument("--keep", action="store_true", help="keep the counts")
    given = parser.parse_args()
    shutil.rmtree("build/coverage", ignore_errors=True)
    begin_s = time.monotonic()
    options = ["--numprocesses", str(given.workers), "--dist", "loadgroup", "-m", "not slow and not survey"]
    tested = subprocess.run([*_COVERAGE, "run", "-m", "pytest", *options, *given.tests], check=False).returncode
    seconds = time.monotonic() - begin_s
    subprocess.run([*_COVERAGE, "combine", "--quiet"], check=True)
    missed = subprocess.run([*_COVERAGE, "report"], check=False).returncode
    if given.keep and not tested:
        _keep(seconds)
    return 1 if tested or missed else 0


def _keep(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        # Also where branches are missed: their number is kept.
        subprocess.run([*_COVERAGE, "json", "--quiet", "--fail-under", "0", "-o", str(path)], check=True)
        totals = msgspec.json.decode(path.read_bytes(), type=_Report).totals
    runs = totals.num_statements + totals.num_branches
    failures = totals.missing_lines + totals.missing_branches
    told = f"{(runs - failures) / runs:.2%} are taken"
    keep(
        "coverage",
        "make coverage",
        seconds,
        [Line(fault=_TAKEN, outcome=told, recovered="-", runs=runs, failures=failures)],
    )


if __name__ == "__main__":
    sys.exit(main())
