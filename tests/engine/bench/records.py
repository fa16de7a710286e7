"""Records of runs that never ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeload.bench.bound import Bounds
from pipeload.bench.harness import Report, Settings
from pipeload.bench.record import Job, Record, Run, summarise
from pipeload.bench.spec import Result, Unsplit

BOUNDS = Bounds(first_s=2.0, steady_s=1.0)


def record_of(
    contender: Any = "pipeload",
    *,
    seconds: float | None = 2.0,
    budget: int | None = 10**9,
    disk: int | None = None,
    loaders: int | None = None,
    run: Run | None = None,
) -> Record:
    job = Job(contender=contender, budget_bytes=budget, disk_bytes_per_s=disk, loaders=loaders)
    return summarise("some-model", job, [run or run_of(seconds)], BOUNDS)


def run_of(seconds: float | None = 2.0) -> Run:
    samples = tuple((number * 0.05, number * 10_000_000) for number in range(40))
    if seconds is None:
        return Run(result=None, peak_bytes=1, killed=True, message="The kernel killed it.", samples=samples)
    result = Result(first_s=2 * seconds, passes_s=(seconds, seconds), read_bytes=5_000_000, peak_rss_bytes=3)
    return Run(result=result, peak_bytes=2_000_000, error=1e-7, samples=samples)


def report_of(*rows: tuple[Record, Run], settling: int = 5, passes: int = 3, refusal: str | None = None) -> Report:
    return Report(
        machine={"cores": 2, "cpu": "Some CPU", "versions": {"onnxruntime": "1.2.3"}},
        settings=Settings(
            directory=Path("some-model"),
            unsplit=Unsplit(graph=Path("g"), folder=Path("d")),
            contenders=(),
            budgets=(),
            settling=settling,
            passes=passes,
        ),
        records=tuple(record for record, _ in rows),
        runs=tuple((run,) for _, run in rows),
        refusal=refusal,
    )
