"""Seconds until the next token of a text whose model moves: caches copied from node to node, and computed again.

A model moves from one node to two others, and both stages open there: all of its caches change their node. The two
ways take turns on the same nodes. What pipeload predicts of both stands beside what they took.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import pipeload
from benchmarks.ring.boards import BESIDE_BYTES, Boards, boards
from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.bench.table import seconds
from pipeload.cluster.model import ClusterModel
from pipeload.cluster.placing import by_hand
from pipeload.cluster.ring import Ring
from pipeload.cluster.route import stage_places
from pipeload.cluster.state import ClusterState
from pipeload.inputs import Arrays
from pipeload.machine.sizes import format_bytes

__all__ = ["Record", "Report", "measure", "rows"]

Way = Literal["copied", "computed"]
WAYS: tuple[Way, ...] = ("copied", "computed")
ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One length of the text.

    Attributes:
        tokens: in the caches.
        cache_bytes: of them.
        predicted_s: way -> seconds by which pipeload chooses.
        token_s: way -> seconds from the move of the calls to the next token, in each round.
        peak_bytes: the highest usage of each node's cgroup.
        right: all tokens are those of one machine that has all memory.
    """

    tokens: int
    cache_bytes: int
    predicted_s: dict[Way, float]
    token_s: dict[Way, list[float]]
    peak_bytes: dict[str, int]
    right: bool

    @property
    def chosen(self) -> Way:
        """The way that pipeload would have taken."""
        return min(WAYS, key=self.predicted_s.__getitem__)

    @property
    def faster(self) -> Way:
        """The way that was faster, by the medians."""
        return min(WAYS, key=lambda way: median(self.token_s[way]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All lengths.

    Attributes:
        model: its name.
        budget_bytes: of each node.
        bits_per_s: of each link.
        latency_s: from one machine to another.
        machine: see `machine_facts`.
        records: of the lengths.
    """

    model: str
    budget_bytes: int
    bits_per_s: int
    latency_s: float
    machine: dict[str, Any] = field(default_factory=machine_facts)
    records: list[Record] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all tokens are right, and no node took more than its budget."""
        most_bytes = self.budget_bytes + BESIDE_BYTES
        return all(one.right and max(one.peak_bytes.values()) <= most_bytes for one in self.records)


def measure(
    directory: Path, lengths: Sequence[int], *, budget_bytes: int, bits_per_s: int, latency_s: float, console: Console
) -> Report:
    """Move a model with texts of these lengths.

    Args:
        directory: the sharded model directory of a decoder.
        lengths: tokens.
        budget_bytes: of each node.
        bits_per_s: of each link.
        latency_s: from one machine to another.
        console: is told of each length.
    """
    report = Report(model=directory.name, budget_bytes=budget_bytes, bits_per_s=bits_per_s, latency_s=latency_s)
    with tempfile.TemporaryDirectory(prefix="pipeload-ring-") as folder:
        models = Path(folder) / "models"
        models.mkdir()
        (models / directory.name).symlink_to(directory.resolve())
        names = [f"board-{number + 1}" for number in range(3)]
        with (
            pipeload.load(directory) as alone,
            boards(
                models,
                dict.fromkeys(names, budget_bytes),
                bits_per_s=bits_per_s,
                latency_s=latency_s,
                read_bytes_per_s=None,
                certificates=Path(folder) / "certificates",
            ) as running,
        ):
            for length in lengths:
                record = _length(running, alone, directory.name, length)
                report.records.append(record)
                console.print(record, markup=False, highlight=False, soft_wrap=True)
    return report


def _length(running: Boards, alone: pipeload.Model, name: str, length: int) -> Record:
    ids = np.random.default_rng(length).integers(100, 10_000, (1, length))
    with alone.new_state() as state:
        alone.step(_inputs(alone, ids, 0), state)
        last = np.full((1, 1), 7)
        expected = [int(np.argmax(alone.step(_inputs(alone, last, length), state)))]
        expected.append(int(np.argmax(alone.step(_inputs(alone, last, length + 1), state))))
        cache_bytes = state.nbytes * (length + 2) // state.room
    predicted_s: dict[Way, float] = {}
    token_s: dict[Way, list[float]] = {way: [] for way in WAYS}
    right = True
    for turn in range(ROUNDS * len(WAYS)):
        way = WAYS[turn % len(WAYS)]
        with running.connection.load(name, stages={"board-1": ":"}) as model, model.new_state() as text:
            model.step(_inputs(model, ids, 0), text)
            made = [int(np.argmax(model.step(_inputs(model, last, length), text)))]
            with _taking(way, text, predicted_s), ThreadPoolExecutor(1) as pool:
                following = pool.submit(_next_token, model, _inputs(model, last, length + 1), text)
                _move(running, model, name)
                token, passed_s = following.result()
            right &= [*made, token] == expected
            token_s[way].append(passed_s)
    return Record(
        tokens=length + 1,
        cache_bytes=cache_bytes,
        predicted_s=predicted_s,
        token_s=token_s,
        peak_bytes={board: node.peak_bytes for board, node in running.nodes.items()},
        right=right,
    )


@contextmanager
def _taking(way: Way, text: ClusterState, predicted_s: dict[Way, float]) -> Iterator[None]:
    """Let the text take this way, whatever is predicted."""
    predicted = Ring.copying_s

    def chosen(ring: Ring, before: Ring, dims: Mapping[str, int], length: int) -> float | None:
        copying_s = predicted(ring, before, dims, length)
        if copying_s is not None:
            predicted_s["copied"] = copying_s
            predicted_s["computed"] = text.again_s(before, ring)
        return 0.0 if way == "copied" and copying_s is not None else None

    with mock.patch.object(Ring, "copying_s", chosen):
        yield


def _next_token(model: ClusterModel, inputs: Arrays, text: ClusterState) -> tuple[int, float]:
    """The next token as soon as calls go to the stages after the move, and the seconds that it takes."""
    before = model.placement
    while model.placement is before:
        time.sleep(0.002)
    begin_s = time.perf_counter()
    token = int(np.argmax(model.step(inputs, text)))
    return token, time.perf_counter() - begin_s


def _move(running: Boards, model: ClusterModel, name: str) -> None:
    """Move all of the model to two other nodes, as its adapter would."""
    connection, manifest = running.connection, model.manifest
    nodes = connection._nodes
    sha256, _ = nodes.named(name)
    members = connection.loop.ask(nodes.speeds(sha256, nodes.candidates(sha256)))
    links = connection.loop.ask(nodes.links(members))
    names, cuts = [shard.name for shard in manifest.shards], stage_places(manifest)
    cut = cuts[len(cuts) // 2]
    stages = {"board-2": f":{names[cut - 1]}", "board-3": f"{names[cut]}:"}
    placement = by_hand(manifest, members, stages, links)

    def ring(before: Ring) -> Ring:
        return Ring(
            connection._client, connection._watch, manifest, sha256, name, [], placement, members, before, links
        )

    if not model.rings.move(model.rings.present, ring, "The benchmark moves it.", together=True):
        raise SystemExit(f"the model did not move: {model.reconfigurations}")


def _inputs(model: pipeload.Model | ClusterModel, ids: NDArray[np.int64], past: int) -> Arrays:
    total = past + ids.shape[1]
    offered = {
        "input_ids": ids,
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(past, total)[None],
    }
    return {spec.name: offered[spec.name].astype(spec.dtype) for spec in model.inputs}


def rows(report: Report) -> str:
    """The table."""
    names = (
        "tokens",
        "caches",
        "copied",
        "computed",
        "predicted",
        "pipeload chooses",
        "most memory of a node",
        "token",
    )
    return markdown_table(
        names,
        [
            (
                str(one.tokens),
                format_bytes(one.cache_bytes),
                seconds(median(one.token_s["copied"])),
                seconds(median(one.token_s["computed"])),
                f"{seconds(one.predicted_s['copied'])} / {seconds(one.predicted_s['computed'])}",
                f"{one.chosen}{'' if one.chosen == one.faster else ' (slower)'}",
                format_bytes(max(one.peak_bytes.values())),
                "right" if one.right else "WRONG",
            )
            for one in report.records
        ],
    )
