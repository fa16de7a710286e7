"""`make demo`: export two real models, run each under a memory cap, and compare with single-session ONNX Runtime.

Each contender runs in a process of its own, in a memory cgroup where this user may make one; its answers are
checked against single-session ONNX Runtime before any number is printed. `--save` keeps the records in results/.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import pipeload_export
from benchmarks import cgroup
from pipeload import manifest as manifests
from pipeload.memory import format_bytes

ROOT = Path(__file__).resolve().parents[2]
EXPORTED = ROOT / "models" / "exported"
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model of the demo.

    Attributes:
        name: its recipe in models/catalog.toml.
        title: what it is called in the output.
        task: what the contenders do with it.
        cap_bytes: the cgroup's limit.
        budget: what pipeload gets where there is no cgroup: counts shared libraries, which a cgroup may not.
        options: for pipeload: what to plan for.
    """

    name: str
    title: str
    task: str
    cap_bytes: int
    budget: str
    options: tuple[str, ...]


CASES = (
    Case(
        name="minilm",
        title="all-MiniLM-L6-v2",
        task="embed",
        cap_bytes=76_000_000,
        budget="120MB",
        options=("--size", "sequence_length=32"),
    ),
    Case(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct",
        task="generate",
        cap_bytes=200_000_000,
        budget="240MB",
        options=(),
    ),
)


def main() -> int:
    console = Console(width=100)
    refusal = cgroup.permitted()
    if refusal:
        console.print(f"No memory cgroup ({refusal}): budgets are kept by pipeload alone, peaks are those of RSS.")
    records = []
    for case in CASES:
        directory, onnx = _export(case, console)
        records += _compare(case, directory, onnx, capped=refusal is None, console=console)
    if "--save" in sys.argv:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "demo.json").write_text(json.dumps(records, indent=1) + "\n")
    return 0 if all(record["ok"] for record in records) else 1


def _export(case: Case, console: Console) -> tuple[Path, Path]:
    """The sharded directory and the unsplit graph, made if they are missing."""
    directory, unsplit = EXPORTED / case.name, EXPORTED / f"{case.name}-unsplit"
    if not (directory / manifests.MANIFEST_NAME).exists() or not unsplit.exists():
        console.print(f"Exporting {case.title} to {directory.relative_to(ROOT)} ...")
        pipeload_export.export(f"catalog:{case.name}", directory, keep_onnx=unsplit, force=True)
    return directory, next(unsplit.glob("*.onnx"))


def _compare(case: Case, directory: Path, onnx: Path, *, capped: bool, console: Console) -> list[dict[str, Any]]:
    weights = sum(path.stat().st_size for path in (directory / "shards").glob("*.safetensors"))
    contenders = [
        (
            "pipeload",
            ["pipeload", "--budget", "auto" if capped else case.budget, *case.options],
            case.cap_bytes if capped else None,
        ),
        ("single session", ["single"], None),
    ]
    if capped:
        contenders.append(("single session, same cap", ["single"], case.cap_bytes))
    records = []
    for name, (engine, *options), cap in contenders:
        cgroup.evict([onnx, *onnx.parent.glob("*.onnx_data*"), *(directory / "shards").iterdir()])
        command = [sys.executable, "-m", "benchmarks.contender", engine, str(directory), case.task, "--onnx", str(onnx)]
        outcome = (
            cgroup.run([*command, *options], memory_bytes=cap, timeout_s=600) if capped else _plain(command, options)
        )
        record = {"model": case.name, "contender": name, "weight_bytes": weights, "cap_bytes": cap}
        record |= {"returncode": outcome.returncode, "peak_bytes": outcome.peak_bytes, "oom_kills": outcome.oom_kills}
        if outcome.returncode == 0:
            record |= json.loads(outcome.stdout)
        elif not outcome.oom_kills:
            console.print(outcome.stderr)
        records.append(record)
    reference = next(r for r in records if r["contender"] == "single session")
    for record in records:
        # A contender that the kernel killed has no answer to be wrong about; pipeload must have one.
        record["ok"] = record.get("answer") == reference["answer"] or (
            _killed(record) and "same cap" in record["contender"]
        )
    _print(case, records, weights, console)
    return records


def _killed(record: dict[str, Any]) -> bool:
    """The kernel killed the contender for memory."""
    return bool(record["oom_kills"])


def _plain(command: list[str], options: list[str]) -> cgroup.Outcome:
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600, check=False)
    return cgroup.Outcome(
        returncode=done.returncode, stdout=done.stdout, stderr=done.stderr, peak_bytes=None, oom_kills=None
    )


def _print(case: Case, records: list[dict[str, Any]], weights: int, console: Console) -> None:
    ours = records[0]
    if case.task == "embed" and "answer" in ours:
        console.print(f"\n[bold]{case.title}[/bold]: cosine similarity of three sentences")
        from benchmarks.contender import SENTENCES

        for sentence, row in zip(SENTENCES, ours["answer"], strict=True):
            console.print("  " + "  ".join(f"{value:7.4f}" for value in row) + f"   {sentence}")
    elif "answer" in ours:
        from benchmarks.contender import PROMPT

        console.print(f"\n[bold]{case.title}[/bold]: {PROMPT}[bold]{ours['answer']}[/bold]")
    table = Table(title=f"{case.title}, weights {format_bytes(weights)}", title_justify="left")
    for column in ("contender", "cap", "peak memory", "first answer", "steady pass", "same answer"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for record in records:
        peak = record["peak_bytes"] or record.get("peak_rss_bytes")
        cap = format_bytes(record["cap_bytes"]) if record["cap_bytes"] else "none"
        if "answer" in record:
            times = [
                f"{record['first_s']:.2f} s",
                f"{record['steady_s'] * 1000:.0f} ms",
                "yes" if record["ok"] else "NO",
            ]
        else:
            times = ["killed" if _killed(record) else f"exit {record['returncode']}", "-", "-"]
        table.add_row(record["contender"], cap, format_bytes(peak) if peak else "-", *times)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
