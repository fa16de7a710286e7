"""`python -m benchmarks.small_encoders.main [MODEL ...]`: weights of 8 bits in 160 MB beside a resident session.

The session of onnxruntime holds the whole float32 graph. Runs of both take turns, each in a process of its own; no disk
is throttled. --tables only writes the README's table again, from results/.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from benchmarks.models import exported, joined
from benchmarks.study import LARGE, markdown_table, publish
from pipeload.bench.harness import Settings, compare
from pipeload.bench.record import Record
from pipeload.bench.spec import from_json, to_json
from pipeload.bench.table import seconds
from pipeload.cli.progress import progress_bars
from pipeload.format.manifest import read
from pipeload.machine.sizes import format_bytes

FOLDER = Path(__file__).parent
_MODELS = ("bert-large", "vit-large")
_CAP_BYTES = 160_000_000
_LARGEST_ERROR = 0.05
"""Of the outputs' range: 8 bits round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One model.

    Attributes:
        machine: the one that it ran on.
        cap_bytes: limit of pipeload's memory cgroup, page cache included.
        weight_bytes, float32_bytes: of the weights of 8 bits, and of the session's.
        ours, single: the records.
    """

    machine: dict[str, Any]
    cap_bytes: int
    weight_bytes: int
    float32_bytes: int
    ours: Record
    single: Record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*_MODELS, []], help=f"of {', '.join(_MODELS)}; default: all")
    parser.add_argument("--tables", action="store_true", help="only write the README's table again")
    options = parser.parse_args()
    results, right = FOLDER / "results", True
    results.mkdir(exist_ok=True)
    for name in [] if options.tables else options.models or _MODELS:
        found = _compare(name, Console(width=150))
        (results / f"{name}.json").write_bytes(msgspec.json.format(to_json(found), indent=1) + b"\n")
        right &= found.ours.max_error is not None and found.ours.max_error <= _LARGEST_ERROR
    kept = [from_json(path.read_bytes(), Comparison) for path in sorted(results.glob("*.json"))]
    publish(FOLDER / "README.md", "small_encoders.main --tables", kept[0].machine, _rows(kept))
    return 0 if right else 1


def _compare(name: str, console: Console) -> Comparison:
    source, _ = exported(name, console)
    directory, _ = exported(name, console, "int8")
    with tempfile.TemporaryDirectory(prefix="pipeload-bench-") as folder, progress_bars() as progress:
        settings = Settings(
            directory=directory,
            unsplit=joined(source, Path(folder)),
            contenders=("pipeload", "single"),
            budgets=(_CAP_BYTES,),
            settling=10,
            passes=10,
            rounds=5,
            sizes={dim: size for dim, size in LARGE[name].items() if dim in read(directory).dims},
        )
        report = compare(settings, progress, lambda text: console.print(text, style="yellow"))
    capped = {record.contender: record for record in report.records if record.budget_bytes}
    (whole,) = (record for record in report.records if not record.budget_bytes)
    return Comparison(
        machine=report.machine,
        cap_bytes=_CAP_BYTES,
        weight_bytes=read(directory).weight_bytes,
        float32_bytes=read(source).weight_bytes,
        ours=capped["pipeload"],
        single=whole,
    )


def _rows(kept: Sequence[Comparison]) -> str:
    lines = []
    for one in kept:
        ours, single = one.ours, one.single
        ratio = f"{ours.steady_s / single.steady_s:.2f}" if ours.steady_s and single.steady_s else "-"
        lines.append(
            [
                ours.model,
                *(seconds(record.steady_s) if record.steady_s else record.message or "-" for record in (ours, single)),
                ratio,
                *(format_bytes(record.peak_bytes or 0) for record in (ours, single)),
                f"{one.float32_bytes / one.weight_bytes:.2f}",
                f"{ours.max_error:.4f}" if ours.max_error is not None else "-",
            ]
        )
    names = ("model", "a pass", "session, a pass", "ratio", "peak", "session, peak", "bytes, float32 : 8 bits")
    return markdown_table((*names, "worst error"), lines)


if __name__ == "__main__":
    sys.exit(main())
