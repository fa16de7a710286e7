"""All points of an operation: n = 1, 2, 3 ... until a run passes untouched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import Any

from tests.faults.injector import FAULTS, Injector
from tests.faults.operations import OPERATIONS, Operation
from tests.faults.trial import Result, attempt

__all__ = ["Cell", "Untouched", "all_points", "some_points", "untouched", "walk"]


@dataclass(slots=True, kw_only=True)
class Cell:
    """One operation and one kind of event.

    Attributes:
        operation, kind: their names.
        tried: faults that came.
        outcomes: what callers saw, and how often.
        failures: command that tries it again -> promises that were broken.
    """

    operation: str
    kind: str
    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Untouched:
    """A call that nothing disturbs.

    Attributes:
        answer: its answer.
        counts: kind -> the number of its events.
        looks: numbers of the events of `interrupt` that are the first or the last at their instruction, in order.
    """

    answer: Any
    counts: Mapping[str, int]
    looks: Sequence[int]


def untouched(operation: Operation, models: Path) -> Untouched:
    """The answer and the events of a call that nothing disturbs."""
    for _ in range(2):  # the first one may bring in what stays
        injector = Injector()
        result = attempt(operation, injector, models, None)
        if result.failures:
            raise AssertionError(f"{operation.name} breaks a promise without a fault: {result.failures}")
    looks = sorted({number for pair in injector.looks.values() for number in pair})
    return Untouched(answer=result.answer, counts=injector.counts, looks=looks)


def walk(
    cell: Cell,
    models: Path,
    found: Untouched,
    points: Iterable[tuple[str, int]],
) -> Iterator[Result]:
    """Try the points of one kind, one after another.

    Args:
        cell: says which operation and kind, and gets what comes of it.
        models: see `prepare`.
        found: see `untouched`.
        points: a way of failing, and the number of the event, for each try; see `all_points`.

    Yields:
        Each try.
    """
    operation, kind = OPERATIONS[cell.operation], cell.kind
    for fault, number in points:
        result = attempt(operation, Injector(kind=kind, fault=fault, at=number), models, found.answer)
        cell.tried += result.fired
        cell.outcomes[result.outcome] += result.fired
        if result.failures:
            again = f"python -m tests.faults {operation.name} --kind {kind} --fault '{fault}' --at {number}"
            cell.failures[again] = f"{result.place}: {'; '.join(result.failures)}"
        yield result


def all_points(cell: Cell, faults: Sequence[str], every: int = 1) -> Iterator[tuple[str, int]]:
    """Each way of failing at n = 1, 2, 3 ... until a run passes untouched; or at each `every`-th of these."""
    for fault in faults:
        for number in count(1, every):
            tried = cell.tried
            yield fault, number
            if cell.tried == tried:
                break


def some_points(kind: str, found: Untouched, most: int) -> Iterator[tuple[str, int]]:
    """At most this many events, evenly spread from the first to the last, and the ways of failing in turn."""
    events = found.looks if kind == "interrupt" else range(1, 1 + found.counts.get(kind, 0))
    places = sorted({place * (len(events) - 1) // max(1, most - 1) for place in range(most)}) if events else []
    return zip(cycle(FAULTS[kind]), [events[place] for place in places], strict=False)
