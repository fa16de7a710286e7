"""`pipeload cluster status` shows each node, its stages, and why models moved."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engine.cluster.test_placing import MB, member
from typer.testing import CliRunner

from pipeload.cli import app
from pipeload.cluster.connection import Change, Connection, Status

_STAGE = {
    "model": "bert",
    "sha256": "hash",
    "shards": "a:b",
    "calls": 7,
    "waiting": 2,
    "run_s": 0.0123,
    "read_s": 0.5,
    "slowness": [2.04, 1.0],
    "links": {"tcp://b": 3.04, "tcp://c": 1.0},
}


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The output of the command for these nodes and changes."""

    def run(nodes: list[Status], changes: list[Change], *options: str) -> str:
        @contextmanager
        def connect(*_: object) -> Iterator[Any]:
            yield SimpleNamespace(nodes=lambda: nodes, reconfigurations=lambda: changes)

        monkeypatch.setattr("pipeload.cli.commands.cluster.connect", connect)
        # Tables are as wide as the terminal.
        found = CliRunner().invoke(
            app, ["cluster", "status", "--cluster", "tcp://127.0.0.1:1", *options], env={"COLUMNS": "400"}
        )
        assert found.exit_code == 0, found.output
        return found.output

    return run


def _node(name: str, budget_bytes: int, *stages: dict[str, Any]) -> Status:
    offer = member(name, 400 * MB).offer
    return Status(address=f"tcp://{name}", offer=offer, budget_bytes=budget_bytes, stages=[*stages])


def _change(number: int, after: str | None = "large a:b") -> Change:
    return Change(at_s=1e9, model="bert", before="small a:b", after=after, why=f"Reason {number}.", waited_s=1.25)


def test_nodes_and_changes(status: Any) -> None:
    idle = {**_STAGE, "slowness": None, "links": {}}
    told = status([_node("a", 300 * MB, _STAGE), _node("b", 400 * MB, idle)], [_change(1), _change(2, None)])
    assert "300.0 MB of 400.0 MB" in told
    assert "bert a:b, 7 calls, 2 now, computing 12.3 ms, reading 500.0 ms, 2.0 times slower than at its best" in told
    assert "at its best, sending 3.0 times slower than at its best" in told
    assert told.count("slower than") == 2
    assert "bert: Reason 1. It moved from small a:b to large a:b; calls waited 1.2 s." in told
    assert "bert: Reason 2. It stays on small a:b;" in told


def test_the_latest_ten_changes(status: Any) -> None:
    told = status([_node("a", 400 * MB)], [_change(number) for number in range(12)])
    assert "Reason 1." not in told
    assert "Reason 2." in told
    assert "Reason 11." in told


def test_as_json_all_of_it(status: Any) -> None:
    told = json.loads(status([_node("a", 300 * MB, _STAGE)], [_change(1)], "--json"))
    assert told["nodes"][0]["budget_bytes"] == 300 * MB
    assert told["nodes"][0]["stages"] == [_STAGE]
    assert told["reconfigurations"][0]["why"] == "Reason 1."


def test_changes_of_another_version_are_left_out() -> None:
    good = {"model": "bert", "before": "a", "after": None, "why": "x", "waited_s": 0.0}

    async def get_events(_: str) -> tuple[tuple[float, Any], ...]:
        return (1.0, good), (2.0, {"of": "version 9"}), (3.0, "text")

    connection: Any = SimpleNamespace(_client=SimpleNamespace(get_events=get_events))
    found = asyncio.run(Connection._changes(connection))
    assert [(one.at_s, one.model) for one in found] == [(1.0, "bert")]


def test_cores_of_a_stage_are_told_where_one_is_little(status: Any) -> None:
    cores = "computing on 0, reading on 1"
    nodes = [_node("equal", 400 * MB, _STAGE), _node("unequal", 400 * MB, {**_STAGE, "cores": cores})]
    lines = {line.split()[0]: line.rstrip() for line in status(nodes, []).splitlines() if line.strip()}
    assert "computing on" not in lines["equal"]
    assert lines["unequal"].endswith(cores)
