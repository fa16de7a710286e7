"""The answers of 1, 2, 3 and 4 nodes of unequal budgets, beside those of one machine that has all memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import pipeload
from benchmarks.ring.boards import BESIDE_BYTES, boards
from benchmarks.ring.tokens import PROMPT
from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.cluster.route import stage_places
from pipeload.format.manifest import Manifest, read
from pipeload.machine.sizes import format_bytes
from pipeload.measuring.example_inputs import example_inputs
from pipeload.planning.needs import planning_dims

__all__ = ["Record", "Report", "compare", "rows"]

TOKENS = 8
TOLERANCE = 1e-4
SHARES = (4, 2, 3, 1)
"""Stages have parts of the blocks, and nodes budgets, in this proportion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One model on one number of nodes.

    Attributes:
        model: its name.
        stages: node -> its shards.
        budget_bytes: of each node.
        peak_bytes: the highest usage of each node's cgroup.
        max_error: the largest difference of an output, relative to its range; None for tokens.
        right: tokens are equal, other answers no further off than 1e-4.
    """

    model: str
    stages: dict[str, str]
    budget_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    max_error: float | None
    right: bool

    @property
    def ok(self) -> bool:
        """Whether the answer is right, and no node took more than its budget."""
        return self.right and all(
            peak <= self.budget_bytes[name] + BESIDE_BYTES for name, peak in self.peak_bytes.items()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All models on all numbers of nodes.

    Attributes:
        bits_per_s: of each link.
        latency_s: from one machine to another.
        machine: see `machine_facts`.
        records: of the runs.
    """

    bits_per_s: int
    latency_s: float = 0.0
    machine: dict[str, Any] = field(default_factory=machine_facts)
    records: list[Record] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all of them are right, within their budgets."""
        return all(one.ok for one in self.records)


def compare(
    directories: Sequence[Path], counts: Sequence[int], *, bits_per_s: int, latency_s: float, console: Console
) -> Report:
    """Run models on clusters of these numbers of nodes.

    Args:
        directories: sharded model directories.
        counts: numbers of nodes.
        bits_per_s: of each link.
        latency_s: from one machine to another.
        console: is told of each run.
    """
    report = Report(bits_per_s=bits_per_s, latency_s=latency_s)
    for directory in directories:
        manifest = read(directory)
        with pipeload.load(directory) as alone:
            expected = _answer(alone, manifest)
        for count in counts:
            record = _compared(directory, manifest, count, bits_per_s, latency_s, expected)
            report.records.append(record)
            console.print(record, markup=False, highlight=False, soft_wrap=True)
    return report


def _compared(
    directory: Path, manifest: Manifest, count: int, bits_per_s: int, latency_s: float, expected: Any
) -> Record:
    stages = _stages(manifest, count)
    weights = {name: _weight_bytes(manifest, shards) for name, shards in stages.items()}
    # Half of the stage's weights has no place, or a little more.
    budgets = {name: 260_000_000 + max(nbytes // 2, 150_000_000) for name, nbytes in weights.items()}
    with tempfile.TemporaryDirectory(prefix="pipeload-ring-") as folder:
        models = Path(folder) / "models"
        models.mkdir()
        (models / directory.name).symlink_to(directory.resolve())
        with boards(
            models,
            budgets,
            bits_per_s=bits_per_s,
            latency_s=latency_s,
            read_bytes_per_s=None,
            certificates=Path(folder) / "certificates",
        ) as running:
            with running.connection.load(directory.name, stages=stages) as model:
                made = _answer(model, manifest)
            peaks = {name: node.peak_bytes for name, node in running.nodes.items()}
    error = None
    if isinstance(expected, Mapping):
        error = max(
            float(np.abs(made[name] - array).max() / (np.ptp(array) or 1.0)) for name, array in expected.items()
        )
    return Record(
        model=directory.name,
        stages=stages,
        budget_bytes=budgets,
        peak_bytes=peaks,
        max_error=error,
        right=made == expected if error is None else error <= TOLERANCE,
    )


def _answer(model: Any, manifest: Manifest) -> Any:
    if manifest.caches:
        return model.generate([*PROMPT], max_new_tokens=TOKENS, eos_token_id=[]).token_ids
    return model.run(example_inputs(manifest, planning_dims(manifest)))


def _stages(manifest: Manifest, count: int) -> dict[str, str]:
    names, cuts = [shard.name for shard in manifest.shards], stage_places(manifest)
    shares = [0, *accumulate(SHARES[:count])]
    ends = [cuts[round(len(cuts) * share / shares[-1])] for share in shares[1:-1]]
    return {
        f"board-{number + 1}": f"{names[begin]}:{names[end - 1]}"
        for number, (begin, end) in enumerate(pairwise([0, *ends, len(names)]))
    }


def _weight_bytes(manifest: Manifest, shards: str) -> int:
    from pipeload.format.stages import stage_of

    return stage_of(manifest, shards).weight_bytes


def rows(report: Report) -> str:
    """The table."""
    return markdown_table(
        ("model", "nodes", "budgets", "most memory", "answers"),
        [
            (
                one.model,
                str(len(one.stages)),
                ", ".join(format_bytes(nbytes) for nbytes in one.budget_bytes.values()),
                ", ".join(format_bytes(nbytes) for nbytes in one.peak_bytes.values()),
                ("WRONG" if not one.right else "equal" if not one.max_error else f"{one.max_error:.0e} off"),
            )
            for one in report.records
        ],
    )
