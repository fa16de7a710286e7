"""`python -m benchmarks.small_weights.main`: weights of 16 bits beside the same ones in 32, at the same limits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study import LARGE, Case, main, markdown_table
from pipeload.bench.record import Record
from pipeload.bench.table import seconds
from pipeload.machine.sizes import format_bytes

CASES = tuple(
    Case(
        name=f"{name}-bf16",
        contenders=("pipeload", "single"),
        # Of the stored bytes: a quarter, a half and three quarters of what the weights take in float32.
        percents=(50, 100, 150),
        disks=(400,),
        sizes=sizes,
        settling=1 if name == "gpt2-xl" else 6,
        passes=3 if name == "gpt2-xl" else 5,
        rounds=2 if name == "gpt2-xl" else 3,
    )
    for name, sizes in LARGE.items()
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
