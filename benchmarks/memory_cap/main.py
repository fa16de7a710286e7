"""`python -m benchmarks.memory_cap.main [MODEL ...]`: large models under a memory cgroup, page cache included.

Each model is exported first if it is missing. The output under the cap is checked against the unsplit graph, which
plain onnxruntime runs without a cap, before anything is printed.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.capped import CappedCase
from benchmarks.models import weight_bytes
from pipeload.bench import cgroup
from pipeload.bench.launch import run_contender
from pipeload.bench.machine import machine_facts
from pipeload.bench.record import TOLERANCE, max_error
from pipeload.bench.spec import to_json
from pipeload.machine.sizes import format_bytes

RESULTS = Path(__file__).with_name("results")


CASES = (
    CappedCase(name="bert-large", cap_bytes=256_000_000, sizes={"sequence_length": 128}, passes=3),
    CappedCase(name="vit-large", cap_bytes=256_000_000, passes=3),
    # Seeded weights have a vocabulary but no tokenizer: the prompt is "The capital of France is" in GPT-2's ids.
    CappedCase(name="gpt2-xl", cap_bytes=512_000_000, task="generate", prompt=(464, 3139, 286, 4881, 318), passes=4),
)


def main() -> int:
    console = Console(width=120)
    if refusal := cgroup.permitted():
        console.print(f"This benchmark needs memory cgroups: {refusal}")
        return 2
    wanted = sys.argv[1:] or [case.name for case in CASES]
    records = [_measure(case, console) for case in CASES if case.name in wanted]
    table = Table("model", "weights", "cap", "peak, cache included", "first", "steady", "max error", "ok")
    for record in records:
        sizes = [format_bytes(record[name]) for name in ("weight_bytes", "cap_bytes", "peak_bytes")]
        times = [f"{record['first_s']:.2f} s", f"{record['steady_s']:.2f} s"]
        rest = [f"{record['max_error']:.1e}", str(record["ok"])]
        table.add_row(record["model"], *sizes, *times, *rest)
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    for record in records:
        (RESULTS / f"{record['model']}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(record["ok"] for record in records) else 1


def _measure(case: CappedCase, console: Console) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="pipeload-cap-") as folder:
        expected, got = Path(folder) / "expected.npz", Path(folder) / "got.npz"
        work = replace(case.work("mmap", console), outputs=expected)
        reference = run_contender(work, timeout_s=1800)
        run = run_contender(
            replace(work, contender="pipeload", outputs=got), memory_bytes=case.cap_bytes, timeout_s=1800
        )
        for name, each in (("the reference", reference), ("pipeload", run)):
            if each.result is None or each.result.error:
                raise SystemExit(f"{case.name}: {name}: {each.message or (each.result and each.result.error)}")
        error = max_error(expected, got)
    assert run.result is not None
    assert run.peak_bytes is not None
    told: dict[str, Any] = json.loads(to_json(run.result))
    return told | {
        "model": case.name,
        "steady_s": statistics.median(run.result.passes_s),
        "weight_bytes": weight_bytes(work.directory),
        "cap_bytes": case.cap_bytes,
        "peak_bytes": run.peak_bytes,
        "max_error": error,
        "ok": error <= TOLERANCE and run.peak_bytes <= case.cap_bytes and not run.killed,
        "machine": machine_facts(),
    }


if __name__ == "__main__":
    sys.exit(main())
