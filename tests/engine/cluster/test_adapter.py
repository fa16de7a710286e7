"""Facts of the nodes become moves: of one that joins, loses memory, slows down or is lost; and nothing else does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engine.cluster.test_placing import MB, member
from tests.engine.harness import PATIENCE_S

import pipeload
from pipeload.cluster import adapter as adapters
from pipeload.cluster.adapter import Adapter, usable_bytes
from pipeload.cluster.costs import Links, Member
from pipeload.cluster.links import Link
from pipeload.cluster.offer import Offer
from pipeload.cluster.placing import have_room_for_both, place
from pipeload.errors import PipeloadError
from pipeload.format import manifest as manifests
from pipeload.planning import adapting
from pipeload.planning.placement import Placement

LOOKS, FORCED_LOOKS = adapting._LOOKS, adapting._FORCED_LOOKS
ENOUGH, TIGHT = 300 * MB, 232 * MB


class _Cluster:
    """Nodes that tell facts, and a model on them whose moves are kept.

    Attributes:
        links: between the nodes, as they would be measured now.
        measured: the nodes whose links were measured anew.
        moves: (why, together, nodes after) of each.
        fails: moves fail.
    """

    def __init__(
        self, directory: Path, budgets: dict[str, int], *, links: Links | None = None, latency_share: float = 1.0
    ) -> None:
        self.manifest = manifests.read(directory)
        self.nodes: dict[str, Member] = {}
        self.watch: Any = SimpleNamespace(budgets={}, facts={}, listeners=set())
        self.links: dict[frozenset[str], Link] = dict(links or {})
        self._known_links: dict[frozenset[str], Link] = dict(self.links)
        self.measured: list[frozenset[str]] = []
        self.asked: list[str] = []
        self.refusal: pipeload.ClusterError | None = None
        self.moves: list[tuple[str, bool, list[str]]] = []
        self.fails = False
        self.now_s = 0.0
        for name, budget_bytes in budgets.items():
            self.join(name, budget_bytes)
        self._stand_on(place(self.manifest, [*self.nodes.values()], links, latency_share=latency_share))
        self.rings: Any = SimpleNamespace(
            present=self.ring, closed=False, lost=frozenset(), notice=None, refuse=self._refuse, move=self._move
        )
        self.adapter = Adapter(
            self.rings,
            self.manifest,
            self.watch,
            "hash",
            latency_share,
            offers=lambda: {one.address: one.offer for one in self.nodes.values()},
            member=self._member,
            links=self._links,
            ring=self._ring,
        )

    @property
    def on(self) -> list[str]:
        return [segment.node for segment in self.ring.placement.segments]

    def join(self, name: str, budget_bytes: int) -> None:
        self.nodes[name] = member(name, budget_bytes)

    def leave(self, name: str) -> None:
        del self.nodes[name]

    def short(self, name: str, nbytes: int) -> None:
        """The memory of a node's machine becomes short."""
        self.watch.budgets[f"tcp://{name}"] = nbytes

    def slow(self, name: str, run: float, read: float = 1.0) -> None:
        self.watch.facts[f"tcp://{name}"] = [{"sha256": "hash", "slowness": [run, read]}]

    def sends(self, sender: str, receiver: str, factor: float) -> None:
        """A stage tells how much longer sending takes than at its best."""
        self.watch.facts[f"tcp://{sender}"] = [
            {"sha256": "hash", "slowness": None, "links": {f"tcp://{receiver}": factor}}
        ]

    def looks(self, number: int) -> None:
        async def main() -> None:
            for _ in range(number):
                self.now_s += 0.5
                await self.adapter.look(self.now_s)
                # Nodes that are asked for their speed answer now.
                for _ in range(5):
                    await asyncio.sleep(0)

        asyncio.run(asyncio.wait_for(main(), PATIENCE_S))

    def _stand_on(self, placement: Placement) -> None:
        used = [self.nodes[segment.node] for segment in placement.segments]
        self.ring: Any = SimpleNamespace(placement=placement, members=used)

    async def _links(self, _: Sequence[Member], anew: frozenset[str]) -> Links:
        if anew:
            self.measured.append(anew)
        self._known_links |= {pair: link for pair, link in self.links.items() if pair & anew}
        return {**self._known_links}

    async def _member(self, address: str, _: Offer) -> Member | PipeloadError:
        self.asked.append(address)
        return next(one for one in self.nodes.values() if one.address == address)

    def _ring(self, placement: Placement, members: Sequence[Member], _: Links, beside: Any) -> Any:
        assert beside is self.ring
        assert {segment.node for segment in placement.segments} <= {one.offer.name for one in members}
        return placement

    def _move(self, seen: Any, prepare: Callable[[Any], Any], why: str, *, together: bool) -> bool:
        assert seen is self.ring
        placement = prepare(seen)
        self.moves.append((why, together, [segment.node for segment in placement.segments]))
        if not self.fails:
            self._stand_on(placement)
            self.rings.present = self.ring
        return not self.fails

    def _refuse(self, error: pipeload.ClusterError | None) -> None:
        self.refusal = error


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time when a move has ended."""
    made = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(adapters, "time", SimpleNamespace(monotonic=lambda: made.now_s))
    return made


def test_nodes_that_stay_as_they_are_change_nothing(toy_large: Path) -> None:
    cluster = _Cluster(toy_large, {"a": ENOUGH, "b": TIGHT})
    cluster.short("a", ENOUGH - 3 * MB)
    cluster.slow("a", 1.2)
    cluster.looks(50)
    assert cluster.moves == []
    assert sorted(cluster.asked) == ["tcp://a", "tcp://b"]


def test_a_node_that_joins_is_used_where_that_pays(toy_large: Path) -> None:
    cluster = _Cluster(toy_large, {"a": TIGHT})
    assert cluster.ring.placement.segments[0].read_s > 0
    cluster.looks(5)
    cluster.join("b", ENOUGH)
    cluster.looks(LOOKS + 2)
    ((why, together, after),) = cluster.moves
    assert after == ["b"]
    assert together
    assert "The node b has joined" in why
    assert "less time" in why
    cluster.looks(100)
    assert len(cluster.moves) == 1


def test_a_node_that_joins_and_promises_nothing_is_not_used(toy_large: Path) -> None:
    cluster = _Cluster(toy_large, {"a": ENOUGH})
    cluster.join("b", ENOUGH)
    cluster.looks(50)
    assert cluster.moves == []


def test_a_node_that_loses_memory_is_relieved(toy_large: Path) -> None:
    cluster = _Cluster(toy_large, {"a": ENOUGH, "b": ENOUGH - 20 * MB})
    first = cluster.on[0]
    other = "b" if first == "a" else "a"
    assert cluster.on == [first]
    cluster.looks(3)
    # Its stage has no room any more, so it is left soon, and not held beside another one there.
    cluster.short(first, 100 * MB)
    cluster.looks(FORCED_LOOKS)
    ((why, together, after),) = cluster.moves
    assert after == [other]
    assert together
    assert f"the node {first} may use" in why.lower()
    assert "no place" in why


def test_a_slow_node_is_relieved_and_not_taken_again_at_once(toy_large: Path, clock: SimpleNamespace) -> None:
    cluster = _Cluster(toy_large, {"a": ENOUGH, "b": ENOUGH})
    (first,) = cluster.on
    cluster.looks(3)
    cluster.slow(first, 4.0)
    cluster.looks(LOOKS)
    ((why, _, after),) = cluster.moves
    assert after == ["b" if first == "a" else "a"]
    assert "4.0 times as long" in why
    # It runs nothing now, and tells nothing.
    cluster.watch.facts.clear()
    clock.now_s = cluster.now_s
    cluster.looks(200)
    assert len(cluster.moves) == 1


def test_slow_storage_counts_where_weights_are_read(toy_large: Path) -> None:
    cluster = _Cluster(toy_large, {"a": TIGHT + 4 * MB, "b": TIGHT})
    assert cluster.on == ["a"]
    cluster.looks(3)
    cluster.slow("a", 1.0, read=5.0)
    cluster.looks(LOOKS)
    assert len(cluster.moves) == 1


FAST = Link(latency_s=1e-5, bytes_per_s=1e9)


def test_a_slow_link_is_measured_and_left(toy_large: Path, clock: SimpleNamespace) -> None:
    links = dict.fromkeys(map(frozenset, combinations("abc", 2)), FAST)
    cluster = _Cluster(toy_large, dict.fromkeys("abc", 252 * MB), links=links, latency_share=0.0)
    first, second, *_ = cluster.on
    cluster.looks(3)
    cluster.sends(first, second, 50.0)
    slow = Link(latency_s=1.0, bytes_per_s=1e6)
    cluster.links |= {pair: slow for pair in links if second in pair}
    cluster.looks(FORCED_LOOKS - 1)
    assert cluster.measured == []
    cluster.looks(LOOKS)
    assert cluster.measured == [{first, second}]
    ((why, _, after),) = cluster.moves
    assert second not in after, "its other links are slow too, and were measured with this one"
    assert f"sending between the nodes {' and '.join(sorted((first, second)))} takes" in why.lower()
    assert "as long as before" in why
    # It carries nothing now, and tells nothing.
    cluster.watch.facts.clear()
    clock.now_s = cluster.now_s
    cluster.looks(200)
    assert len(cluster.measured) == len(cluster.moves) == 1


def test_messages_that_took_longer_for_another_reason_move_nothing(toy_large: Path) -> None:
    """The link is as it was."""
    links = dict.fromkeys(map(frozenset, combinations("abc", 2)), FAST)
    cluster = _Cluster(toy_large, dict.fromkeys("abc", 252 * MB), links=links, latency_share=0.0)
    first, second, *_ = cluster.on
    cluster.looks(3)
    cluster.sends(first, second, 50.0)
    cluster.looks(100)
    assert cluster.measured == [{first, second}]
    assert cluster.moves == []


def test_links_of_other_models_and_of_nodes_that_have_left_tell_nothing(toy_large: Path) -> None:
    cluster = _Cluster(toy_large, {"a": ENOUGH, "b": ENOUGH})
    cluster.sends("a", "gone", 50.0)
    cluster.sends("gone", "a", 50.0)
    cluster.watch.facts["tcp://b"] = [{"sha256": "other", "slowness": None, "links": {"tcp://a": 50.0}}]
    cluster.looks(20)
    assert cluster.measured == []


def test_where_nothing_has_room_calls_get_one_clear_error(toy_large: Path) -> None:
    cluster = _Cluster(toy_large, {"a": ENOUGH})
    cluster.short("a", 100 * MB)
    cluster.looks(FORCED_LOOKS + 1)
    assert cluster.moves == []
    assert cluster.refusal is not None
    assert "smallest budget of a node that works" in str(cluster.refusal)
    cluster.short("a", ENOUGH)
    cluster.looks(1)
    assert cluster.refusal is None


def test_a_node_that_is_asked_for_its_speed_may_have_room(toy_large: Path) -> None:
    cluster = _Cluster(toy_large, {"a": ENOUGH})
    cluster.looks(2)
    cluster.join("b", ENOUGH)
    told, answered = cluster._member, asyncio.Event()

    async def measured_first(address: str, offer: Offer) -> Member | PipeloadError:
        await answered.wait()
        return await told(address, offer)

    cluster.adapter._member = measured_first
    cluster.short("a", 100 * MB)

    async def main() -> None:
        for number in range(4 * FORCED_LOOKS):
            if number == 2 * FORCED_LOOKS:
                assert cluster.refusal is None
                answered.set()
            await cluster.adapter.look(100.0 + number / 2)
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    assert cluster.refusal is None
    assert cluster.on == ["b"]


def test_a_lost_node_of_an_idle_model_is_replaced(toy_large: Path) -> None:
    """No call has met it. Where one does, the call places the model anew at once."""
    cluster = _Cluster(toy_large, {"a": ENOUGH, "b": ENOUGH})
    (first,) = cluster.on
    cluster.looks(3)
    cluster.leave(first)
    cluster.looks(FORCED_LOOKS)
    ((why, _, after),) = cluster.moves
    assert after == ["b" if first == "a" else "a"]
    assert f"The node {first} is there no more" in why


def test_a_move_that_failed_is_tried_again_later(toy_large: Path, clock: SimpleNamespace) -> None:
    cluster = _Cluster(toy_large, {"a": TIGHT})
    cluster.looks(3)
    cluster.join("b", ENOUGH)
    cluster.fails = True
    clock.now_s = cluster.now_s
    cluster.looks(LOOKS + 10)
    assert len(cluster.moves) == 1
    cluster.fails = False
    cluster.looks(200)
    assert len(cluster.moves) == 2
    assert cluster.on == ["b"]


def test_a_forced_move_that_failed_is_not_tried_at_each_look(toy_large: Path, clock: SimpleNamespace) -> None:
    cluster = _Cluster(toy_large, {"a": ENOUGH, "b": ENOUGH})
    (first,) = cluster.on
    cluster.looks(3)
    cluster.short(first, 100 * MB)
    cluster.fails = True
    clock.now_s = cluster.now_s
    cluster.looks(5 * FORCED_LOOKS)
    assert len(cluster.moves) == 1


def test_predictions_are_made_when_something_has_changed(toy_large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    search = adapters.place

    def counted(*arguments: Any, **options: Any) -> Placement:
        made.append(arguments)
        return search(*arguments, **options)

    monkeypatch.setattr(adapters, "place", counted)
    cluster = _Cluster(toy_large, {"a": ENOUGH, "b": TIGHT})
    cluster.looks(20)
    assert len(made) == 1
    cluster.short("b", TIGHT // 2)
    cluster.looks(20)
    assert len(made) == 2


def test_two_stages_of_one_node_need_room_for_both(toy_large: Path) -> None:
    manifest = manifests.read(toy_large)
    members = [member(name, ENOUGH) for name in "ab"]
    whole = place(manifest, members)
    (node,) = [segment.node for segment in whole.segments]
    halves = pipeload.cluster.placing.by_hand(manifest, members, {"a": ":block.003", "b": "block.004:"})  # type: ignore[attr-defined]
    assert have_room_for_both(manifest, members, whole, whole)
    assert have_room_for_both(manifest, members, whole, halves)
    tight = [one.now(manifest, 205 * MB, (1.0, 1.0)) for one in members]
    assert have_room_for_both(manifest, tight, whole, whole), "it is the same stage"
    assert not have_room_for_both(manifest, tight, whole, halves)
    assert node in {"a", "b"}


def test_memory_that_swings_a_little_is_the_same_budget() -> None:
    offer = member("a", 400 * MB).offer
    assert usable_bytes(offer, 500 * MB) == 400 * MB
    assert usable_bytes(offer, 393 * MB) == 400 * MB
    assert usable_bytes(offer, 365 * MB) == usable_bytes(offer, 361 * MB) == 360 * MB
    assert usable_bytes(offer, 0) == 0


def test_a_node_that_cannot_tell_its_speed_takes_no_part(toy_large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = _Cluster(toy_large, {"a": TIGHT})
    cluster.looks(1)
    told = cluster._member

    async def refuse(address: str, offer: Offer) -> Member | PipeloadError:
        if address == "tcp://b":
            cluster.asked.append(address)
            return pipeload.ClusterError("does not answer")
        return await told(address, offer)

    cluster.adapter._member = refuse

    async def main() -> None:
        cluster.join("b", ENOUGH)
        for number in range(2 * LOOKS):
            await cluster.adapter.look(number / 2)
            await asyncio.sleep(0)
        for asking in cluster.adapter._asking.values():
            asking.cancel()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    assert cluster.moves == []
    assert cluster.asked.count("tcp://b") == 1


def test_a_call_without_room_waits_for_the_move_or_for_some_looks(toy_large: Path) -> None:
    cluster = _Cluster(toy_large, {"a": ENOUGH, "b": ENOUGH})
    (first,) = cluster.on

    async def main() -> None:
        running = asyncio.ensure_future(cluster.adapter.run())

        async def looks_until(waiting: asyncio.Future[None]) -> None:
            while not waiting.done():
                for listener in [*cluster.watch.listeners]:
                    listener({})
                await asyncio.sleep(0)

        while cluster.rings.notice is None:
            await asyncio.sleep(0)
        # Nothing has changed at the nodes.
        await looks_until(asyncio.ensure_future(cluster.adapter.notice()))
        assert cluster.moves == []
        cluster.short(first, 100 * MB)
        await looks_until(asyncio.ensure_future(cluster.adapter.notice()))
        assert len(cluster.moves) == 1
        waiting = asyncio.ensure_future(cluster.adapter.notice())
        await asyncio.sleep(0)
        running.cancel()
        await waiting

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_looking_ends_with_the_model_and_a_fault_of_it_is_told(
    toy_large: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = _Cluster(toy_large, {"a": ENOUGH})

    async def until_closed() -> None:
        running = asyncio.ensure_future(cluster.adapter.run())
        await asyncio.sleep(0)
        cluster.rings.closed = True
        for listener in [*cluster.watch.listeners]:
            listener({})
        await running
        assert not cluster.watch.listeners

    asyncio.run(asyncio.wait_for(until_closed(), PATIENCE_S))
    cluster = _Cluster(toy_large, {"a": ENOUGH})
    cluster.watch.facts = None

    async def failing() -> None:
        running = asyncio.ensure_future(cluster.adapter.run())
        while not running.done():
            for listener in [*cluster.watch.listeners]:
                listener({})
            await asyncio.sleep(0)
        assert not cluster.watch.listeners

    with caplog.at_level(logging.ERROR, "pipeload.cluster"):
        asyncio.run(asyncio.wait_for(failing(), PATIENCE_S))
    assert "stays where it is" in caplog.text
