"""Throughput and times of `pipeload serve` beside other servers of the same models, under the same caps.

The servers of a part and a cap run beside each other, idle but for one: they get load in turns. A server has a place to
rest between two turns, until it answers a request at once, so that no turn pays for the one before it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from rich.console import Console

import pipeload
from benchmarks.models import ROOT
from benchmarks.serving.programs.clients import Order, Seen, Told
from benchmarks.serving.servers import CONTENDERS, EMBEDDER, Limits, Models, Server, run_server
from benchmarks.serving.workload import ANSWER_TOKENS, PARTS, QUESTIONS, TEXTS, Kind, chat_body
from benchmarks.study import markdown_table
from pipeload.bench.launch import child_environment
from pipeload.bench.machine import machine_facts
from pipeload.bench.spec import from_json, to_json
from pipeload.bench.table import seconds
from pipeload.errors import RunError
from pipeload.machine.sizes import format_bytes

__all__ = ["Case", "Record", "Report", "compare", "put_under_load", "rows", "summarise"]

ROUNDS = 2
_REST_S = 60.0
_QUIET_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A part under a cap.

    Attributes:
        part: see `PARTS`.
        cap_bytes: the cgroup's limit.
    """

    part: str
    cap_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One server's figures for one number of clients and one kind of requests.

    Attributes:
        part, cap_bytes: see `Case`.
        contender: the server.
        clients: that asked without a pause.
        kind: of the requests.
        seconds: of load.
        requests_per_s: answers that ended within those seconds.
        items_per_s: tokens of chats, texts of embeddings.
        first_s: median and 99th percentile of the time to a chat's first text.
        total_s: the same of the time of a whole answer.
        count: requests behind these.
        unfinished: requests among them that were given up some time after the load had ended; they count with the
            time that they had lasted.
        faults: other requests without an answer, by kind.
        wrong: answers that are not the expected ones.
        peak_bytes: of the cgroup, page cache included, up to the end of the last turn.
        peak_rss_bytes: of the process.
        resident_bytes, streamed_bytes: of pipeload's weights.
        killed, message: why there are no figures.
    """

    part: str
    cap_bytes: int
    contender: str
    clients: int
    kind: Kind
    seconds: float = 0.0
    requests_per_s: float = 0.0
    items_per_s: float = 0.0
    first_s: tuple[float, float] | None = None
    total_s: tuple[float, float] | None = None
    count: int = 0
    unfinished: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    wrong: int = 0
    peak_bytes: int | None = None
    peak_rss_bytes: int | None = None
    resident_bytes: int | None = None
    streamed_bytes: int | None = None
    killed: bool = False
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of the comparison.

    Attributes:
        machine: the one that it ran on.
        disk_bytes_per_s: the throttle of reads.
        turn_s: seconds of one turn.
        rounds: turns of each.
        grace_s: see `Order`.
        records: one for each case, server, number of clients and kind.
    """

    machine: dict[str, Any]
    disk_bytes_per_s: int | None
    turn_s: float
    rounds: int
    grace_s: float
    records: tuple[Record, ...] = ()

    @property
    def ok(self) -> bool:
        """Pipeload answered every request, rightly, and stayed below every cap."""
        ours = [record for record in self.records if record.contender == "pipeload"]
        return all(
            record.count
            and not (record.killed or record.faults or record.wrong)
            and (record.peak_rss_bytes or 0) <= record.cap_bytes
            for record in ours
        )


@dataclass(frozen=True, slots=True)
class _Expected:
    """Right answers of a part: server -> question -> text; vectors of all texts."""

    answers: Mapping[str, dict[int, str]]
    vectors: tuple[tuple[float, ...], ...]


