"""Placements are the best of all, by trying all; nodes that slow the ring are left out; pins hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, permutations
from typing import Any

import pytest

import pipeload
from pipeload.planning import placement
from pipeload.planning.placement import Node, Placement, Segment, Turn, place_shards

_MB = 1_000_000


class _Cluster:
    """Costs of random nodes and links.

    Nodes of one kind have the same figures.
    """

    def __init__(self, seed: int, nodes: int, shards: int, *, kinds: bool = False) -> None:
        chance = random.Random(seed)
        self.shards = [chance.randint(1, 60) * _MB for _ in range(shards)]
        self.edges = [chance.randint(1, 500) * 1000 for _ in range(shards + 1)]
        self.nodes = [
            Node(name=f"node-{number}", trusted=chance.random() < 0.7, kind=chance.randrange(2) if kinds else None)
            for number in range(nodes)
        ]
        figures = {node.name: node.kind if kinds else node.name for node in self.nodes}
        drawn = {key: random.Random(f"{seed} {key}") for key in figures.values()}
        self._budget = {key: one.randint(30, 200) * _MB for key, one in drawn.items()}
        self._read = {key: one.choice((10, 100, 400)) * _MB for key, one in drawn.items()}
        self._speed = {key: one.choice((200, 1000, 4000)) * _MB for key, one in drawn.items()}
        self._key = figures
        self._link_s = chance.choice((0.0, 0.0003, 0.005))
        self._link = {
            (a, b): random.Random(f"{seed} {a} {b}").choice((12, 120)) * _MB
            for a in drawn
            for b in drawn
        }  # fmt: skip

    def cost(self, node: Node, begin: int, end: int) -> Turn | None:
        key = self._key[node.name]
        weights = self.shards[begin:end]
        total, buffers = sum(weights), 2 * max(weights)
        if total <= self._budget[key]:
            return Turn(run_s=total / self._speed[key], read_s=0.0)
        if buffers > self._budget[key]:
            return None
        streamed = total - (self._budget[key] - buffers)
        return Turn(run_s=total / self._speed[key], read_s=streamed / self._read[key])

    def send_s(self, sender: Node, receiver: Node, place: int) -> float:
        assert sender.name != receiver.name
        return self._link_s + self.edges[place] / self._link[self._key[sender.name], self._key[receiver.name]]

    def all_placements(self, cuts: Sequence[int], private: Sequence[int]) -> Iterator[Placement]:
        count = len(self.shards)
        for number in range(1, len(self.nodes) + 1):
            for chosen in combinations(cuts, number - 1):
                places = [0, *chosen, count]
                for ring in permutations(self.nodes, number):
                    segments = []
                    for index, node in enumerate(ring):
                        begin, end = places[index], places[index + 1]
                        turn = self.cost(node, begin, end)
                        if turn is None or (not node.trusted and any(begin <= one < end for one in private)):
                            break
                        following = ring[(index + 1) % number]
                        sent = self.send_s(node, following, end) if number > 1 else 0.0
                        segments.append(
                            Segment(
                                node=node.name, begin=begin, end=end, run_s=turn.run_s, read_s=turn.read_s, send_s=sent
                            )
                        )
                    else:
                        yield Placement(segments=tuple(segments))


def _objective(placement: Placement, latency_share: float) -> float:
    return latency_share * placement.latency_s + (1 - latency_share) * placement.period_s


def _check(cluster: _Cluster, cuts: Sequence[int], private: Sequence[int], latency_share: float) -> bool:
    """Whether there is a placement at all."""
    found = place_shards(
        cluster.nodes,
        cuts,
        len(cluster.shards),
        cluster.cost,
        cluster.send_s,
        private=private,
        latency_share=latency_share,
    )
    best = min(
        (_objective(one, latency_share) for one in cluster.all_placements(cuts, private)),
        default=None,
    )
    if found is None or best is None:
        assert found is None
        assert best is None
        return False
    assert _objective(found, latency_share) == pytest.approx(best, rel=1e-12)
    places = [0, *(segment.end for segment in found.segments)]
    assert [segment.begin for segment in found.segments] == places[:-1]
    assert places[-1] == len(cluster.shards)
    return True


@pytest.mark.parametrize("hundred", range(10))
def test_placements_are_those_of_trying_all(hundred: int) -> None:
    """1,000 random cases: up to four nodes, up to seven shards, some cuts forbidden, some shards private."""
    placed = 0
    for seed in range(100 * hundred, 100 * hundred + 100):
        chance = random.Random(seed)
        shards = chance.randint(1, 7)
        cuts = [place for place in range(1, shards) if chance.random() < 0.85]
        private = chance.choice(([], [0], [0, shards - 1]))
        cluster = _Cluster(seed, chance.randint(1, 4), shards, kinds=chance.random() < 0.5)
        placed += _check(cluster, cuts, private, chance.choice((0.0, 0.3, 1.0)))
    # Else the cases tell nothing.
    assert 50 < placed < 100


def _alike(number: int) -> list[Node]:
    return [Node(name=str(index), kind="board") for index in range(number)]


def _fits(most: int, run_s: float = 0.01, read_s: float = 1.0) -> Callable[[Node, int, int], Turn]:
    """Turns of nodes that hold this many shards."""

    def cost(_: Node, begin: int, end: int) -> Turn:
        return Turn(run_s=run_s * (end - begin), read_s=read_s * max(0, end - begin - most))

    return cost


def test_more_nodes_read_less_until_all_is_resident() -> None:
    turns = [
        found.latency_s
        for number in (1, 2, 4)
        if (found := place_shards(_alike(number), range(1, 40), 40, _fits(10), lambda *_: 0.001))
    ]
    assert turns == [30.0, 10.0, pytest.approx(0.404)]


def test_a_node_that_slows_the_ring_is_left_out() -> None:
    def cost(node: Node, begin: int, end: int) -> Turn:
        return Turn(run_s=(end - begin) * (5.0 if node.name == "slow" else 0.1), read_s=0.0)

    found = place_shards([Node(name="slow"), Node(name="a"), Node(name="b")], [1, 2, 3], 4, cost, lambda *_: 0.01)
    assert found is not None
    assert "slow" not in {segment.node for segment in found.segments}


def test_one_node_is_best_where_links_cost_more_than_they_save() -> None:
    found = place_shards(_alike(4), range(1, 8), 8, _fits(8), lambda *_: 1.0)
    assert found is not None
    assert len(found.segments) == 1


def test_throughput_spreads_what_latency_keeps_together() -> None:
    options = {"cost": _fits(8), "send_s": lambda *_: 0.001}
    together = place_shards(_alike(4), range(1, 8), 8, **options)
    spread = place_shards(_alike(4), range(1, 8), 8, **options, latency_share=0.0)
    assert together is not None
    assert spread is not None
    assert (len(together.segments), len(spread.segments)) == (1, 4)
    assert spread.period_s == pytest.approx(0.02)


def test_private_shards_stay_on_trusted_nodes() -> None:
    nodes = [Node(name="own"), Node(name="rented", trusted=False, kind="rented")]

    def cost(node: Node, begin: int, end: int) -> Turn | None:
        return None if node.name == "own" and end - begin > 4 else Turn(run_s=0.1 * (end - begin), read_s=0.0)

    found = place_shards(nodes, range(1, 8), 8, cost, lambda *_: 0.0, private=[0])
    assert found is not None
    assert found.segments[0].node == "own"
    # A ring that begins and ends on the own node would visit it twice, which none does.
    assert place_shards(nodes, range(1, 8), 8, cost, lambda *_: 0.0, private=[0, 7]) is None


def test_64_nodes_of_one_kind_are_placed() -> None:
    found = place_shards(_alike(64), range(1, 128), 128, _fits(2, run_s=0.0001), lambda *_: 0.0003)
    assert found is not None
    assert len(found.segments) == 64


@pytest.mark.parametrize("latency_share", [0.0, 0.5, 1.0])
def test_eight_nodes_that_all_differ_are_placed_by_few_steps(
    latency_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What few nodes promise rules most placements on more of them out: without that, there are 290,000 steps."""
    steps = 0
    extend = placement._Search._extend

    def counted(*arguments: Any) -> None:
        nonlocal steps
        steps += 1
        extend(*arguments)

    monkeypatch.setattr(placement._Search, "_extend", counted)
    cluster = _Cluster(5, 8, 12)
    assert place_shards(cluster.nodes, range(1, 12), 12, cluster.cost, cluster.send_s, latency_share=latency_share)
    assert steps < 60_000


@pytest.mark.parametrize(
    ("nodes", "share", "fact"),
    [([], 1.0, "at least one"), ([Node(name="a"), Node(name="a")], 1.0, "name of its own"), (_alike(1), 2.0, "is 2.0")],
)
def test_wrong_arguments_are_refused(nodes: list[Node], share: float, fact: str) -> None:
    with pytest.raises(pipeload.ConfigError, match=fact):
        place_shards(nodes, [], 1, _fits(1), lambda *_: 0.0, latency_share=share)


def test_the_objective_weighs_latency_and_period() -> None:
    segments = tuple(
        Segment(node=name, begin=number, end=number + 1, run_s=2.0, read_s=3.0, send_s=0.5)
        for number, name in enumerate("ab")
    )
    found = Placement(segments=segments)
    assert (found.latency_s, found.period_s) == (5.0, 3.0)
    assert [found.objective(share) for share in (1.0, 0.5, 0.0)] == [5.0, 4.0, 3.0]
