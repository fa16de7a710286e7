"""python -m tests.simulation [--seed N | --seeds N | --seconds S | --exhaustive | --planted] [--keep]

--seed N       replay one run, and print the schedule's steps: thread, operation
--seeds N      N runs, from a base that is printed, or given by --from
--seconds S    runs for that time, then those that find the planted faults; the form for CI
--exhaustive   every schedule of the smallest systems, within the bound that exhaustive.py states (--delays)
--planted      search for each planted fault, from seed 0 on
--keep         write the counts down; these may stand together then
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.proof.counts import Line, keep
from tests.simulation import exhaustive
from tests.simulation.planted import PLANTED
from tests.simulation.run import Outcome, run
from tests.simulation.scenario import draw
from tests.simulation.seam import installed

_COLLECT = 50
"""Runs from one garbage collection to the next: none happens within a run, where it would depend on those before."""
_CHUNK = 500
"""Random runs from one note of the counts to the next."""
_MOST_SEEDS = 10_000
"""A planted fault must be found within these."""
_INSTALLED = ExitStack()
"""Of a worker, for its whole life."""
_FAULTS = ("no fault", "faults of disk, memory, threads or callbacks")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", usage=__doc__)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--from", type=int, dest="base")
    parser.add_argument("--exhaustive", action="store_true")
    parser.add_argument("--delays", type=int, default=1)
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    if options.seed is not None:
        with installed():
            return _replay(options.seed)
    begin_s = time.monotonic()
    base = time.time_ns() // 1_000_000 % 10**9 if options.base is None else options.base
    lines: list[Line] = []
    # One thread of a run runs at a time, so there is a process for each processor.
    processors = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    with context.Pool(len(processors), _begin_worker, (context.Value("i"), processors)) as pool:

        def spread(work: Callable[[_Part], Any]) -> list[Any]:
            return pool.map(work, [_Part(number, len(processors)) for number in range(len(processors))], 1)

        def note(so_far: list[Line]) -> None:
            # A long form that is ended early has kept the counts of what it had finished.
            if options.keep:
                command = " ".join(["python -m tests.simulation", *sys.argv[1:]])
                keep("simulation", command, time.monotonic() - begin_s, so_far)

        if options.planted or options.seconds:
            lines += pool.map(partial(_planted, search=options.planted), PLANTED, 1)
            note(lines)
        if options.exhaustive:
            for name in exhaustive.SYSTEMS:
                # Without an act there is time for one delay more.
                delays = options.delays + (not exhaustive.SYSTEMS[name].acts)
                lines.append(_line(name, delays, spread(partial(_exhaustive, name, delays))))
                note(lines)
        if options.seeds or options.seconds:
            print(f"base {base}", flush=True)
            tallies: list[_Tally] = []
            for begin in range(0, options.seeds or 1, _CHUNK):
                seeds = options.seeds and min(_CHUNK, options.seeds - begin)
                tallies += spread(partial(_random, base + begin, seeds, options.seconds))
                note([*_lines(tallies), *lines])
            lines += _lines(tallies)
            _print(tallies)
    return int(any(line.failures for line in lines))


@dataclass(frozen=True)
class _Part:
    """One of several equal parts of a work."""

    number: int
    of: int


def _begin_worker(count: Any, processors: list[int]) -> None:
    """Stand-ins are in their places for good; handing over costs least on one processor."""
    with count.get_lock():
        os.sched_setaffinity(0, {processors[count.value % len(processors)]})
        count.value += 1
    gc.disable()
    _INSTALLED.enter_context(installed())


def _replay(seed: int) -> int:
    scenario = draw(seed)
    print(scenario)
    outcome = run(scenario, seed, keep_steps=True)
    for number, (thread, operation) in enumerate(outcome.log, 1):
        print(f"{number:6} {thread:20} {operation}")
    print(outcome.failure or f"every promise was kept: {dict(outcome.ends)}, faults: {dict(outcome.faults)}")
    return int(outcome.failure is not None)


@dataclass
class _Tally:
    runs: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


def _random(base: int, seeds: int | None, seconds: float | None, part: _Part) -> _Tally:
    end_s = float("inf") if seconds is None else time.monotonic() + seconds
    tally = _Tally()
    number = part.number
    while time.monotonic() < end_s and (seeds is None or number < seeds):
        scenario = draw(base + number)
        outcome = run(scenario, base + number)
        kind = _FAULTS[bool(scenario.rates)]
        tally.runs[kind] += 1
        tally.failures[kind] += _tell(f"seed {base + number}", outcome)
        tally.steps += outcome.steps
        tally.ends += outcome.ends
        tally.faults += outcome.faults
        number += part.of
        if tally.runs.total() % _COLLECT == 0:
            gc.collect()
    return tally


def _lines(tallies: list[_Tally]) -> list[Line]:
    runs, failures = Counter[str](), Counter[str]()
    for tally in tallies:
        runs, failures = runs + tally.runs, failures + tally.failures
    none, some = _FAULTS
    return [
        Line(
            fault=f"random schedules and systems, {none}",
            outcome="the right answer, or ClosedError or BudgetError where a close, a leave or memory has caused it",
            recovered="answers, until it is closed; then nothing is left",
            runs=runs[none],
            failures=failures[none],
        ),
        Line(
            fault=f"random schedules and systems, {some}",
            outcome="the same, or the fault as an error of pipeload",
            recovered="answers again, or is closed for good; then nothing is left",
            runs=runs[some],
            failures=failures[some],
        ),
    ]


def _print(tallies: list[_Tally]) -> None:
    """How calls ended, and the faults that were made."""
    ends, faults = Counter[str](), Counter[str]()
    for tally in tallies:
        ends, faults = ends + tally.ends, faults + tally.faults
    runs, steps = sum(tally.runs.total() for tally in tallies), sum(tally.steps for tally in tallies)
    print(f"{runs:,} runs, {steps:,} steps\nends: {dict(ends.most_common())}")
    print(f"faults: {dict(faults.most_common())}", flush=True)


def _exhaustive(name: str, delays: int, part: _Part) -> tuple[int, int]:
    """The number of schedules, and of those that failed."""
    failures = 0

    def seen(scenario: object, delays: object, outcome: Outcome) -> None:
        nonlocal failures
        failures += _tell(f"{scenario}, delays {delays}", outcome)
        if outcome.failure:
            gc.collect()

    return exhaustive.schedules(exhaustive.SYSTEMS[name], delays, seen, part.number, part.of), failures


def _line(name: str, delays: int, found: list[tuple[int, int]]) -> Line:
    count = sum(schedules for schedules, _ in found)
    print(f"{name}: {count:,} schedules", flush=True)
    return Line(
        fault=f"every schedule with at most {delays} delay{'s' * (delays != 1)}: {name}",
        outcome="the right answer, or ClosedError where a close or leave has caused it",
        recovered="answers, until it is closed; then nothing is left",
        runs=count,
        failures=sum(failures for _, failures in found),
    )


def _planted(name: str, *, search: bool) -> Line:
    planted = PLANTED[name]
    seeds = range(_MOST_SEEDS) if search else range(planted.found_by, planted.found_by + 1)
    first = next((seed for seed in seeds if planted.finds(seed)), None)
    print(f"planted fault '{name}': found by seed {first}", flush=True)
    return Line(
        fault=f"planted: {planted.fault}",
        outcome="not found" if first is None else f"found by seed {first}",
        recovered="-",
        runs=len(seeds) if first is None else first + 1 - seeds[0],
        failures=int(first is None),
    )


def _tell(which: str, outcome: Outcome) -> int:
    if outcome.failure is None:
        return 0
    print(f"{which}: {outcome.failure.splitlines()[0]}", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
