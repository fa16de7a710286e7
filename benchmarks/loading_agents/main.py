"""`python -m benchmarks.loading_agents.main`: 1, 2, 4 and 8 Loading Agents, beside the usual pipelines."""

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
        contenders=("pipeload", "standard", "pipeswitch", "layerwise"),
        percents=(12 if name == "gpt2-xl" else 30, None),
        sizes=sizes,
        settling=1 if name == "gpt2-xl" else 6,
        passes=3 if name == "gpt2-xl" else 5,
        loaders=(1, 2, 4, 8),
        cold=True,
    )
    for name, sizes in LARGE.items()
)


def rows(records: Sequence[Record]) -> str:
    """Speed and memory of every contender, beside the pipelines without a limit."""
    lines = []
    for record in records:
        free = {r.contender: r for r in records if r.model == record.model and r.budget_bytes is None}
        standard, pipeswitch = free["standard"], free["pipeswitch"]
        speed = standard.steady_s / record.steady_s if standard.steady_s and record.steady_s else None
        less = 1 - record.peak_bytes / pipeswitch.peak_bytes if record.peak_bytes and pipeswitch.peak_bytes else None
        lines.append(
            [
                record.model,
                f"{record.contender}{f', {record.loaders} agents' if record.loaders else ''}",
                format_bytes(record.budget_bytes) if record.budget_bytes else "-",
                seconds(record.steady_s) if record.ok else "killed" if record.killed else "failed",
                f"{speed:.2f} x" if speed else "-",
                format_bytes(record.peak_bytes or 0),
                format_bytes(record.peak_rss_bytes or 0) if record.ok else "-",
                f"{less:.1%}" if less is not None and record.ok else "-",
                f"{record.efficiency:.2f}" if record.efficiency else "-",
            ]
        )
    names = ("model", "contender", "budget", "pass", "speed, standard = 1", "peak", "peak RSS", "less than pipeswitch")
    return markdown_table((*names, "T*/pass"), lines)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, CASES, rows))
