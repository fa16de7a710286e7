"""`python -m benchmarks.idle.main`: a server that is idle, its memory, and its first answer after that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.idle.server import Server, served
from benchmarks.models import ROOT, exported
from benchmarks.study import markdown_table, publish
from pipeload.bench import cgroup
from pipeload.bench.frame import entry, framed, plain
from pipeload.bench.machine import machine_facts, machine_line
from pipeload.bench.spec import from_json, to_json
from pipeload.bench.table import seconds
from pipeload.errors import RunError
from pipeload.machine.sizes import format_bytes

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
BUDGET = "1GB"
IDLE = "1s"
IDLE_BYTES = 60_000_000
"""The most that a server whose models are idle may have."""
_SAME = 1e-3
"""Largest difference of a number in a vector of length 1."""
_COLORS = ("#d1495b", "#30638e", "#4a4a4a", "#edae49")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and a request.

    Attributes:
        name: its recipe in models/catalog.toml.
        what: its answer.
        path, body: the request.
        text: for the program of a single session.
    """

    name: str
    what: str
    path: str
    body: dict[str, Any]
    text: str

    def answer(self, told: Any) -> Any:
        """The part of the server's answer that is compared."""
        return told["data"][0]["embedding"] if "data" in told else told["choices"][0]["text"]


