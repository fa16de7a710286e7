"""A cluster that was lost is connected to again, and its models are opened again, by the calls that come then."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pipeload
from pipeload.format import manifest as manifests
from pipeload.serve import sources
from pipeload.serve.models import Served
from pipeload.serve.sources import Nodes, OnNodes


class _Connection:
    def __init__(self) -> None:
        self.lost = self.closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[_Connection | Exception]:
    """What connecting gives, one after another."""
    found: list[_Connection | Exception] = []

    def connect(*_: object) -> Any:
        made = found.pop(0)
        if isinstance(made, Exception):
            raise made
        return made

    monkeypatch.setattr(pipeload, "connect", connect)
    return found


def test_a_lost_scheduler_is_connected_to_again(connections: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(sources, "time", SimpleNamespace(monotonic=lambda: now_s))
    first, second = _Connection(), _Connection()
    connections += [first, pipeload.ClusterError("none answers"), second]
    nodes = Nodes("tcp://127.0.0.1:1", None)
    assert nodes.connection() is first
    first.lost = True
    for _ in range(3):
        # The first tries; the others do not wait for tries of their own.
        with pytest.raises(pipeload.ClusterError, match="none answers"):
            nodes.connection()
    assert connections == [second]
    now_s += sources._AGAIN_S
    assert nodes.connection() is second
    assert first.closed
    nodes.close()
    assert second.closed


def test_all_models_of_a_lost_connection_are_lost(connections: list[Any], toy: Path) -> None:
    """Also those that are called when another one has brought about a new connection, which closed the old one."""
    connections += [_Connection(), _Connection()]
    old, new = connections
    for connection in connections:
        connection.manifest = lambda _: manifests.read(toy)
        connection.load = lambda name: name
    nodes = Nodes("tcp://127.0.0.1:1", None)
    one, other = OnNodes(nodes, "one"), OnNodes(nodes, "other")
    assert not one.lost
    for source in (one, other):
        source.load()
        assert not source.lost
    old.lost = True
    assert one.lost
    one.load()
    assert old.closed
    assert (one.lost, other.lost) == (False, True)
    other.load()
    assert not other.lost
    assert not new.closed


class _Model:
    """Of a cluster."""

    stats = SimpleNamespace(passes=1, read_bytes=0)
    closed = False

    def close(self) -> None:
        self.closed = True


class _Source:
    here = False
    made = 0
    lost = False

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.manifest = manifests.read(directory)
        self.models: list[_Model] = []
        monkeypatch.setattr("pipeload.tasks.generate.prompts.tokenizer_if_any", lambda *_, **__: None)

    def load(self) -> Any:
        self.models.append(_Model())
        self.lost = False
        return self.models[-1]


def test_a_model_whose_cluster_was_lost_is_opened_again(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _Source(toy, monkeypatch)

    async def main() -> None:
        with ThreadPoolExecutor(1) as pool:
            served = Served("toy", source, None, pool, {})
            async with served.use() as first:
                pass
            async with served.use() as same:
                assert same is first
                source.lost = True
                # A call that has it still ends with the model's own error.
                async with served.use() as still:
                    assert still is first
            async with served.use() as second:
                assert second is not first
            assert [model.closed for model in source.models] == [True, False]
            assert (served.here, served.there) == (None, second)
            await served.end()

    asyncio.run(main())
