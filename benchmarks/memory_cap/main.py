"""`python -m benchmarks.memory_cap.main [MODEL ...]`: large models under a memory cgroup, page cache included.

Each model is exported first if it is missing. The output under the cap is checked against the unsplit graph, which
plain onnxruntime runs without a cap, before anything is printed.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

import pipeload_export
from benchmarks import cgroup
from pipeload import manifest as manifests
from pipeload.memory import format_bytes

ROOT = Path(__file__).resolve().parents[2]
EXPORTED = ROOT / "models" / "exported"
RESULTS = Path(__file__).with_name("results")
TOLERANCE = 1e-4
"""Of the output's range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, a cap, and what to run."""

    name: str
    cap_bytes: int
    task: tuple[str, ...]


CASES = (
    Case(name="bert-large", cap_bytes=256_000_000, task=("run", "--size", "sequence_length=128")),
    Case(
        name="vit-large",
        cap_bytes=256_000_000,
        task=("run", "--size", "num_channels=3", "--size", "height=224", "--size", "width=224"),
    ),
    Case(name="gpt2-xl", cap_bytes=512_000_000, task=("generate", "--tokens", "4")),
)


def main() -> int:
    console = Console(width=120)
    if refusal := cgroup.permitted():
        console.print(f"This benchmark needs memory cgroups: {refusal}")
        return 2
    wanted = sys.argv[1:] or [case.name for case in CASES]
    records = [_measure(case, console) for case in CASES if case.name in wanted]
    table = Table("model", "weights", "cap", "peak, cache included", "OOM kills", "first", "steady", "max error", "ok")
    for record in records:
        sizes = [format_bytes(record[name]) for name in ("weight_bytes", "cap_bytes", "peak_bytes")]
        times = [f"{record['first_s']:.2f} s", f"{record['steady_s']:.2f} s"]
        rest = [f"{record['max_error']:.1e}", str(record["ok"])]
        table.add_row(record["model"], *sizes, str(record["oom_kills"]), *times, *rest)
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    for record in records:
        (RESULTS / f"{record['model']}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(record["ok"] for record in records) else 1


def _measure(case: Case, console: Console) -> dict[str, Any]:
    directory, unsplit = EXPORTED / case.name, EXPORTED / f"{case.name}-unsplit"
    if not (directory / manifests.MANIFEST_NAME).exists() or not unsplit.exists():
        console.print(f"Exporting {case.name} ...")
        pipeload_export.export(f"catalog:{case.name}", directory, keep_onnx=unsplit, force=True)
    onnx = next(unsplit.glob("*.onnx"))
    expected, got = unsplit / "expected.npz", unsplit / "got.npz"
    command = [sys.executable, "-m", "benchmarks.contender"]
    tail = [str(directory), *case.task, "--passes", "3"]
    reference = cgroup.run(
        [*command, "mapped", *tail, "--onnx", str(onnx), "--save", str(expected)], memory_bytes=None, timeout_s=1800
    )
    if reference.returncode:
        raise SystemExit(reference.stderr)
    cgroup.evict([*(directory / "shards").iterdir()])
    outcome = cgroup.run(
        [*command, "pipeload", *tail, "--budget", "auto", "--save", str(got)],
        memory_bytes=case.cap_bytes,
        timeout_s=1800,
    )
    if outcome.returncode:
        raise SystemExit(f"{case.name}: exit {outcome.returncode}, {outcome.oom_kills} OOM kills\n{outcome.stderr}")
    error = _max_error(expected, got)
    assert outcome.peak_bytes is not None
    return json.loads(outcome.stdout) | {
        "model": case.name,
        "weight_bytes": sum(path.stat().st_size for path in (directory / "shards").glob("*.safetensors")),
        "cap_bytes": case.cap_bytes,
        "peak_bytes": outcome.peak_bytes,
        "oom_kills": outcome.oom_kills,
        "max_error": error,
        "ok": error <= TOLERANCE and outcome.peak_bytes <= case.cap_bytes and not outcome.oom_kills,
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "onnxruntime": ort.__version__,
    }


def _max_error(expected: Path, got: Path) -> float:
    """The worst difference over all outputs, as a part of the output's range; for token ids 0 or infinity."""
    worst = 0.0
    with np.load(expected) as wanted, np.load(got) as found:
        for name in wanted.files:
            if wanted[name].dtype.kind in "iu":
                worst = max(worst, 0.0 if np.array_equal(wanted[name], found[name]) else float("inf"))
            elif not np.isfinite(found[name]).all():
                worst = float("inf")
            else:
                span = float(wanted[name].max() - wanted[name].min())
                worst = max(worst, float(np.abs(wanted[name] - found[name]).max()) / span)
    return worst


if __name__ == "__main__":
    sys.exit(main())
