"""Stages on nodes: which contiguous range of shards each node runs, and which nodes run none. Pure.

The nodes of a placement form a ring: edges go from one to the next, and the answer goes back to the first. Prefetch
wraps around: a node reads for its next turn while the others compute. So with compute time c_i, reading r_i for each
turn and sending t_i of node i, a pass takes

```
latency   max(sum (c_i + t_i), max r_i)      one pass after another: the tokens of one text
period    max over i of max(c_i, r_i, t_i)   with enough passes in flight that each node always has one
```

The search is exact: labels (sum, largest reading, period) travel over the cuts, for each set of nodes used and the last
of them, and a label that another one equals or beats in all three is dropped. Nodes of one kind are interchangeable,
so only their number matters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from pipeload.errors import ConfigError

__all__ = ["Node", "Placement", "Segment", "Turn", "place_shards"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine that runs a stage.

    Attributes:
        name: its name.
        trusted: may run private shards.
        kind: nodes of equal kinds have equal costs and links; None for a node that is like no other.
    """

    name: str
    trusted: bool = True
    kind: Hashable = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a node does for one pass through its shards.

    Attributes:
        run_s: seconds of computing, while its weights are there.
        read_s: seconds of reading what does not stay in memory; it goes on while other nodes compute.
    """

    run_s: float
    read_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A range of shards on a node.

    Attributes:
        node: its name.
        begin, end: the first shard, and the one after the last.
        run_s, read_s: see `Turn`.
        send_s: seconds until what it made has reached the next node of the ring.
    """

    node: str
    begin: int
    end: int
    run_s: float
    read_s: float
    send_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """All shards on some nodes, in order.

    Attributes:
        segments: one for each node that is used.
        latency_s, period_s: see the module's docstring.
    """

    segments: tuple[Segment, ...]

    @property
    def latency_s(self) -> float:
        """Seconds of one pass after another."""
        return max(
            sum(segment.run_s + segment.send_s for segment in self.segments),
            max(segment.read_s for segment in self.segments),
        )

    @property
    def period_s(self) -> float:
        """Seconds between the ends of passes, with many in flight."""
        return max(max(segment.run_s, segment.read_s, segment.send_s) for segment in self.segments)


Costs: TypeAlias = Callable[[Node, int, int], Turn | None]
"""(node, first shard, shard after the last) -> the node's turn; None where they do not fit into its budget."""

Sends: TypeAlias = Callable[[Node, Node, int], float]
"""(from, to, place) -> seconds to send the edges of the cut before the shard at this place, or behind the last shard
the answer; never called for a node and itself."""


def place_shards(
    nodes: Sequence[Node],
    cuts: Sequence[int],
    count: int,
    cost: Costs,
    send_s: Sends,
    *,
    private: Collection[int] = (),
    latency_share: float = 1.0,
) -> Placement | None:
    """The best placement.

    Args:
        nodes: that could be used.
        cuts: places of shards before which the model may be cut, ascending (`format.stages.cut_places`).
        count: number of shards.
        cost: the time of each node for each range.
        send_s: the time between nodes.
        private: places of shards that only trusted nodes may run: those that see texts and answers.
        latency_share: 1 for the smallest latency, 0 for the smallest period; between, of their weighted sum.

    Returns:
        None where no placement fits the nodes' budgets.

    Raises:
        ConfigError: there are no nodes, two have one name, or the share is not between 0 and 1.
    """
    names = [node.name for node in nodes]
    if not nodes or len(set(names)) < len(names):
        raise ConfigError(f"The nodes are {names}; there must be at least one, and each needs a name of its own.")
    if not 0 <= latency_share <= 1:
        raise ConfigError(f"latency_share is {latency_share}; it must be between 0 (throughput) and 1 (latency).")
    kinds = _kinds(nodes)
    found = [
        path
        for first in range(len(kinds))
        if (path := _Search(kinds, cuts, count, cost, send_s, private, latency_share, first).best()) is not None
    ]
    if not found:
        return None
    best = min(found, key=lambda path: path[0])
    return _placement(kinds, cost, send_s, best[1])


_Kinds: TypeAlias = tuple[tuple[Node, ...], ...]
_Path: TypeAlias = tuple[tuple[int, int, int], ...]
"""(kind, first shard, shard after the last) of each segment."""


@dataclass(frozen=True, slots=True)
class _Label:
    """A beginning of the model that is placed."""

    sum_s: float
    read_s: float
    period_s: float
    path: _Path

    def is_no_better_than(self, other: _Label) -> bool:
        return self.sum_s >= other.sum_s and self.read_s >= other.read_s and self.period_s >= other.period_s


