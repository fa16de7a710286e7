"""HiDP's two levels, each with and without: shards by the speed of nodes, and cores of a node that read or compute.

Three nodes differ in disk and processor time, and the second core of each is little: another program takes a share of
it before all others, and the kernel tells the nodes of the second level its capacity. Without the first level each node
has the same number of blocks. Without the second one, a node has one Loading Agent, and computes with a thread for each
core wherever the kernel places it: its profile has no other times.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

import pipeload
from benchmarks.ring.answers import TOLERANCE, answer, cut_by, difference
from benchmarks.ring.boards import BESIDE_BYTES, Boards, Hardware, boards, command, limited
from benchmarks.ring.tokens import PROMPT
from benchmarks.study import markdown_table
from pipeload.bench.machine import machine_facts
from pipeload.bench.table import seconds
from pipeload.format.manifest import Manifest, read
from pipeload.machine.sizes import format_bytes
from pipeload.measuring import profile_store
from pipeload.measuring.example_inputs import example_inputs
from pipeload.planning.needs import planning_dims

__all__ = ["BUDGETS_MB", "VARIANTS", "Record", "Report", "compare", "rows"]

BUDGETS_MB = {"bert-large": 450, "smollm2-135m": 200}
"""Of each node."""
MACHINES = {
    "board-1": Hardware(read_bytes_per_s=400_000_000),
    "board-2": Hardware(read_bytes_per_s=100_000_000),
    "board-3": Hardware(read_bytes_per_s=400_000_000, processors=1.0),
}
LITTLE_CORE, TAKEN_SHARE = 1, 0.6
VARIANTS = {"neither": (False, False), "global only": (True, False), "local only": (False, True), "both": (True, True)}
"""Name -> whether shards are placed by the speed of nodes, and whether cores are chosen inside a node."""
SETTLING, PASSES = 4, 8
"""Passes, or tokens, that do not count, and those that do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One variant of one model, once.

    Attributes:
        model: its name.
        variant: of `VARIANTS`.
        stages: node -> its shards.
        cores: node -> which of its cores computed and which read; only with the second level.
        pass_s: median seconds of a pass, for a decoder of a token.
        peak_bytes: the highest usage of each node's cgroup.
        right: the answer is that of one machine that has all memory.
    """

    model: str
    variant: str
    stages: dict[str, str]
    cores: dict[str, str]
    pass_s: float
    peak_bytes: dict[str, int]
    right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All variants of all models.

    Attributes:
        budget_bytes: model -> of each node.
        read_bytes_per_s: node -> of its disk.
        processors: node -> its quota; None without one.
        taken_share: of the little core.
        machine: see `machine_facts`.
        records: of the runs, in the order in which they were made.
    """

    budget_bytes: dict[str, int]
    read_bytes_per_s: dict[str, int | None]
    processors: dict[str, float | None]
    taken_share: float
    machine: dict[str, Any] = field(default_factory=machine_facts)
    records: list[Record] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all answers are right, and no node took more than its budget."""
        return all(
            one.right and max(one.peak_bytes.values()) <= self.budget_bytes[one.model] + BESIDE_BYTES
            for one in self.records
        )


def compare(directories: Sequence[Path], rounds: int, *, bits_per_s: int, latency_s: float, console: Console) -> Report:
    """Run all variants of these models, one after another, in each round.

    Args:
        directories: sharded model directories.
        rounds: how often.
        bits_per_s: of each link.
        latency_s: from one machine to another.
        console: is told of each run.
    """
    report = Report(
        budget_bytes={path.name: BUDGETS_MB[path.name] * 1_000_000 for path in directories},
        read_bytes_per_s={name: one.read_bytes_per_s for name, one in MACHINES.items()},
        processors={name: one.processors for name, one in MACHINES.items()},
        taken_share=TAKEN_SHARE,
    )
    manifests = {path.name: read(path) for path in directories}
    expected = {}
    for path in directories:
        with pipeload.load(path) as alone:
            expected[path.name] = answer(alone, manifests[path.name])
    with tempfile.TemporaryDirectory(prefix="pipeload-ring-") as name, _little_core():
        folder = Path(name)
        (folder / "models").mkdir()
        for path in directories:
            (folder / "models" / path.name).symlink_to(path.resolve())
        machines = {model: _measured(folder, model, report.budget_bytes[model], console) for model in manifests}
        turns = product(range(rounds), manifests.items(), VARIANTS.items())
        for _, (model, manifest), (variant, (by_speed, by_cores)) in turns:
            with boards(
                directories,
                dict.fromkeys(MACHINES, report.budget_bytes[model]),
                bits_per_s=bits_per_s,
                latency_s=latency_s,
                hardware=machines[model][by_cores],
            ) as running:
                record = _timed(running, model, manifest, variant, expected[model], by_speed=by_speed)
            report.records.append(record)
            console.print(record, markup=False, highlight=False, soft_wrap=True)
    return report


@contextmanager
def _little_core() -> Iterator[None]:
    words = [sys.executable, "-m", "benchmarks.ring.busy", str(LITTLE_CORE), str(TAKEN_SHARE)]
    with subprocess.Popen(words) as busy:
        try:
            yield
        finally:
            busy.terminate()


def _measured(folder: Path, model: str, budget_bytes: int, console: Console) -> dict[bool, dict[str, Hardware]]:
    """Whether cores are chosen -> the nodes, each with its profile of the model, which is measured here."""
    told = folder / "capacities"
    told.mkdir(exist_ok=True)
    (told / f"cpu{LITTLE_CORE}").write_text(f"{round(1024 * (1 - TAKEN_SHARE))}\n")
    machines: dict[bool, dict[str, Hardware]] = {True: {}, False: {}}
    for name, hardware in MACHINES.items():
        chosen = replace(hardware, capacities=told, cache=folder / f"{name}-chosen")
        fixed = replace(hardware, cache=folder / f"{name}-fixed")
        file, directory = folder / f"{name}-{model}.json", folder / "models" / model
        console.print(f"measuring {model} on {name} ...")
        _run(command("profile", str(directory), "-o", str(file)), chosen, budget_bytes, folder)
        found = profile_store.read(file)
        most = max(found.times)
        only = replace(
            found,
            read_bytes_per_s={1: found.read_bytes_per_s[1]},
            cached_read_bytes_per_s={1: found.cached_read_bytes_per_s[1]},
            times={most: found.times[most]},
            core_capacities={},
        )
        profile_store.write(only, file)
        keep = [sys.executable, "-m", "benchmarks.ring.kept", str(directory), str(file)]
        _run(keep, fixed, budget_bytes, folder)
        machines[True][name], machines[False][name] = chosen, fixed
    return machines


def _run(words: Sequence[str], hardware: Hardware, budget_bytes: int, folder: Path) -> None:
    with limited(words, hardware, budget_bytes, folder / "models") as one:
        one.process.communicate()
        if one.process.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {one.process.returncode}")


def _timed(running: Boards, name: str, manifest: Manifest, variant: str, expected: Any, *, by_speed: bool) -> Record:
    if by_speed:
        names = [shard.name for shard in manifest.shards]
        found = running.connection.plan(name)
        stages = {one.node: f"{names[one.begin]}:{names[one.end - 1]}" for one in found.segments}
    else:
        stages = cut_by(manifest, [1] * len(MACHINES))
    # As it was placed: a model that moves would be several variants.
    with running.connection.load(name, stages=stages) as model:
        made = answer(model, manifest)
        pass_s = _token_s(model) if manifest.caches else _pass_s(model, manifest)
        cores = {
            node.offer.name: stage["cores"]
            for node in running.connection.nodes()
            for stage in node.stages
            if "cores" in stage
        }
    error = difference(made, expected)
    return Record(
        model=name,
        variant=variant,
        stages=stages,
        cores=cores,
        pass_s=pass_s,
        peak_bytes={board: node.peak_bytes for board, node in running.nodes.items()},
        right=made == expected if error is None else error <= TOLERANCE,
    )


def _pass_s(model: Any, manifest: Manifest) -> float:
    inputs, seen = example_inputs(manifest, planning_dims(manifest)), []
    for _ in range(SETTLING + PASSES):
        begin = time.perf_counter()
        model.run(inputs)
        seen.append(time.perf_counter() - begin)
    return median(seen[SETTLING:])


def _token_s(model: Any) -> float:
    moments: list[float] = []
    note: Callable[[object], None] = lambda _: moments.append(time.perf_counter())  # noqa: E731 - a callback
    model.generate([*PROMPT], max_new_tokens=SETTLING + PASSES + 1, eos_token_id=[], on_token=note)
    return median(after - before for before, after in zip(moments[SETTLING:], moments[SETTLING + 1 :], strict=False))


def rows(report: Report) -> str:
    """The table."""
    found: list[tuple[str, ...]] = []
    for model, budget_bytes in report.budget_bytes.items():
        ours = [one for one in report.records if one.model == model]
        own = {variant: [one for one in ours if one.variant == variant] for variant in VARIANTS}
        both_s = median(one.pass_s for one in own["both"])
        for variant, runs in own.items():
            pass_s = [one.pass_s for one in runs]
            peaks = [max(one.peak_bytes[board] for one in runs) for board in runs[0].peak_bytes]
            found.append(
                (
                    model,
                    variant,
                    ", ".join(f"{board}: {shards}" for board, shards in runs[-1].stages.items()),
                    _cores(runs[-1].cores),
                    f"{seconds(median(pass_s))} ({seconds(min(pass_s))} - {seconds(max(pass_s))})",
                    f"{median(pass_s) / both_s:.2f}",
                    f"{', '.join(map(format_bytes, peaks))} of {format_bytes(budget_bytes)}",
                    "equal" if all(one.right for one in runs) else "WRONG",
                )
            )
    head = ("model", "levels", "stages", "cores", "s a pass or token", "of both", "most memory", "answers")
    return markdown_table(head, found)


def _cores(cores: Mapping[str, str]) -> str:
    return "; ".join(f"{board}: {text}" for board, text in sorted(cores.items())) or "as the kernel places them"
