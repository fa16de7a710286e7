"""`python -m benchmarks.single_session.main`: with the whole model in memory, how far is pipeload from one session?"""

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
        percents=(None,),
        sizes=sizes,
        # Until all shards are packed.
        settling=40 if name == "gpt2-xl" else 10,
        passes=5 if name == "gpt2-xl" else 20,
    )
    for name, sizes in LARGE.items()
)


def rows(records: Sequence[Record]) -> str:
    """Each contender beside the single session of its model."""
    lines = []
    for record in records:
        base = next(r for r in records if (r.model, r.contender) == (record.model, "single") and not r.budget_bytes)
        ratio = record.steady_s / base.steady_s if record.steady_s and base.steady_s else None
        lines.append(
            [
                record.model,
                record.contender,
                seconds(record.steady_s),
                f"{ratio:.2f}" if ratio else "-",
                format_bytes(record.peak_bytes or 0),
                f"{record.max_error:.0e}" if record.max_error is not None else "-",
            ]
        )
    return markdown_table(("model", "contender", "steady pass", "/ single", "peak, cache included", "max error"), lines)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, CASES, rows))
