"""Processes with random budgets, shapes, models and calls: the kernel's peak <= the budget, and every answer right.

python -m tests.soak --hours 8             goes on from the seed after the last one of the results
python -m tests.soak --seed 17 --runs 1    that run again
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
from tests.models import REPOSITORY
from tests.proof.counts import Line, keep
from tests.soak.draw import draw
from tests.soak.models import available
from tests.soak.trial import Report, Soak

_FOLDER = REPOSITORY / "build" / "soak"
_ROWS = (
    "a tiny model",
    "a real model of floats",
    "a real model of 8 or 4 bits",
    "two models under one Budget",
    "set_budget in between",
    "several callers",
    "generation",
)


def lines(reports: Iterable[Report]) -> list[Line]:
    """The table of all runs."""
    found = list(reports)

    def line(name: str, outcome: str, recovered: str, of: list[Report], runs: int | None = None) -> Line:
        count = len(of) if runs is None else runs
        return Line(
            fault=name, outcome=outcome, recovered=recovered, runs=count, failures=sum(bool(r.failures) for r in of)
        )

    answers = sum(one.answers for one in found)
    held = sum(peak <= budget for one in found for budget, peak in one.peaks)
    right = f"peak <= budget in each of {held:,} processes; the others were refused before they loaded"
    refused = [one for one in found if one.refusals]
    return [
        line("a random budget, all runs", right, f"{answers:,} answers equal to those without a limit", found),
        line(
            "a budget that is too small, at load or for a call",
            "BudgetError that names what is needed",
            "a new process with that budget is not refused there",
            refused,
            sum(one.refusals for one in refused),
        ),
        *(
            line(f"of these: {name}", "the same", "the same", [one for one in found if name in one.tags])
            for name in _ROWS
        ),
    ]


def main() -> int:
    """Run until the time or the number of runs is over. Returns 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, help="end after this time")
    parser.add_argument("--runs", type=int, help="end after this many runs; default: 20, or no end with --hours")
    parser.add_argument("--seed", type=int, help="the first; default: the one after the last of the results")
    parser.add_argument(
        "--results", type=Path, default=_FOLDER / "runs.jsonl", help="a JSON line is added for each run"
    )
    parser.add_argument("--short", action="store_true", help="tiny models only")
    parser.add_argument("--keep", action="store_true", help="write the counts of all results to docs/reliability.md")
    given = parser.parse_args()
    before = _read(given.results)
    first = given.seed if given.seed is not None else max((one.seed for one in before), default=-1) + 1
    runs = given.runs if given.runs is not None else None if given.hours else 20
    end_s = time.monotonic() + given.hours * 3600 if given.hours else math.inf
    found: list[Report] = []
    if runs != 0:
        models = available(short=given.short)
        known = {name: one for name, (one, _) in models.items()}
        soak = Soak(models, _FOLDER / "cache")
        given.results.parent.mkdir(parents=True, exist_ok=True)
        try:
            for seed in itertools.count(first) if runs is None else range(first, first + runs):
                begin_s = time.monotonic()
                if begin_s > end_s:
                    break
                report = soak.run(draw(seed, known))
                report = msgspec.structs.replace(report, seconds=round(time.monotonic() - begin_s, 2))
                found.append(report)
                with given.results.open("ab") as file:
                    file.write(msgspec.json.encode(report) + b"\n")
                _tell(report, given.short)
        finally:
            soak.unlimited.close()
    reports = [*before, *found] if given.keep else found
    for line in lines(reports):
        print(f"{line.runs:7,} {line.failures:5,}  {line.fault}: {line.outcome}; {line.recovered}")
    if given.keep:
        command = f"python -m tests.soak --runs {len(reports)} --keep"
        keep("soak", command, sum(one.seconds for one in reports), lines(reports))
    return int(any(one.failures for one in found))


def _read(path: Path) -> list[Report]:
    if not path.exists():
        return []
    return [msgspec.json.decode(line, type=Report) for line in path.read_bytes().splitlines()]


def _tell(report: Report, short: bool) -> None:
    for failure in report.failures:
        replay = f"python -m tests.soak --seed {report.seed} --runs 1{' --short' if short else ''}"
        print(f"FAILED {'+'.join(report.models)}: {failure}\n  {replay}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
