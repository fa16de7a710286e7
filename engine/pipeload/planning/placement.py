"""Stages on nodes: which contiguous range of shards each node runs, and which nodes run none. Pure.

The nodes of a placement form a ring: edges go from one to the next, and the answer goes back to the first. Prefetch
wraps around: a node reads for its next turn while the others compute, as much as its buffers hold. What else is
streamed it must read within its turn: when the edges arrive, no more than its memory holds can be there. So with c_i
seconds of the turn, computing and this reading, r_i of all reading for a turn, and t_i of sending of node i, a pass
takes

```
latency   max(sum (c_i + t_i), max r_i)      one pass after another: the tokens of one text
period    max over i of max(c_i, r_i, t_i)   with enough passes in flight that each node always has one
```

The search is exact: labels (sum, largest reading, period) travel over the cuts, for each set of nodes used and the last
of them. A label is dropped that another one equals or beats in all three, or that promises no better ring than a known
one, whatever follows. Nodes of one kind are interchangeable, so only their number matters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf
from operator import le
from typing import TypeAlias

import numpy as np

from pipeload.errors import ConfigError

__all__ = ["Node", "Placement", "Segment", "Turn", "place_shards", "priced"]


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
        run_s: seconds from the arrival of the edges until its own are there, after a rest that has filled the buffers.
        read_s: seconds of reading what does not stay in memory, of which the buffers' part goes on in the rest.
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

    def objective(self, latency_share: float) -> float:
        """The weighted sum of both; see `place_shards`."""
        return latency_share * self.latency_s + (1 - latency_share) * self.period_s


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
    search = _Search(kinds, cuts, count, cost, send_s, private, latency_share)
    best: tuple[float, _Path] | None = None
    # What few nodes promise rules most of the placements on more of them out.
    for most in sorted({min(_FEW, len(nodes)), len(nodes)}):
        for first in range(len(kinds)):
            best = search.best(first, most, best)
    return priced(_ranges(kinds, best[1]), cost, send_s) if best is not None else None


def priced(ranges: Sequence[tuple[Node, int, int]], cost: Costs, send_s: Sends) -> Placement | None:
    """A placement with its times; None where a node's shards do not fit into its budget.

    Args:
        ranges: each node in the order of the model, its first shard, and the shard after its last one.
        cost: the time of each node for its range.
        send_s: the time between nodes.
    """
    segments = []
    for number, (node, begin, end) in enumerate(ranges):
        turn, following = cost(node, begin, end), ranges[(number + 1) % len(ranges)][0]
        if turn is None:
            return None
        segments.append(
            Segment(
                node=node.name,
                begin=begin,
                end=end,
                run_s=turn.run_s,
                read_s=turn.read_s,
                send_s=send_s(node, following, end) if following != node else 0.0,
            )
        )
    return Placement(segments=tuple(segments))


_FEW = 3

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

    def followed_by(self, rest: _Label) -> _Label:
        return _Label(
            self.sum_s + rest.sum_s,
            max(self.read_s, rest.read_s),
            max(self.period_s, rest.period_s),
            self.path,
        )


class _Search:
    """The best rings of some nodes."""

    def __init__(
        self,
        kinds: _Kinds,
        cuts: Sequence[int],
        count: int,
        cost: Costs,
        send_s: Sends,
        private: Collection[int],
        latency_share: float,
    ) -> None:
        self._kinds, self._send_s, self._share = kinds, send_s, latency_share
        self._places = [0, *cuts, count]
        self._turns = {
            (kind, begin, end): turn
            for kind, alike in enumerate(kinds)
            for number, begin in enumerate(self._places)
            for end in self._places[number + 1 :]
            if alike[0].trusted or not any(begin <= place < end for place in private)
            if (turn := cost(alike[0], begin, end)) is not None
        }
        self._rests = self._least_rests(sum(len(alike) for alike in kinds))

    def best(self, first: int, most: int, known: tuple[float, _Path] | None) -> tuple[float, _Path] | None:
        """Objective and path of the best ring that begins on a node of one kind, or what is known if it is no worse.

        Args:
            first: the kind.
            most: nodes in the ring.
            known: None where nothing is known to fit.
        """
        limit = known[0] if known is not None else inf
        # Place -> (used nodes of each kind, kind of the last one) -> labels.
        labels: dict[int, dict[tuple[tuple[int, ...], int], list[_Label]]] = {place: {} for place in self._places}
        none_used = (0,) * len(self._kinds)
        for end in self._places[1:]:
            self._extend(labels, (none_used, -1), _Label(0.0, 0.0, 0.0, ()), first, 0, end, most, limit)
        for number, begin in enumerate(self._places[1:-1], 1):
            for state, alive in labels[begin].items():
                for label in alive:
                    for kind in range(len(self._kinds)):
                        for end in self._places[number + 1 :]:
                            self._extend(labels, state, label, kind, begin, end, most, limit)
        for state, alive in labels[self._places[-1]].items():
            for label in alive:
                objective = self._objective(self._closed(label, state[1], first))
                if objective < limit:
                    limit, known = objective, (objective, label.path)
        return known

    def _extend(
        self,
        labels: dict[int, dict[tuple[tuple[int, ...], int], list[_Label]]],
        state: tuple[tuple[int, ...], int],
        label: _Label,
        kind: int,
        begin: int,
        end: int,
        most: int,
        limit: float,
    ) -> None:
        used, last = state
        turn = self._turns.get((kind, begin, end))
        if turn is None or used[kind] == len(self._kinds[kind]):
            return
        send_s = self._sending(last, kind, begin) if last >= 0 else 0.0
        # What has no share in the objective makes no label better than another.
        longer = _Label(
            label.sum_s + send_s + turn.run_s if self._share > 0 else 0.0,
            max(label.read_s, turn.read_s) if self._share > 0 else 0.0,
            max(label.period_s, send_s, turn.run_s, turn.read_s) if self._share < 1 else 0.0,
            (*label.path, (kind, begin, end)),
        )
        rest = self._rests[most - len(longer.path)].get(end)
        if rest is None or self._objective(longer.followed_by(rest)) >= limit:
            return
        more = tuple(number + (other == kind) for other, number in enumerate(used))
        for (others, at), alive in labels[end].items():
            # Fewer nodes leave more for the rest.
            if at == kind and all(map(le, others, more)) and any(longer.is_no_better_than(other) for other in alive):
                return
        known = labels[end].setdefault((more, kind), [])
        known[:] = [other for other in known if not other.is_no_better_than(longer)]
        known.append(longer)

    def _closed(self, label: _Label, last: int, first: int) -> _Label:
        """The ring, with the answer's way back to its first node."""
        send_s = self._sending(last, first, self._places[-1]) if len(label.path) > 1 else 0.0
        return _Label(label.sum_s + send_s, label.read_s, max(label.period_s, send_s), label.path)

    def _sending(self, kind: int, to: int, place: int) -> float:
        # Of two nodes of one kind, these are not the same one.
        return self._send_s(self._kinds[kind][0], self._kinds[to][-1], place)

    def _objective(self, label: _Label) -> float:
        latency_s = max(label.sum_s, label.read_s)
        return self._share * latency_s + (1 - self._share) * label.period_s

    def _least_rests(self, nodes: int) -> list[dict[int, _Label]]:
        """For each number of nodes, place -> what the shards from there on take at least on these.

        Each of the three times is the least by itself, a node may be used again, and sending takes no time.
        """
        number = {place: index for index, place in enumerate(self._places)}
        runs, reads, periods = (np.full((len(number), len(number)), np.inf) for _ in range(3))
        for (_, begin, end), turn in self._turns.items():
            at = number[begin], number[end]
            runs[at] = min(runs[at], turn.run_s)
            reads[at] = min(reads[at], turn.read_s)
            periods[at] = min(periods[at], max(turn.run_s, turn.read_s))
        least = np.full((3, len(number)), np.inf)
        least[:, -1] = 0.0
        rests = []
        for _ in range(nodes + 1):
            labels = [_Label(sum_s, read_s, period_s, ()) for sum_s, read_s, period_s in least.T.tolist()]
            rests.append({place: label for place, label in zip(self._places, labels, strict=True) if label.sum_s < inf})
            following = (
                (runs + least[0]).min(axis=1),
                np.maximum(reads, least[1]).min(axis=1),
                np.maximum(periods, least[2]).min(axis=1),
            )
            least = np.minimum(least, following)
        return rests


def _kinds(nodes: Sequence[Node]) -> _Kinds:
    alone = [(node,) for node in nodes if node.kind is None]
    alike = sorted((node for node in nodes if node.kind is not None), key=lambda node: repr((node.kind, node.trusted)))
    groups = groupby(alike, key=lambda node: (node.kind, node.trusted))
    return (*alone, *(tuple(group) for _, group in groups))


def _ranges(kinds: _Kinds, path: _Path) -> list[tuple[Node, int, int]]:
    left = [list(alike) for alike in kinds]
    return [(left[kind].pop(0), begin, end) for kind, begin, end in path]
