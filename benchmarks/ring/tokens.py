"""Seconds a token of a decoder on 1, 2 and 4 nodes, beside what their disks need for what does not stay in memory.

Of one text, the nodes read one after another, but for what their buffers hold: when a stage's turn comes, no more of it
can be in memory than memory holds. Of several texts at a time, each node reads all the time, and the slowest disk
decides.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console

import pipeload
from benchmarks.ring.boards import BESIDE_BYTES, Boards, boards
from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.bench.table import seconds
from pipeload.cluster.model import ClusterModel
from pipeload.machine.sizes import format_bytes

__all__ = ["PROMPT", "SETTLING", "TOKENS", "Record", "Report", "generate", "measure", "rows"]

PROMPT = (464, 3139, 286, 4881, 318, 6342, 11, 290, 262, 3139, 286, 4486, 318, 11307, 13, 383)
"""16 ids of GPT-2."""
SETTLING, TOKENS = 4, 5
"""Tokens of each text that do not count, and those that do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One number of nodes.

    Attributes:
        nodes: of the cluster.
        stages: node -> its shards.
        texts: that are generated at the same time.
        token_s: seconds a token, of all texts together.
        read_bytes: bytes that each node of a stage read for a token.
        peak_bytes: the highest usage of each node's cgroup.
        right: the tokens are those of one machine that has all memory.
        links_cores: processors that the links took of this machine, which made them.
    """

    nodes: int
    stages: dict[str, str]
    texts: int
    token_s: float
    read_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    right: bool
    links_cores: float | None = None

    def slowest_s(self, read_bytes_per_s: int) -> float:
        """Seconds that the disk with the most to read needs for a token."""
        return max(self.read_bytes.values(), default=0) / read_bytes_per_s

    def together_s(self, read_bytes_per_s: int) -> float:
        """Seconds that all disks need for a token, one after another."""
        return sum(self.read_bytes.values()) / read_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All numbers of nodes.

    Attributes:
        model: its name.
        budget_bytes: of each node.
        bits_per_s: of each link.
        latency_s: from one machine to another.
        read_bytes_per_s: of each disk.
        machine: see `machine_facts`.
        records: of the runs.
    """

    model: str
    budget_bytes: int
    bits_per_s: int
    read_bytes_per_s: int
    latency_s: float = 0.0
    machine: dict[str, Any] = field(default_factory=machine_facts)
    records: list[Record] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all tokens are right, and no node took more than its budget."""
        most_bytes = self.budget_bytes + BESIDE_BYTES
        return all(one.right and max(one.peak_bytes.values()) <= most_bytes for one in self.records)


def measure(
    directory: Path,
    counts: Sequence[int],
    *,
    budget_bytes: int,
    bits_per_s: int,
    latency_s: float,
    read_bytes_per_s: int,
    console: Console,
) -> Report:
    """Run a model on clusters of these numbers of nodes.

    Args:
        directory: the sharded model directory.
        counts: numbers of nodes.
        budget_bytes: of each node.
        bits_per_s: of each link.
        latency_s: from one machine to another.
        read_bytes_per_s: of each disk.
        console: is told of each run.
    """
    report = Report(
        model=directory.name,
        budget_bytes=budget_bytes,
        bits_per_s=bits_per_s,
        latency_s=latency_s,
        read_bytes_per_s=read_bytes_per_s,
    )
    with pipeload.load(directory) as model:
        expected = model.generate([*PROMPT], max_new_tokens=SETTLING + TOKENS, eos_token_id=[]).token_ids
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="pipeload-ring-") as folder:
            models = Path(folder) / "models"
            models.mkdir()
            (models / directory.name).symlink_to(directory.resolve())
            budgets = {f"board-{number + 1}": budget_bytes for number in range(count)}
            with boards(
                models,
                budgets,
                bits_per_s=bits_per_s,
                latency_s=latency_s,
                read_bytes_per_s=read_bytes_per_s,
                certificates=Path(folder) / "certificates",
            ) as running:
                for texts in sorted({1, 2 * count}):
                    record = generate(running, directory, expected, texts)
                    report.records.append(record)
                    console.print(record, markup=False, highlight=False, soft_wrap=True)
    return report


def generate(running: Boards, directory: Path, expected: Sequence[int], texts: int) -> Record:
    """Generate the same text a number of times at the same time, on stages that are placed for that.

    Args:
        running: the nodes.
        directory: the sharded model directory, whose name is that of the model on the nodes.
        expected: the tokens after `PROMPT`, `SETTLING` of which do not count.
        texts: their number.
    """
    moments: list[tuple[float, int, dict[str, int]]] = []

    def generated(model: ClusterModel, text: int) -> bool:
        def note(_: object) -> None:
            moments.append((time.perf_counter(), text, {name: node.read_bytes for name, node in running.nodes.items()}))

        made = model.generate([*PROMPT], max_new_tokens=len(expected), eos_token_id=[], on_token=note)
        return made.token_ids == expected

    # For the shortest time of one text, or for the most tokens of several.
    links_s, began_s = running.network.processor_s, time.perf_counter()
    opened = running.connection.load(directory.name, latency_share=1.0 if texts == 1 else 0.0)
    with opened as model, ThreadPoolExecutor(texts) as pool:
        right = all(pool.map(generated, [model] * texts, range(texts)))
        names = [shard.name for shard in model.manifest.shards]
        stages = {one.node: f"{names[one.begin]}:{names[one.end - 1]}" for one in model.placement.segments}
    # While all texts are on their way.
    moments.sort(key=itemgetter(0))
    own = [[moment for moment in moments if moment[1] == text] for text in range(texts)]
    begin = max(one[SETTLING - 1] for one in own)
    end = min(one[-1] for one in own)
    tokens = sum(begin[0] < moment[0] <= end[0] for moment in moments)
    return Record(
        nodes=len(running.nodes),
        stages=stages,
        texts=texts,
        token_s=(end[0] - begin[0]) / tokens,
        read_bytes={name: (end[2][name] - begin[2][name]) // tokens for name in stages},
        peak_bytes={name: node.peak_bytes for name, node in running.nodes.items()},
        right=right,
        links_cores=(running.network.processor_s - links_s) / (time.perf_counter() - began_s),
    )


def rows(report: Report) -> str:
    """The table."""
    rate = report.read_bytes_per_s
    return markdown_table(
        (
            "nodes",
            "stages",
            "texts",
            "s/token",
            "the slowest disk",
            "all disks",
            "most memory of a node",
            "links",
            "tokens",
        ),
        [
            (
                str(one.nodes),
                ", ".join(one.stages.values()),
                str(one.texts),
                seconds(one.token_s),
                seconds(one.slowest_s(rate)),
                seconds(one.together_s(rate)),
                format_bytes(max(one.peak_bytes.values())),
                "-" if one.links_cores is None else f"{one.links_cores:.2f} cores",
                "right" if one.right else "WRONG",
            )
            for one in report.records
        ],
    )