class _Search:
    """The best ring that begins on a node of one kind."""

    def __init__(
        self,
        kinds: _Kinds,
        cuts: Sequence[int],
        count: int,
        cost: Costs,
        send_s: Sends,
        private: Collection[int],
        latency_share: float,
        first: int,
    ) -> None:
        self._kinds, self._send_s, self._share, self._first = kinds, send_s, latency_share, first
        self._places = [0, *cuts, count]
        self._turns = {
            (kind, begin, end): turn
            for kind, alike in enumerate(kinds)
            for number, begin in enumerate(self._places)
            for end in self._places[number + 1 :]
            if alike[0].trusted or not any(begin <= place < end for place in private)
            if (turn := cost(alike[0], begin, end)) is not None
        }

    def best(self) -> tuple[float, _Path] | None:
        """Objective and path; None where nothing fits."""
        count = self._places[-1]
        none_used = (0,) * len(self._kinds)
        # Place -> (used nodes of each kind, kind of the last one) -> labels.
        labels: dict[int, dict[tuple[tuple[int, ...], int], list[_Label]]] = {place: {} for place in self._places}
        for end in self._places[1:]:
            self._extend(labels, (none_used, -1), _Label(0.0, 0.0, 0.0, ()), self._first, 0, end)
        for begin in self._places[1:-1]:
            for state, alive in labels[begin].items():
                for label in alive:
                    for kind in range(len(self._kinds)):
                        for end in self._places[self._places.index(begin) + 1 :]:
                            self._extend(labels, state, label, kind, begin, end)
        done = [self._closed(label, state[1]) for state, alive in labels[count].items() for label in alive]
        return min(((self._objective(label), label.path) for label in done), key=lambda pair: pair[0], default=None)

    def _extend(
        self,
        labels: dict[int, dict[tuple[tuple[int, ...], int], list[_Label]]],
        state: tuple[tuple[int, ...], int],
        label: _Label,
        kind: int,
        begin: int,
        end: int,
    ) -> None:
        used, last = state
        turn = self._turns.get((kind, begin, end))
        if turn is None or used[kind] == len(self._kinds[kind]):
            return
        send_s = self._sending(last, kind, begin) if last >= 0 else 0.0
        longer = _Label(
            label.sum_s + send_s + turn.run_s,
            max(label.read_s, turn.read_s),
            max(label.period_s, send_s, turn.run_s, turn.read_s),
            (*label.path, (kind, begin, end)),
        )
        more = tuple(number + (other == kind) for other, number in enumerate(used))
        known = labels[end].setdefault((more, kind), [])
        if any(longer.is_no_better_than(other) for other in known):
            return
        known[:] = [other for other in known if not other.is_no_better_than(longer)]
        known.append(longer)

    def _closed(self, label: _Label, last: int) -> _Label:
        """The ring, with the answer's way back to its first node."""
        send_s = self._sending(last, self._first, self._places[-1]) if len(label.path) > 1 else 0.0
        return _Label(label.sum_s + send_s, label.read_s, max(label.period_s, send_s), label.path)

    def _sending(self, kind: int, to: int, place: int) -> float:
        # Of two nodes of one kind, these are not the same one.
        return self._send_s(self._kinds[kind][0], self._kinds[to][-1], place)

    def _objective(self, label: _Label) -> float:
        latency_s = max(label.sum_s, label.read_s)
        return self._share * latency_s + (1 - self._share) * label.period_s


def _kinds(nodes: Sequence[Node]) -> _Kinds:
    alone = [(node,) for node in nodes if node.kind is None]
    alike = sorted((node for node in nodes if node.kind is not None), key=lambda node: repr((node.kind, node.trusted)))
    groups = groupby(alike, key=lambda node: (node.kind, node.trusted))
    return (*alone, *(tuple(group) for _, group in groups))


def _placement(kinds: _Kinds, cost: Costs, send_s: Sends, path: _Path) -> Placement:
    left = [list(alike) for alike in kinds]
    used = [left[kind].pop(0) for kind, _, _ in path]
    segments = []
    for number, ((_, begin, end), node) in enumerate(zip(path, used, strict=True)):
        turn, following = cost(node, begin, end), used[(number + 1) % len(used)]
        assert turn is not None
        segments.append(
            Segment(
                node=node.name,
                begin=begin,
                end=end,
                run_s=turn.run_s,
                read_s=turn.read_s,
                send_s=send_s(node, following, end) if following is not node else 0.0,
            )
        )
    return Placement(segments=tuple(segments))