def compare(
    cases: Sequence[Case],
    *,
    clients: Sequence[int],
    minutes: float,
    grace_s: float,
    disk_bytes_per_s: int | None,
    environments: Path,
    console: Console,
) -> Report:
    """Put all servers under load.

    Args:
        cases: parts and caps.
        clients: numbers of clients.
        minutes: of load, all together.
        grace_s: answers that have begun when a turn ends may take this long.
        disk_bytes_per_s: the throttle of reads.
        environments: folder of the other servers' virtual environments.
        console: gets a line for each turn.

    Raises:
        RunError: another server is not installed, or one does not run without a cap.
    """
    turns = ROUNDS * len(clients) * sum(len(CONTENDERS[case.part]) for case in cases)
    turn_s = 60 * minutes / turns
    with tempfile.TemporaryDirectory(prefix="pipeload-serving-") as folder:
        parts = {case.part for case in cases}
        models = Models.prepared(parts, environments, Path(folder), disk_bytes_per_s, console)
        expected = {part: _expected(part, models) for part in sorted(parts)}
        records: list[Record] = []
        for case in cases:
            console.print(f"{case.part} in {format_bytes(case.cap_bytes)}", highlight=False)
            records += _run(case, models, expected[case.part], clients, turn_s, grace_s, disk_bytes_per_s, console)
    return Report(
        machine=machine_facts(),
        disk_bytes_per_s=disk_bytes_per_s,
        turn_s=turn_s,
        rounds=ROUNDS,
        grace_s=grace_s,
        records=tuple(records),
    )


def rows(report: Report) -> str:
    """The table of the page."""
    lines = []
    for record in report.records:
        unit = "tokens/s" if record.kind == "chat" else "texts/s"
        first, total = record.first_s, record.total_s
        lines.append(
            [
                record.part if record.part == record.kind else f"{record.part}, {record.kind}",
                format_bytes(record.cap_bytes),
                str(record.clients),
                record.contender,
                _rate(record),
                f"{record.items_per_s:.1f} {unit}" if record.count else "-",
                f"{seconds(first[0])}, {seconds(first[1])}" if first else "-",
                f"{seconds(total[0])}, {seconds(total[1])}" if total else "-",
                str(record.unfinished) if record.count else "-",
                ", ".join(f"{count} x {name}" for name, count in record.faults.items()) or "0",
                str(record.wrong) if record.count else "-",
                format_bytes(record.peak_bytes) if record.peak_bytes else "-",
                format_bytes(record.peak_rss_bytes) if record.peak_rss_bytes else "-",
            ]
        )
    names = (
        "load",
        "cap",
        "clients",
        "server",
        "requests/s",
        "items",
        "first token, p50 and p99",
        "whole, p50 and p99",
    )
    return markdown_table(
        (*names, "unfinished", "errors", "other answers", "peak of the cgroup", "of the process"), lines
    )


def _rate(record: Record) -> str:
    if record.killed:
        return "killed"
    return f"{record.requests_per_s:.2f}" if record.count else f"no: {(record.message or '').partition(':')[0]}"


def _expected(part: str, models: Models) -> _Expected:
    """Each server's own greedy answers, and the vectors of pipeload's library, without a cap and without load."""
    answers: dict[str, dict[int, str]] = {}
    vectors: tuple[tuple[float, ...], ...] = ()
    free = Limits(cap_bytes=None, disk_bytes_per_s=None)
    if "chat" in PARTS[part]:
        for name in CONTENDERS[part]:
            with run_server(name, part, models, free) as server:
                if server.failure:
                    raise RunError(f"{name} does not run without a cap: {server.failure}")
                answers[name] = {index: _answer(server.address, index) for index in range(len(QUESTIONS))}
    if "embeddings" in PARTS[part]:
        directory = next(one.shards for one in models.of(part) if one.name == EMBEDDER)
        with pipeload.load(directory, "4GB") as model:
            vectors = tuple(tuple(map(float, vector)) for vector in model.embed(list(TEXTS)))
    return _Expected(answers, vectors)


def _answer(address: str, index: int) -> str:
    body = chat_body(index, max(ANSWER_TOKENS)) | {"stream": False}
    answer = httpx2.post(f"{address}/v1/chat/completions", json=body, timeout=_REST_S).raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


