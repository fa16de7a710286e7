"""What a row of the table is, and what all rows share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.models import REPOSITORY, made_once
from tests.system.processes import Ended, Told

__all__ = ["Finding", "Row", "always", "judge", "one_error", "real", "same", "tiny"]

_CLOSE = 1e-4


@dataclass(slots=True)
class Finding:
    """What came of trying a row.

    Attributes:
        runs: how often it was tried.
        failures: the promises that were broken, in words.
    """

    runs: int = 0
    failures: list[str] = field(default_factory=list)

    def expect(self, holds: object, words: str) -> None:
        """Note a broken promise, unless it holds."""
        if not holds:
            self.failures.append(words)


def always() -> str | None:
    """No machine lacks what the row needs."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A fault of the system that is made, and what must come of it.

    Attributes:
        name: for the command line.
        fault, outcome, recovered: see `tests.proof.counts.Line`.
        make: tries it in an empty folder.
        slow: it takes more than a few seconds.
        long: it takes a minute or more; only the command tries it, and `make test-survey`.
        lacks: why this machine cannot try it; None where it can.
    """

    name: str
    fault: str
    outcome: str
    recovered: str
    make: Callable[[Path], Finding]
    slow: bool = False
    long: bool = False
    lacks: Callable[[], str | None] = always


def tiny(name: str) -> Path:
    """A tiny model of a real architecture."""
    return made_once(name) / name


def real(name: str) -> Path:
    """A real model that `make demo` exports."""
    return REPOSITORY / "models" / "exported" / name


def lacks_real(name: str) -> Callable[[], str | None]:
    """Why a row that needs a real model cannot be tried."""
    return lambda: None if (real(name) / "pipeload.json").exists() else f"needs {name}, which make demo exports"


def same(actual: object, expected: list[float]) -> bool:
    """Whether two answers agree but for the rounding of another layout of the weights."""
    if not isinstance(actual, list) or len(actual) != len(expected):
        return False
    scale = max(map(abs, expected), default=0) or 1.0
    return all(
        math.isclose(one, two, rel_tol=0, abs_tol=_CLOSE * scale) for one, two in zip(actual, expected, strict=True)
    )


def judge(found: Finding, told: Told, expected: list[float], words: str) -> bool:
    """Hold a call's answer against the right one: it is right, or an error that says what, and what helps.

    Returns whether it was answered.
    """
    if told.error:
        kind, message = told.error
        # The fact, and the remedy: two sentences.
        found.expect(
            re.search(r"\w.*\. \w", message) and message.endswith("."), f"{words}: {kind} is no message: {message}"
        )
        return False
    found.expect(same(told.result, expected), f"{words}: a wrong answer")
    return True


def one_error(found: Finding, ended: Ended, words: str) -> bool:
    """Hold the end of a command against the promise: it succeeds, or prints one error and no traceback.

    Returns whether it succeeded.
    """
    if ended.code == 0:
        return True
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    found.expect("Traceback" not in ended.stderr, f"{words}: a traceback: {ended.stderr[-300:]}")
    if errors:
        found.expect(ended.code in (1, 2), f"{words}: exit code {ended.code}: {ended.stderr[-300:]}")
    # Where the C library or an interpreter's library cannot begin, it ends the process by itself, with a line.
    found.expect(len(errors or lines) == 1, f"{words}: {len(errors)} errors: {ended.stderr[-300:]}")
    return False
