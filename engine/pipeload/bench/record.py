"""The runs of one contender in one setting -> one record, with a check of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pipeload.bench.bound import Bounds
from pipeload.bench.spec import ContenderName, Result
from pipeload.format.closeness import range_of

__all__ = ["TOLERANCE", "Job", "Record", "Run", "max_error", "summarise"]

TOLERANCE = 1e-4
"""The largest error of a right answer, as a fraction of the reference's range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One contender in one setting.

    Attributes:
        contender: its name.
        budget_bytes: the cgroup's limit, or pipeload's memory budget where there are no cgroups; None for no limit.
        disk_bytes_per_s: the throttle of reads; None for no throttle.
        loaders: the number of Loading Agents set for pipeload; None lets it choose.
    """

    contender: ContenderName
    budget_bytes: int | None
    disk_bytes_per_s: int | None
    loaders: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One process of a contender.

    Attributes:
        result: its report; None if it ended before it could report.
        peak_bytes: the cgroup's peak, page cache included; without a cgroup the peak RSS.
        killed: the kernel ended it for memory.
        message: the reason for a missing result.
        error: the worst error of its outputs, as a fraction of the reference's range; None without outputs.
        samples: (seconds, bytes in use) while it ran.
    """

    result: Result | None
    peak_bytes: int | None = None
    killed: bool = False
    message: str | None = None
    error: float | None = None
    samples: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The figures of one contender in one setting; times in seconds, None if there are none.

    Attributes:
        contender, loaders, budget_bytes, disk_bytes_per_s: see `Job`.
        model: name of the model's directory.
        first_s: from opening the model to its first answer, files cold: median over the rounds.
        steady_s: median over all steady passes.
        passes_s: the seconds of all steady passes.
        first_bound_s, bound_s: T* of the first and of a steady pass, with the weights that pipeload keeps at this
            budget.
        first_efficiency, efficiency: T* / measured.
        read_bytes: from the disk, per steady pass.
        peak_bytes: the cgroup's peak, page cache included; without a cgroup the peak RSS.
        peak_rss_bytes: of the process; counts shared libraries that may be charged to another cgroup.
        predicted_first_s, predicted_steady_s, predicted_peak_bytes: the predictions of pipeload's plan.
        resident_bytes: bytes of weights that pipeload kept between the passes.
        max_error: the worst difference from the reference, as a fraction of its range.
        ok: whether it answered, and the answers are right.
        killed: the kernel ended it for memory.
        message: the reason for a missing answer.
        answer: its answer, for a task that has a short one.
    """

    contender: ContenderName
    loaders: int | None
    model: str
    budget_bytes: int | None
    disk_bytes_per_s: int | None
    first_s: float | None
    steady_s: float | None
    passes_s: tuple[float, ...]
    first_bound_s: float | None
    bound_s: float | None
    first_efficiency: float | None
    efficiency: float | None
    read_bytes: int | None
    peak_bytes: int | None
    peak_rss_bytes: int | None
    predicted_first_s: float | None
    predicted_steady_s: float | None
    predicted_peak_bytes: int | None
    resident_bytes: int | None
    max_error: float | None
    ok: bool
    killed: bool
    message: str | None
    answer: Any = None


def summarise(model: str, job: Job, runs: Sequence[Run], limits: Bounds | None) -> Record:
    """The record of all runs of one job. One failed run makes it a failure, without times."""
    failed = next((run for run in runs if run.result is None or run.result.error), None)
    results = [run.result for run in runs if run.result is not None] if failed is None else []
    firsts = [result.first_s for result in results if result.first_s is not None]
    steadies = tuple(seconds for result in results for seconds in result.passes_s)
    errors = [run.error for run in runs if run.error is not None]
    first_s, steady_s = median(firsts) if firsts else None, median(steadies) if steadies else None
    plan = results[-1].plan if results else None
    killed = any(run.killed for run in runs)
    message = None if failed is None else failed.message or (failed.result.error if failed.result else None)
    return Record(
        contender=job.contender,
        loaders=job.loaders,
        model=model,
        budget_bytes=job.budget_bytes,
        disk_bytes_per_s=job.disk_bytes_per_s,
        first_s=first_s,
        steady_s=steady_s,
        passes_s=steadies,
        first_bound_s=limits.first_s if limits else None,
        bound_s=limits.steady_s if limits else None,
        first_efficiency=limits.first_s / first_s if limits and first_s else None,
        efficiency=limits.steady_s / steady_s if limits and steady_s else None,
        read_bytes=_median([result.read_bytes for result in results]),
        peak_bytes=_most([run.peak_bytes for run in runs]),
        peak_rss_bytes=_most([result.peak_rss_bytes for result in results]),
        predicted_first_s=plan.first_s if plan else None,
        predicted_steady_s=plan.steady_s if plan else None,
        predicted_peak_bytes=plan.peak_bytes if plan else None,
        resident_bytes=plan.resident_bytes if plan else None,
        max_error=max(errors, default=None),
        ok=failed is None and bool(errors) and len(errors) == len(runs) and max(errors) <= TOLERANCE,
        killed=killed,
        message=message,
        answer=results[-1].answer if results else None,
    )


def max_error(reference: Path, outputs: Path) -> float:
    """The worst difference over all outputs, as a fraction of the output's range; for integers 0 or infinity."""
    worst = 0.0
    with np.load(reference) as wanted, np.load(outputs) as found:
        if set(wanted.files) != set(found.files):
            return float("inf")
        for name in wanted.files:
            expected, got = wanted[name], found[name]
            if expected.shape != got.shape or not np.isfinite(got).all():
                return float("inf")
            if expected.dtype.kind in "iub":
                worst = max(worst, 0.0 if np.array_equal(expected, got) else float("inf"))
            elif expected.size:
                error = float(np.abs(expected - got).max())
                worst = max(worst, error / range_of(expected, expected.dtype.name))
    return worst


def _median(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return int(median(known)) if known else None


def _most(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