def _run(
    case: Case,
    models: Models,
    expected: _Expected,
    clients: Sequence[int],
    turn_s: float,
    grace_s: float,
    disk_bytes_per_s: int | None,
    console: Console,
) -> list[Record]:
    seen: dict[tuple[int, str], list[Seen]] = {}
    with ExitStack() as stack:
        limits = Limits(cap_bytes=case.cap_bytes, disk_bytes_per_s=disk_bytes_per_s)
        servers = [stack.enter_context(run_server(name, case.part, models, limits)) for name in CONTENDERS[case.part]]
        failures: dict[str, str] = {server.name: server.failure for server in servers if server.failure}
        for turn, count, server in itertools.product(range(ROUNDS), clients, servers):
            if server.name in failures:
                continue
            order = Order(
                address=server.address,
                part=case.part,
                clients=count,
                seconds=turn_s,
                grace_s=grace_s,
                seed=turn,
                answers=expected.answers.get(server.name, {}),
                vectors=expected.vectors if "embeddings" in PARTS[case.part] else (),
            )
            told = put_under_load(order)
            seen.setdefault((count, server.name), []).extend(told.seen)
            console.print(f"  {count:3} clients {server.name:10}{_turn(told, turn_s)}", highlight=False)
            if failure := _rested(server, case.part):
                failures[server.name] = failure
        records = []
        for count, server, kind in itertools.product(clients, servers, PARTS[case.part]):
            bare = Record(
                part=case.part,
                cap_bytes=case.cap_bytes,
                contender=server.name,
                clients=count,
                kind=kind,
                peak_bytes=server.child.peak_bytes(),
                peak_rss_bytes=server.peak_rss_bytes(),
                killed=server.killed,
                message=failures.get(server.name),
                **_weights(server),
            )
            own = [one for one in seen.get((count, server.name), []) if one.kind == kind]
            records.append(summarise(bare, own, ROUNDS * turn_s))
    return records


def put_under_load(order: Order) -> Told:
    """Run clients in a process of their own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(to_json(order))
        file.flush()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.serving.programs.clients", file.name],
            env=child_environment(None) | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])},
            capture_output=True,
            check=False,
        )
    if done.returncode:
        raise RunError(f"The clients failed: {done.stderr.decode().strip().splitlines()[-1]}")
    return from_json(done.stdout, Told)


def _rested(server: Server, part: str) -> str | None:
    """Wait until the server answers one request of each kind in a short time. Returns why it does not."""
    end_s = time.monotonic() + _REST_S
    while time.monotonic() < end_s:
        begin_s = time.monotonic()
        try:
            for kind in PARTS[part]:
                if kind == "chat":
                    path, body = "/v1/chat/completions", chat_body(0, 1)
                else:
                    path, body = "/v1/embeddings", {"model": "minilm", "input": TEXTS[0]}
                httpx2.post(f"{server.address}{path}", json=body, timeout=_REST_S).raise_for_status()
        except httpx2.HTTPError as error:
            if not server.alive:
                return "killed" if server.killed else "It has ended."
            fault = type(error).__name__
            time.sleep(1)
        else:
            fault = "It is slow."
            if time.monotonic() - begin_s < _QUIET_S * len(PARTS[part]):
                return None
    # It may be that slow at its best: the next turn shows it.
    return None if fault == "It is slow." else f"It did not answer after its load: {fault}"


def summarise(bare: Record, seen: Sequence[Seen], load_s: float) -> Record:
    """The record of what the clients have seen."""
    timed = [one for one in seen if one.fault in (None, "unfinished")]
    faults = Counter(one.fault for one in seen if one.fault not in (None, "unfinished"))
    bare = replace(bare, faults={str(name): count for name, count in faults.items()})
    if not timed or bare.killed:
        return bare
    return replace(
        bare,
        seconds=load_s,
        requests_per_s=sum(one.done for one in timed) / load_s,
        items_per_s=sum(one.items for one in timed) / load_s,
        first_s=_percentiles([one.first_s or one.total_s for one in timed]) if bare.kind == "chat" else None,
        total_s=_percentiles([one.total_s for one in timed]),
        count=len(timed),
        unfinished=sum(one.fault == "unfinished" for one in timed),
        wrong=sum(one.fault is None and not one.right for one in timed),
    )


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(np.array(values), [50, 99])
    return float(low), float(high)


def _turn(told: Told, turn_s: float) -> str:
    done = sum(one.done for one in told.seen) / turn_s
    faults = Counter(one.fault for one in told.seen if one.fault)
    wrong = sum(one.fault is None and not one.right for one in told.seen)
    return f"{done:7.2f} requests/s, {dict(faults) or 'no errors'}, {wrong} other answers"


def _weights(server: Server) -> dict[str, int]:
    """Pipeload's own figures of its weights."""
    if server.name != "pipeload" or not server.alive:
        return {}
    text = httpx2.get(f"{server.address}/metrics", timeout=_REST_S).text
    found = {"resident_bytes": 0, "streamed_bytes": 0}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        key = name.partition("{")[0].removeprefix("pipeload_")
        if key in found:
            found[key] += int(float(value))
    return found
