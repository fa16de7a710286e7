"""`python -m benchmarks.budget_sweep.main`: latency and memory over budget and disk, beside T* and the predictions."""

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
        contenders=("pipeload", "single", "mmap"),
        percents=(25, 50, 75, 95),
        # At 200 MB/s a pass of the memory-mapped GPT-2 XL takes half a minute.
        disks=(400, None) if name == "gpt2-xl" else (200, 400, None),
        sizes=sizes,
        settling=1 if name == "gpt2-xl" else 6,
        passes=3 if name == "gpt2-xl" else 5,
        rounds=2 if name == "gpt2-xl" else 3,
    )
    for name, sizes in LARGE.items()
)


def rows(records: Sequence[Record]) -> str:
    """Pipeload at every setting: against T*, against its own predictions, against the memory-mapped session."""
    lines = []
    for record in records:
        if record.contender != "pipeload":
            continue
        setting = (record.model, record.budget_bytes, record.disk_bytes_per_s)
        others = {r.contender: r for r in records if (r.model, r.budget_bytes, r.disk_bytes_per_s) == setting}
        lines.append(
            [
                record.model,
                f"{record.disk_bytes_per_s / 1e6:.0f} MB/s" if record.disk_bytes_per_s else "-",
                format_bytes(record.budget_bytes) if record.budget_bytes else "-",
                seconds(record.steady_s) if record.ok else "failed",
                _ratio(record.bound_s, record.steady_s),
                _ratio(record.first_bound_s, record.first_s),
                _ratio(record.predicted_steady_s, record.steady_s),
                format_bytes(record.peak_bytes or 0),
                _ratio(record.predicted_peak_bytes, record.peak_rss_bytes),
                _speed(record, others.get("mmap")),
            ]
        )
    names = ("model", "disk", "budget", "steady", "T*/steady", "T*/first", "predicted/steady", "peak")
    return markdown_table((*names, "predicted/peak RSS", "speed, mmap = 1"), lines)


def _ratio(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.2f}" if part and whole else "-"


def _speed(record: Record, other: Record | None) -> str:
    if other is None or other.steady_s is None or record.steady_s is None:
        return "killed" if other and other.killed else "-"
    return f"{other.steady_s / record.steady_s:.2f} x"


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, CASES, rows))