CASES = (
    Case(
        name="minilm",
        what="embedding",
        path="/v1/embeddings",
        body={"model": "minilm", "input": "A man is eating food."},
        text="A man is eating food.",
    ),
    Case(
        name="smollm2-135m",
        what="first token",
        path="/v1/completions",
        body={"model": "smollm2-135m", "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0},
        text="The capital of France is",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Starts:
    """First answers of a model.

    Attributes:
        model, what: as the case has them.
        server_s: from a request to an idle server to its answer.
        single_s: from the start of a process to the answer of a single session.
        warm_s: from a request to a server whose model is open to its answer.
    """

    model: str
    what: str
    server_s: list[float] = field(default_factory=list)
    single_s: list[float] = field(default_factory=list)
    warm_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All figures.

    Attributes:
        machine: see `machine_facts`.
        budget, idle: of the server.
        starts: of each model.
        idle_bytes: memory of the idle process in each round.
        memory: seconds and bytes, of one time from open to idle and back.
        events: seconds and what happened then.
    """

    machine: dict[str, Any]
    budget: str
    idle: str
    starts: list[Starts]
    idle_bytes: list[int]
    memory: list[tuple[float, int]]
    events: list[tuple[float, str]]

    @property
    def ok(self) -> bool:
        """The idle process is as small as it should be."""
        return max(self.idle_bytes) <= IDLE_BYTES


def main(
    rounds: Annotated[int, typer.Option(min=2, help="Starts of each kind and model.")] = 30,
    tables: Annotated[bool, typer.Option("--tables", help="Only write the README's table and picture again.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Write results here, and leave the README.")
    ] = None,
) -> None:
    if not tables:
        report = measure(rounds, Console())
        folder = output or RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "idle.json").write_bytes(msgspec.json.format(to_json(report), indent=1) + b"\n")
        Console().print(rows(report), markup=False, highlight=False, soft_wrap=True)
        if output is not None:
            figure(report).savefig(folder / "memory.png")
    if output is None:
        report = from_json((RESULTS / "idle.json").read_bytes(), Report)
        figure(report).savefig(RESULTS / "memory.png")
        publish(FOLDER / "README.md", "idle.main", report.machine, rows(report))
    if not report.ok:
        raise typer.Exit(1)


def measure(rounds: int, console: Console) -> Report:
    """Measure; the server and the programs take turns.

    Raises:
        RunError: an answer is not that of a single session.
    """
    places = {case.name: exported(case.name, console) for case in CASES}
    os.sync()
    files = [*chain.from_iterable(_files(directory) + _files(one.folder) for directory, one in places.values())]
    starts = [Starts(model=case.name, what=case.what) for case in CASES]
    idle_bytes: list[int] = []
    memory: list[tuple[float, int]] = []
    expected = [_single(case, places[case.name][1].folder)[1] for case in CASES]
    with tempfile.TemporaryDirectory(prefix="pipeload-idle-") as folder:
        directories = [directory for directory, _ in places.values()]
        with served(directories, BUDGET, IDLE, Path(folder)) as server:
            with server.watched(memory):
                _there_and_back(server)
            for _ in track(range(rounds), "rounds", console=console, disable=not console.is_terminal):
                for case, kept, right in zip(CASES, starts, expected, strict=True):
                    idle_bytes.append(server.wait_until_idle())
                    cgroup.evict(files)
                    took_s, told = server.post(case.path, case.body)
                    kept.server_s.append(took_s)
                    warm_s, again = server.post(case.path, case.body)
                    kept.warm_s.append(warm_s)
                    # The server's models are idle again when the next process is measured, which has both cores.
                    server.wait_until_idle()
                    cgroup.evict(files)
                    took_s, alone = _single(case, places[case.name][1].folder)
                    kept.single_s.append(took_s)
                    for one in (case.answer(told), case.answer(again), alone):
                        _check(case, one, right)
            events = server.messages()
    begin_s = memory[0][0]
    return Report(
        machine=machine_facts(),
        budget=BUDGET,
        idle=IDLE,
        starts=starts,
        idle_bytes=idle_bytes,
        memory=[(round(at - begin_s, 3), nbytes) for at, nbytes in memory],
        events=[(round(at - begin_s, 3), text) for at, text in events if begin_s <= at <= memory[-1][0]],
    )


def rows(report: Report) -> str:
    """The table of the page."""
    lines = [
        [one.model, one.what, name, seconds(median(times)), seconds(_p99(times)), seconds(min(times))]
        for one in report.starts
        for name, times in (
            ("pipeload serve, idle", one.server_s),
            ("single session, a new process", one.single_s),
            ("pipeload serve, open", one.warm_s),
        )
    ]
    table = markdown_table(("model", "answer", "start", "p50", "p99", "least"), lines)
    rounds = len(report.starts[0].server_s)
    return (
        f"{table}\n\n{rounds} rounds. The idle process had {format_bytes(round(median(report.idle_bytes)))}, at most "
        f"{format_bytes(max(report.idle_bytes))}; with its models it had up to "
        f"{format_bytes(max(nbytes for _, nbytes in report.memory))}."
    )


def figure(report: Report) -> Any:
    """Memory of the process over time, from open to idle and back.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    shown = {"is open": _COLORS[1], "is closed": _COLORS[2], "was replaced": _COLORS[3]}
    drawn = framed(
        "A server whose models become idle, and are called again",
        [
            f"MiniLM and SmolLM2-135M under a budget of {report.budget}, --idle {report.idle}. "
            f"{machine_line(report.machine)}. Vertical lines: what the server's log says.",
        ],
        [
            entry("RSS: memory of the process", color=_COLORS[0], linewidth=2),
            entry("a model is open", color=shown["is open"], linestyle=":"),
            entry("a model is closed", color=shown["is closed"], linestyle=":"),
            entry("the process was replaced", color=shown["was replaced"], linewidth=1.5),
            entry(f"{format_bytes(IDLE_BYTES)}: the most that may stay", color="black", linestyle="--", linewidth=1.2),
        ],
        height=2.7,
    )
    axis = drawn.subplots()
    axis.plot([at for at, _ in report.memory], [nbytes / 1e6 for _, nbytes in report.memory], color=_COLORS[0], lw=2)
    axis.axhline(IDLE_BYTES / 1e6, color="black", linestyle="--", linewidth=1.2)
    for at, text in report.events:
        for words, color in shown.items():
            if words in text:
                axis.axvline(at, color=color, linestyle="-" if words == "was replaced" else ":", linewidth=1.2)
    axis.set_xlabel("seconds", fontsize=9)
    axis.set_ylabel("memory, MB", fontsize=9)
    axis.set_ylim(bottom=0)
    axis.set_xlim(0, report.memory[-1][0])
    plain(axis)
    return drawn


def _there_and_back(server: Server) -> None:
    """Call all models, twice, with an idle server between and at the end."""
    for _ in range(2):
        for case in CASES:
            server.post(case.path, case.body)
        server.wait_until_idle()
        time.sleep(1)


def _single(case: Case, folder: Path) -> tuple[float, Any]:
    """Seconds until a new process has answered, and its answer."""
    begin_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.idle.single", str(folder), case.text],
        cwd=ROOT,
        env=os.environ | {"ORT_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    took_s = time.perf_counter() - begin_s
    if done.returncode:
        raise RunError(f"The single session of {case.name} failed: {done.stderr[-400:]}")
    return took_s, json.loads(done.stdout)


def _check(case: Case, found: Any, right: Any) -> None:
    """Raise RunError if an answer is not that of a single session."""
    if isinstance(right, str):
        same = found == right
    else:
        one, other = (np.array(vector) / np.linalg.norm(vector) for vector in (found, right))
        same = bool(np.abs(one - other).max() <= _SAME)
    if not same:
        raise RunError(f"{case.name} answers {found!r:.80}, and a single session {right!r:.80}.")


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _p99(times: Sequence[float]) -> float:
    return quantiles(times, n=100, method="inclusive")[98]


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command(help=__doc__)(main)

if __name__ == "__main__":
    app()
