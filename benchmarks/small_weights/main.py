"""`python -m benchmarks.small_weights.main`: weights of 16 bits beside the same ones in 32, at the same limits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.budget_sweep.main import CASES as WIDE
from benchmarks.study import main, markdown_table
from pipeload.bench.record import Record
from pipeload.bench.table import seconds
from pipeload.machine.sizes import format_bytes

CASES = tuple(
    # Of the stored bytes: a quarter, a half and three quarters of what the weights take in float32.
    replace(case, name=f"{case.name}-bf16", contenders=("pipeload", "single"), percents=(50, 100, 150), disks=(400,))
    for case in WIDE
)


def rows(records: Sequence[Record]) -> str:
    """Pipeload at every limit, against T* with the stored bytes."""
    lines = []
    for record in records:
        if record.contender != "pipeload":
            continue
        lines.append(
            [
                record.model,
                format_bytes(record.budget_bytes or 0),
                seconds(record.steady_s) if record.ok else "failed",
                f"{record.bound_s / record.steady_s:.2f}" if record.bound_s and record.steady_s else "-",
                format_bytes(record.peak_bytes or 0),
                f"{record.max_error:.0e}" if record.max_error is not None else "-",
                format_bytes(int(record.read_bytes)) if record.read_bytes is not None else "-",
            ]
        )
    names = ("model", "budget", "steady", "T*/steady", "peak", "max error", "read in a pass")
    return markdown_table(names, lines)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, CASES, rows))
