"""All points of an operation: n = 1, 2, 3 ... until a run passes untouched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.injector import FAULTS, Injector
from tests.faults.operations import OPERATIONS, Operation
from tests.faults.trial import Result, attempt

__all__ = ["Cell", "answer_of", "walk"]


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


def answer_of(operation: Operation, models: Path) -> Any:
    """The answer of a call that nothing disturbs."""
    result = attempt(operation, Injector(kind="none"), models, None)
    if result.failures:
        raise AssertionError(f"{operation.name} breaks a promise without a fault: {result.failures}")
    return result.outcome


def walk(
    cell: Cell,
    models: Path,
    answer: Any,
    *,
    points: Callable[[int], Sequence[int]] | None = None,
    faults: Sequence[str] = (),
) -> Iterator[Result]:
    """Try the points of one kind, one after another.

    Args:
        cell: says which operation and kind, and gets what comes of it.
        models: see `prepare`.
        answer: see `answer_of`.
        points: number of events -> those that are tried; None tries all, until one does not come.
        faults: ways of failing; none given are all.

    Yields:
        Each try.
    """
    operation, kind = OPERATIONS[cell.operation], cell.kind
    for fault in faults or FAULTS[kind]:
        numbers: Iterator[int] | Sequence[int]
        if points is None:
            numbers = iter(range(1, 1_000_000))
        else:
            numbers = points(attempt(operation, Injector(kind=kind), models, answer).count)
        for number in numbers:
            result = attempt(operation, Injector(kind=kind, fault=fault, at=number), models, answer)
            if not result.fired and points is None:
                break
            cell.tried += result.fired
            cell.outcomes[result.outcome] += result.fired
            if result.failures:
                again = f"python -m tests.faults {operation.name} --kind {kind} --fault '{fault}' --at {number}"
                cell.failures[again] = f"{result.place}: {'; '.join(result.failures)}"
            yield result
