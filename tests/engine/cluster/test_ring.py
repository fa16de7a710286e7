"""A ring waits for no node that was lost, and never for ever: calls to its stages are answered here, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engine.cluster.test_placing import MB, member
from tests.engine.harness import PATIENCE_S

import pipeload
from pipeload.cluster import ring as rings
from pipeload.cluster.messages import DisconnectedError, NodeLostError, Place, call
from pipeload.cluster.ring import Ring
from pipeload.cluster.watch import Watch
from pipeload.format import manifest as manifests
from pipeload.planning.placement import Placement, Segment


class _Actor:
    released = False

    def __init__(self, failure: Exception | None) -> None:
        self._failure = failure

    async def exception(self) -> Exception | None:
        return self._failure

    def release(self) -> None:
        self.released = True


class _Nodes:
    """Nodes, and what their stages were called for.

    Attributes:
        calls: (node, method) in the order of the calls.
        silent: methods that are never answered, by node.
        reached: set by each of those.
        actors: of the stages that were opened.
        failure: of those that are opened from now on.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.silent: set[tuple[str, str]] = set()
        self.reached = asyncio.Semaphore(0)
        self.actors: list[_Actor] = []
        self.failure: Exception | None = None

    def submit(self, *_: object, **__: object) -> _Actor:
        self.actors.append(_Actor(self.failure))
        return self.actors[-1]

    def rpc(self, address: str) -> Any:
        """A node, which is asked for one thing by the ring itself: to fetch."""

        async def pipeload_fetch(sha256: str, name: str, shards: str, sources: list[str]) -> None:
            assert not self.actors, "its stage is opened when the files are there"
            assert (sha256, name, sources) == ("sha256", "toy", ["tcp://source"])
            self.calls.append((address, shards))
            if self.failure is not None:
                raise self.failure

        return SimpleNamespace(pipeload_fetch=pipeload_fetch)

    async def call(self, _: object, place: Place, method: str, *__: object) -> Any:
        self.calls.append((place.node, method))
        if (place.node, method) in self.silent:
            self.reached.release()
            await asyncio.Event().wait()
        return {}


