"""Rings of boards that are not here, by the planner's own recurrence: up to which number do more of them pay?

A board has 4 GB, of which 3 GB are for weights, a disk of 400 MB/s, and memory of 10 GB/s, which bounds a token's
computing. A model has equal blocks of one byte a parameter. These are assumptions; nothing here was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.planning.placement import Node, Placement, Turn, place_shards
from pipeload.planning.schedule import ShardWork, rested, simulate

__all__ = ["MODELS", "Record", "Report", "imagine", "rows"]

WEIGHTS_BYTES, DISK_BYTES_PER_S, MEMORY_BYTES_PER_S = 3_000_000_000, 400e6, 10e9
SESSION_S, CALL_S = 0.002, 0.002
CORES = 4
BUFFERS = 2
LINKS_BYTES_PER_S = (1e9, 110e6, 10e6)
COUNTS = (1, 2, 4, 8, 16, 32, 64)
PAYS = 1.1
"""More nodes pay where they make it faster by a tenth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imagined:
    """A decoder.

    Attributes:
        parameters: of all blocks together.
        blocks: their number.
        hidden: numbers that go from block to block for a token.
    """

    parameters: int
    blocks: int
    hidden: int


MODELS = {
    "1B": Imagined(parameters=10**9, blocks=16, hidden=2048),
    "7B": Imagined(parameters=7 * 10**9, blocks=32, hidden=4096),
    "70B": Imagined(parameters=70 * 10**9, blocks=80, hidden=8192),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A model on up to a number of nodes.

    Attributes:
        model: its name.
        nodes: that there are.
        link_bytes_per_s: between two of them.
        token_s: seconds a token of one text, on the best placement for that.
        token_nodes: that this placement uses.
        period_s: seconds between two tokens of many texts, on the best placement for that.
        period_nodes: that it uses.
    """

    model: str
    nodes: int
    link_bytes_per_s: float
    token_s: float
    token_nodes: int
    period_s: float
    period_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of them.

    Attributes:
        machine: see `machine_facts`.
        records: of the placements.
    """

    machine: dict[str, Any] = field(default_factory=machine_facts)
    records: list[Record] = field(default_factory=list)
    ok: bool = True


def imagine() -> Report:
    """Place all models on all numbers of nodes."""
    report = Report()
    for name, model in MODELS.items():
        costs = _costs(model)
        for link in LINKS_BYTES_PER_S:
            for count in COUNTS:
                token, period = (_placed(model, count, link, costs, share) for share in (1.0, 0.0))
                report.records.append(
                    Record(
                        model=name,
                        nodes=count,
                        link_bytes_per_s=link,
                        token_s=token.latency_s,
                        token_nodes=len(token.segments),
                        period_s=period.period_s,
                        period_nodes=len(period.segments),
                    )
                )
    return report


def _placed(model: Imagined, count: int, link: float, costs: Any, share: float) -> Placement:
    def send_s(_from: Node, _to: Node, _place: int) -> float:
        return CALL_S + 4 * model.hidden / link

    nodes = [Node(name=f"board-{number}", kind="board") for number in range(count)]
    found = place_shards(nodes, range(1, model.blocks), model.blocks, costs, send_s, latency_share=share)
    assert found is not None
    return found


def _costs(model: Imagined) -> Any:
    nbytes = model.parameters // model.blocks

    @cache
    def turn(blocks: int) -> Turn:
        resident = min(blocks, WEIGHTS_BYTES // nbytes)
        if resident < blocks:
            resident = max(0, WEIGHTS_BYTES // nbytes - BUFFERS)
        # Resident blocks lie evenly between the others, so that the disk reads all the time.
        stays = [number * resident // blocks != (number + 1) * resident // blocks for number in range(blocks)]
        work = [
            ShardWork(
                cold_bytes=nbytes,
                steady_bytes=0 if stay else nbytes,
                streamed=not stay,
                session_s=SESSION_S,
                run_s=nbytes / MEMORY_BYTES_PER_S,
                loading_run_s=nbytes / MEMORY_BYTES_PER_S,
            )
            for stay in stays
        ]
        options = {
            "loaders": 1,
            "buffers": BUFFERS,
            "read_bytes_per_s": DISK_BYTES_PER_S,
            "threads": CORES,
            "cores": CORES,
        }
        return Turn(
            run_s=simulate(rested(work, BUFFERS), **options).first_s,
            read_s=simulate(work, **options).steady_s if resident < blocks else 0.0,
        )

    return lambda _node, begin, end: turn(end - begin)


def rows(report: Report) -> str:
    """The table: a line for each model and link."""
    keys = dict.fromkeys((one.model, one.link_bytes_per_s) for one in report.records)
    found = []
    for model, link in keys:
        own = [one for one in report.records if (one.model, one.link_bytes_per_s) == (model, link)]
        found.append(
            (
                model,
                f"{link / 1e6:.0f} MB/s",
                *(f"{one.token_s:.2f} / {one.period_s:.3f}" for one in own),
                f"{_last_that_pays(own, 'token_s')} / {_last_that_pays(own, 'period_s')}",
            )
        )
    return markdown_table(("model", "link", *(f"{count} nodes" for count in COUNTS), "pays up to"), found)


def _last_that_pays(own: Sequence[Record], figure: str) -> int:
    best, last = float("inf"), 1
    for one in own:
        if getattr(one, figure) * PAYS <= best:
            best, last = getattr(one, figure), one.nodes
    return last
