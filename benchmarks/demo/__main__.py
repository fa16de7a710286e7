"""`make demo`: export two real models, run each under a memory cap, and compare with single-session ONNX Runtime.

Each contender runs in a process of its own, in a memory cgroup where this user may make one; its answers are
checked against single-session ONNX Runtime before any number is printed. `--save` keeps the records in results/,
`--only-export` ends before anything is measured.

A cap holds whether or not other processes have paid for the libraries' pages already: pipeload's budget, which counts
all of them, lies below it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.capped import CappedCase
from benchmarks.models import exported, weight_bytes
from pipeload.bench import cgroup
from pipeload.bench.launch import run_contender
from pipeload.bench.record import Run
from pipeload.bench.spec import Result, Spec
from pipeload.machine.sizes import format_bytes

RESULTS = Path(__file__).with_name("results")
_RUNS = 3
_KERNEL_BYTES = 4_000_000
"""Bytes that the kernel charges to a cgroup beside the memory of its processes."""
_MEASURED = """\
First answer: from opening the model, its files on the disk and not in the page cache, to its first answer.
Peak memory: what the cgroup was charged, or the RSS where that is more: it counts libraries in any case.
Times are medians of three runs, peaks the highest; the contenders take turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case(CappedCase):
    """One model of the demo.

    Attributes:
        title: its name in the output.
    """

    title: str

    @property
    def budget(self) -> str:
        """The memory budget that pipeload is given."""
        return f"{self.cap_bytes - _KERNEL_BYTES}"


CASES = (
    Case(
        name="minilm",
        title="all-MiniLM-L6-v2",
        task="embed",
        cap_bytes=128_000_000,
        texts=("A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."),
        sizes={"sequence_length": 32},
        passes=6,
    ),
    Case(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct",
        task="generate",
        cap_bytes=148_000_000,
        texts=("The capital of France is",),
        passes=4,
    ),
)


def main() -> int:
    console = Console(width=110)
    refusal = cgroup.permitted()
    if refusal:
        console.print(f"No memory cgroup ({refusal}): budgets are kept by pipeload alone, peaks are those of RSS.")
    for case in CASES:
        exported(case.name, console)
    if "--only-export" in sys.argv:
        return 0
    # What exports still have to write would slow down those who read first.
    os.sync()
    records = []
    for case in CASES:
        records += _compare(case, capped=refusal is None, console=console)
    console.print(_MEASURED)
    if "--save" in sys.argv:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "demo.json").write_text(json.dumps(records, indent=1) + "\n")
    return 0 if all(record["ok"] for record in records) else 1


def _compare(case: Case, *, capped: bool, console: Console) -> list[dict[str, Any]]:
    work = case.work("single", console)
    weights = weight_bytes(work.directory)
    contenders: list[tuple[str, Spec, int | None]] = [
        (
            "pipeload",
            replace(work, contender="pipeload", budget=case.budget),
            case.cap_bytes if capped else None,
        ),
        ("single session", work, None),
    ]
    if capped:
        contenders.append(("single session, same cap", work, case.cap_bytes))
    runs: dict[str, list[Run]] = {name: [] for name, *_ in contenders}
    # One after another and again, so that none meets another machine than the others do.
    for number in range(_RUNS):
        for name, spec, cap in contenders:
            if not number or not runs[name][0].killed:
                runs[name].append(run_contender(spec, memory_bytes=cap, grouped=capped, timeout_s=600))
    records = []
    for name, _, cap in contenders:
        results = [run.result or Result(error=run.message) for run in runs[name]]
        record: dict[str, Any] = {"model": case.name, "contender": name, "weight_bytes": weights, "cap_bytes": cap}
        peaks = [
            max(run.peak_bytes or 0, result.peak_rss_bytes) for run, result in zip(runs[name], results, strict=True)
        ]
        message = next((result.error for result in results if result.error), None)
        record |= {"peak_bytes": max(peaks) or None, "killed": runs[name][0].killed, "message": message}
        if message is None:
            first = [result.first_s or 0.0 for result in results]
            record |= {
                "answer": results[0].answer,
                "same": all(result.answer == results[0].answer for result in results),
                "first_s": statistics.median(first),
                "first_each_s": first,
                "steady_s": statistics.median(statistics.median(result.passes_s) for result in results),
                "passes_s": [list(result.passes_s) for result in results],
            }
        elif not record["killed"]:
            console.print(f"{name}: {message}", markup=False)
        records.append(record)
    reference = next(r for r in records if r["contender"] == "single session")
    for record in records:
        # A contender that the kernel killed has no answer to be wrong about; pipeload must have one.
        answered = record.get("same", False) and record["answer"] == reference.get("answer")
        record["ok"] = answered or (record["killed"] and "same cap" in str(record["contender"]))
    _print(case, records, weights, console)
    return records


def _print(case: Case, records: list[dict[str, Any]], weights: int, console: Console) -> None:
    ours = records[0]
    if case.task == "embed" and "answer" in ours:
        console.print(f"\n[bold]{case.title}[/bold]: cosine similarity of three sentences")
        for sentence, row in zip(case.texts, ours["answer"], strict=True):
            console.print("  " + "  ".join(f"{value:7.4f}" for value in row) + f"   {sentence}")
    elif "answer" in ours:
        console.print(f"\n[bold]{case.title}[/bold]: {case.texts[0]}[bold]{ours['answer']}[/bold]")
    table = Table(title=f"{case.title}, weights {format_bytes(weights)}", title_justify="left")
    for column in ("contender", "cap", "peak memory", "first answer", "steady pass", "same answer"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for record in records:
        peak = record["peak_bytes"]
        cap = format_bytes(record["cap_bytes"]) if record["cap_bytes"] else "none"
        if "answer" in record:
            times = [
                f"{record['first_s']:.2f} s",
                f"{record['steady_s'] * 1000:.0f} ms",
                "yes" if record["ok"] else "NO",
            ]
        else:
            times = ["killed" if record["killed"] else "failed", "-", "-"]
        table.add_row(record["contender"], cap, format_bytes(peak) if peak else "-", *times)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