def ring_on(
    nodes: _Nodes, watch: Watch, directory: Path, names: str, beside: Ring | None = None, *, fetches: str = ""
) -> Ring:
    """A ring of two nodes, each with half of the shards, which some have to fetch."""
    manifest = manifests.read(directory)
    count = len(manifest.shards)
    places = [0, count // 2, count]
    segments = tuple(
        Segment(node=name, begin=begin, end=end, run_s=0.0, read_s=0.0, send_s=0.0)
        for name, begin, end in zip(names, places[:-1], places[1:], strict=True)
    )
    members = [member(one, MB, models=() if one in fetches else ("sha256",)) for one in names]
    placement = Placement(segments=segments)
    return Ring(nodes, watch, manifest, "sha256", "toy", ["tcp://source", "tcp://b"], placement, members, beside)


@pytest.fixture
def in_a_ring(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a coroutine function with an open ring of the nodes a and b, the nodes, and the watch; it must end.

    The node b has to fetch its shards where `fetches` is true, which may fail.
    """

    def run(
        body: Callable[[Ring, _Nodes, Watch], Awaitable[None]],
        *,
        fetches: bool = False,
        failure: Exception | None = None,
    ) -> None:
        async def main() -> None:
            nodes, watch = _Nodes(), Watch(None)
            nodes.failure = failure
            monkeypatch.setattr(rings, "call", nodes.call)
            made = ring_on(nodes, watch, toy, "ab", fetches="b" if fetches else "")
            await made.start()
            await body(made, nodes, watch)

        asyncio.run(asyncio.wait_for(main(), PATIENCE_S))

    return run


@pytest.mark.parametrize("lost", ["a", "b"])
def test_a_call_ends_with_a_lost_node_and_asks_nothing_of_it(in_a_ring: Callable[..., None], lost: str) -> None:
    async def body(ring: Ring, nodes: _Nodes, watch: Watch) -> None:
        # They never answer: the scheduler alone tells that one of them is gone.
        nodes.silent = {("a", "run"), ("b", "answer")} | {(lost, method) for method in ("forget", "close")}
        call = asyncio.ensure_future(ring.run({}))
        await nodes.reached.acquire()
        await nodes.reached.acquire()
        others = {f"tcp://{name}": member(name, MB).offer for name in {"a", "b"} - {lost}}
        for listener in [*watch.listeners]:
            listener(others)
        with pytest.raises(NodeLostError) as told:
            await call
        assert told.value.address == f"tcp://{lost}"
        # The stages end what they have of the call, but for the lost one.
        assert [node for node, method in nodes.calls if method == "forget"] == [*{"a", "b"} - {lost}]
        await ring.close(told.value)
        assert (lost, "close") not in nodes.calls
        assert {("a", "close"), ("b", "close")} & {*nodes.calls}
        assert all(actor.released for actor in nodes.actors)
        with pytest.raises(NodeLostError):
            await ring.run({})

    in_a_ring(body)


def test_closing_ends_beside_a_node_that_does_not_answer(
    in_a_ring: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rings, "_FAREWELL_S", 0.01)

    async def body(ring: Ring, nodes: _Nodes, watch: Watch) -> None:
        nodes.silent = {("b", "close"), ("a", "run"), ("b", "answer"), ("b", "forget")}
        call = asyncio.ensure_future(ring.run({}))
        await nodes.reached.acquire()
        await ring.close()
        with pytest.raises(pipeload.ClosedError):
            await call
        assert all(actor.released for actor in nodes.actors)
        assert not watch.listeners

    in_a_ring(body)


def test_stages_forget_a_call_that_is_cancelled(in_a_ring: Callable[..., None]) -> None:
    async def body(ring: Ring, nodes: _Nodes, _: Watch) -> None:
        nodes.silent = {("a", "run"), ("b", "answer")}
        call = asyncio.ensure_future(ring.run({}))
        await nodes.reached.acquire()
        await nodes.reached.acquire()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert {("a", "forget"), ("b", "forget")} <= {*nodes.calls}
        nodes.silent.clear()
        assert await ring.run({}) == {}

    in_a_ring(body)


def test_a_call_ends_with_the_scheduler(in_a_ring: Callable[..., None]) -> None:
    async def body(ring: Ring, nodes: _Nodes, watch: Watch) -> None:
        nodes.silent = {("a", "run"), ("b", "answer")}
        call = asyncio.ensure_future(ring.run({}))
        await nodes.reached.acquire()
        for listener in [*watch.listeners]:
            listener(pipeload.ClusterError("the scheduler is gone"))
        with pytest.raises(pipeload.ClusterError, match="the scheduler is gone"):
            await call

    in_a_ring(body)


def test_a_node_that_came_back_is_another_one(in_a_ring: Callable[..., None]) -> None:
    """Its caches and stages are gone, though it has the address and the name of the lost one."""

    async def body(ring: Ring, _: _Nodes, watch: Watch) -> None:
        there = {f"tcp://{name}": member(name, MB).offer for name in ("a", "b")}
        for listener in [*watch.listeners]:
            listener(there)
        assert await ring.run({}) == {}
        again = {**there, "tcp://b": member("b", MB, process="another start").offer}
        for listener in [*watch.listeners]:
            listener(again)
        with pytest.raises(NodeLostError, match="node b"):
            await ring.run({})

    in_a_ring(body)


def test_a_stage_that_stays_where_it_is_belongs_to_both_rings(in_a_ring: Callable[..., None], toy: Path) -> None:
    """Its weights are read once, and it is closed with the last of them."""

    async def body(before: Ring, nodes: _Nodes, watch: Watch) -> None:
        after = ring_on(nodes, watch, toy, "ac", before)
        await after.start()
        assert len(nodes.actors) == 3
        nodes.calls.clear()
        await before.close()
        assert {("a", "part"), ("b", "close")} == {*nodes.calls}
        assert [actor.released for actor in nodes.actors] == [False, True, False]
        assert await after.run({}) == {}
        with pytest.raises(pipeload.ClosedError):
            await before.run({})
        nodes.calls.clear()
        await after.close()
        assert {("a", "close"), ("c", "close")} == {*nodes.calls}
        assert all(actor.released for actor in nodes.actors)

    in_a_ring(body)


def test_a_ring_that_cannot_be_opened_leaves_the_one_before(in_a_ring: Callable[..., None], toy: Path) -> None:
    async def body(before: Ring, nodes: _Nodes, watch: Watch) -> None:
        nodes.failure = pipeload.BudgetError("no room", needed_bytes=2, budget_bytes=1)
        after = ring_on(nodes, watch, toy, "ac", before)
        with pytest.raises(pipeload.BudgetError):
            await after.start()
        assert [actor.released for actor in nodes.actors] == [False, False, True]
        assert ("a", "close") not in nodes.calls
        assert await before.run({}) == {}
        await before.close()
        assert all(actor.released for actor in nodes.actors)
        assert not watch.listeners

    in_a_ring(body)


def test_a_node_that_came_back_has_no_stage_to_take_over(in_a_ring: Callable[..., None], toy: Path) -> None:
    async def body(before: Ring, nodes: _Nodes, watch: Watch) -> None:
        manifest = manifests.read(toy)
        again = [member("a", MB, process="another start", models=("sha256",)), member("b", MB, models=("sha256",))]
        after = Ring(nodes, watch, manifest, "sha256", "toy", [], before.placement, again, before)
        await after.start()
        assert len(nodes.actors) == 3
        await before.close()
        await after.close()

    in_a_ring(body)


def test_a_node_has_its_files_before_its_stage_is_opened(in_a_ring: Callable[..., None], toy: Path) -> None:
    shards = manifests.read(toy).shards

    async def body(ring: Ring, nodes: _Nodes, _: Watch) -> None:
        first, last = shards[len(shards) // 2].name, shards[-1].name
        assert nodes.calls[0] == ("tcp://b", f"{first}:{last}")
        assert await ring.run({}) == {}

    in_a_ring(body, fetches=True)


@pytest.mark.parametrize("failure", [pipeload.ConfigError("no room"), OSError("cut off")])
def test_a_node_that_cannot_fetch_has_one_clear_error(in_a_ring: Callable[..., None], failure: Exception) -> None:
    async def body(*_: object) -> None:
        raise AssertionError("it is open")

    with pytest.raises(pipeload.PipeloadError, match=str(failure)):
        in_a_ring(body, fetches=True, failure=failure)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (OSError("cut off"), NodeLostError),
        (TimeoutError(), NodeLostError),
        (KeyError("no such actor"), NodeLostError),
        # Of a pool that Dask has closed by itself, when its scheduler was lost.
        (RuntimeError("ConnectionPool is closed"), DisconnectedError),
    ],
)
def test_whatever_a_call_meets_is_an_error_of_the_cluster(failure: Exception, kind: type[Exception]) -> None:
    async def actor_execute(**_: object) -> None:
        raise failure

    place = Place(node="a", address="tcp://a", key="stage")
    with pytest.raises(pipeload.ClusterError) as told:
        asyncio.run(call(lambda _: SimpleNamespace(actor_execute=actor_execute), place, "run"))
    assert type(told.value) is kind
