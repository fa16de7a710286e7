"""A link is measured by the fastest messages, once for each start of a node; one that does not answer is assumed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engine.cluster.test_placing import MB, member

import pipeload
from pipeload.cluster import links
from pipeload.cluster.costs import ASSUMED, CALL_S
from pipeload.cluster.links import Link, measured
from pipeload.cluster.node import Node
from pipeload.cluster.nodes import Nodes
from pipeload.cluster.placing import by_hand, place
from pipeload.cluster.route import crossing_bytes, stage_places
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest
from pipeload.measuring.profiler import profile_dims


class _Other:
    """A node at the other end of a link, and the clock of this end.

    Attributes:
        sizes: of the messages that have come.
    """

    def __init__(self, latency_s: float, bytes_per_s: float, waits_s: Iterable[float] = ()) -> None:
        self._latency_s, self._bytes_per_s, self._waits_s = latency_s, bytes_per_s, iter(waits_s)
        self.sizes: list[int] = []
        self.now_s = 100.0

    async def pipeload_take(self, data: bytes) -> int:
        self.sizes.append(len(data))
        self.now_s += 2 * self._latency_s + len(data) / self._bytes_per_s + next(self._waits_s, 0.0)
        return len(data)


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[[_Other], Link]:
    def run(other: _Other) -> Link:
        monkeypatch.setattr(links, "time", SimpleNamespace(perf_counter=lambda: other.now_s))
        return asyncio.run(measured(other))

    return run


@pytest.mark.parametrize(("latency_s", "bytes_per_s"), [(0.0003, 120e6), (0.005, 12e6), (0.05, 1e6)])
def test_a_link_is_found_as_it_is(measure: Callable[[_Other], Link], latency_s: float, bytes_per_s: float) -> None:
    found = measure(_Other(latency_s, bytes_per_s))
    assert found.latency_s == pytest.approx(latency_s)
    assert found.bytes_per_s == pytest.approx(bytes_per_s)


def test_messages_that_had_to_wait_do_not_count(measure: Callable[[_Other], Link]) -> None:
    """The first one opens the connection."""
    waits = [3.0, *[0.1, 0.0] * 20]
    found = measure(_Other(0.001, 100e6, waits))
    assert found.latency_s == pytest.approx(0.001)
    assert found.bytes_per_s == pytest.approx(100e6)


def test_a_slow_link_carries_one_large_message(measure: Callable[[_Other], Link]) -> None:
    fast, slow = _Other(0.001, 100e6), _Other(0.001, 0.5e6)
    measure(fast)
    measure(slow)
    assert [sum(size > 0 for size in one.sizes) for one in (fast, slow)] == [3, 1]


def test_a_clock_that_is_too_coarse_promises_no_link_without_time(measure: Callable[[_Other], Link]) -> None:
    found = measure(_Other(0.01, 1e30))
    assert found.bytes_per_s < 1e9


def test_a_node_measures_each_start_of_another_once(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "toy").symlink_to(toy)
    other = _Other(0.0, 1e9)
    rpc = {"tcp://there": other}
    worker = SimpleNamespace(extensions={}, handlers={}, rpc=rpc.__getitem__)

    async def main() -> None:
        node = Node("node", tmp_path, "8GB", trusted=True)
        node.listen_to(worker)
        ask: Any = worker.handlers["pipeload_links"]
        assert (await ask({"tcp://there": "first", "tcp://gone": "lost"})).keys() == {"tcp://there"}
        once = len(other.sizes)
        await ask({"tcp://there": "first"})
        assert len(other.sizes) == once
        await ask({"tcp://there": "second"})
        assert len(other.sizes) == 2 * once
        await ask({"tcp://there": "second"}, anew=True)
        assert len(other.sizes) == 3 * once
        del rpc["tcp://there"]
        assert (await ask({"tcp://there": "second"}, anew=True)).keys() == {"tcp://there"}, "it stays as it is known"

    asyncio.run(main())


def test_a_client_has_links_measured_anew_of_the_nodes_that_it_names() -> None:
    asked: list[tuple[str, list[str], bool]] = []
    speed = 1e9

    async def call(address: str, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        assert operation == "pipeload_links"
        asked.append((address, [*arguments["others"]], arguments["anew"]))
        if address == "tcp://b":
            raise pipeload.ClusterError("does not answer")
        return {other: {"latency_s": 0.0, "bytes_per_s": speed} for other in arguments["others"]}

    asking: Any = object.__new__(Nodes)
    asking.known_links, asking.call = {}, call
    nodes = [member(name, 900 * MB) for name in "abc"]
    ab, ac = frozenset("ab"), frozenset("ac")
    assert asyncio.run(asking.links(nodes)).keys() == {ab, ac}
    asked.clear()
    asyncio.run(asking.links(nodes))
    assert asked == [("tcp://b", ["tcp://c"], False)], "it has not answered yet"
    asked.clear()
    speed = 1e6
    found = asyncio.run(asking.links(nodes, frozenset("c")))
    assert asked == [("tcp://a", ["tcp://c"], True), ("tcp://b", ["tcp://c"], True)]
    assert (found[ab].bytes_per_s, found[ac].bytes_per_s) == (1e9, 1e6)


@pytest.fixture
def manifest(toy_large: Path) -> Manifest:
    return manifests.read(toy_large)


def test_what_a_placement_promises_is_of_its_links(manifest: Manifest) -> None:
    names = [shard.name for shard in manifest.shards]
    cut = stage_places(manifest)[2]
    stages = {"a": f":{names[cut - 1]}", "b": f"{names[cut]}:"}
    nodes = [member(name, 900 * MB) for name in stages]
    link = Link(latency_s=0.005, bytes_per_s=12e6)
    for known, used in (({}, ASSUMED), ({frozenset("ab"): link}, link)):
        sent = [one.send_s for one in by_hand(manifest, nodes, stages, known).segments]
        assert sent == [
            pytest.approx(
                CALL_S + used.latency_s + crossing_bytes(manifest, place, profile_dims(manifest)) / used.bytes_per_s
            )
            for place in (cut, len(names))
        ]


def test_a_placement_keeps_off_slow_links(manifest: Manifest) -> None:
    nodes = [member(name, 252 * MB) for name in "abc"]
    fast, slow = Link(latency_s=0.0001, bytes_per_s=1e9), Link(latency_s=1.0, bytes_per_s=1e6)
    for good in ("ab", "bc", "ac"):
        known = {frozenset(pair): fast if pair == good else slow for pair in ("ab", "bc", "ac")}
        found = place(manifest, nodes, known, latency_share=0.0)
        assert {segment.node for segment in found.segments} == {*good}
    known = dict.fromkeys(map(frozenset, ("ab", "bc", "ac")), slow)
    assert len(place(manifest, nodes, known, latency_share=0.0).segments) == 1
