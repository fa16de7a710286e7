"""`python -m benchmarks.cold_start.main`: how long until the first answer, when nothing is in memory yet?"""

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
        name=name,
        contenders=("pipeload", "single", "mmap", "layerwise", "standard"),
        percents=(50, None),
        disks=(400, None),
        sizes=sizes,
        settling=0,
        passes=1,
        rounds=3 if name == "gpt2-xl" else 5,
    )
    for name, sizes in LARGE.items()
)


def rows(records: Sequence[Record]) -> str:
    """First answers, beside that of the single session without a limit on the same disk."""
    lines = []
    for record in records:
        base = next(
            r
            for r in records
            if r.contender == "single"
            and r.budget_bytes is None
            and (r.model, r.disk_bytes_per_s) == (record.model, record.disk_bytes_per_s)
        )
        ratio = base.first_s / record.first_s if record.first_s and base.first_s else None
        lines.append(
            [
                record.model,
                f"{record.disk_bytes_per_s / 1e6:.0f} MB/s" if record.disk_bytes_per_s else "-",
                format_bytes(record.budget_bytes) if record.budget_bytes else "-",
                record.contender,
                seconds(record.first_s) if record.ok else "killed" if record.killed else "failed",
                f"{ratio:.2f} x" if ratio else "-",
                seconds(record.first_bound_s),
                f"{record.first_efficiency:.2f}" if record.first_efficiency else "-",
            ]
        )
    names = ("model", "disk", "budget", "contender", "first answer", "speed, single = 1", "T*", "T*/first")
    return markdown_table(names, lines)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, CASES, rows))
