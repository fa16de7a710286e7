"""Offers and speeds -> which node runs which stage, and what that promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from math import inf
from typing import TypeAlias

import numpy as np

from pipeload.cluster.links import Link
from pipeload.cluster.offer import Offer
from pipeload.cluster.route import crossing_bytes, stage_places
from pipeload.cluster.store import files_of
from pipeload.decode import Decoding
from pipeload.errors import BudgetError, ClusterError, ConfigError
from pipeload.format.manifest import Manifest
from pipeload.format.stages import stage, stage_of
from pipeload.machine.sizes import format_bytes
from pipeload.measuring.profiler import profile_dims
from pipeload.opening import first_needs
from pipeload.planning import needs, planner
from pipeload.planning.needs import Needs
from pipeload.planning.placement import Node, Placement, Turn, place_shards, priced
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.rates import Rates

__all__ = ["ASSUMED", "CALL_S", "Links", "Member", "by_hand", "have_room_for_both", "place", "placed", "planned"]

_FETCHED_GAIN = 1.1
CALL_S = 0.002
"""A message from node to node, on the software's side."""
ASSUMED = Link(latency_s=0.0, bytes_per_s=110e6)
"""A link that could not be measured: gigabit Ethernet."""

Links: TypeAlias = Mapping[frozenset[str], Link]
"""Names of two nodes -> the link between them; those that are missing are assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A node that has a model, or can fetch it.

    Attributes:
        address: where it listens.
        offer: its own.
        speed: of the model there, as it is now.
        fetches: it has not all of the model, and takes shards from other nodes.
        slowness: how many times as long computing and reading take as by the speed that the node has told.
        turns: kinds of shards -> what a stage of them costs there, once it is known: finding out takes a tenth of a
            second each, and a model is placed anew when a node is lost.
        needed: kinds of shards -> the smallest budget that works for a stage of them.
        others: the node with other budgets and slowness.
    """

    address: str
    offer: Offer
    speed: Profile
    fetches: bool = False
    slowness: tuple[float, float] = (1.0, 1.0)
    turns: dict[Hashable, Turn | None] = field(default_factory=dict, compare=False, repr=False)
    needed: dict[Hashable, int] = field(default_factory=dict, compare=False, repr=False)
    others: dict[Hashable, Member] = field(default_factory=dict, compare=False, repr=False)

    def now(self, manifest: Manifest, budget_bytes: int, slowness: tuple[float, float]) -> Member:
        """The node with another budget, and slower than it has told.

        Args:
            manifest: the model.
            budget_bytes: what it may use.
            slowness: see above.
        """
        if (budget_bytes, slowness) == (self.offer.budget_bytes, self.slowness):
            return self
        key = budget_bytes, slowness
        if key not in self.others:
            self.others[key] = replace(
                self,
                offer=replace(self.offer, budget_bytes=budget_bytes),
                speed=_slowed(manifest, self.speed, *slowness),
                slowness=slowness,
                turns={},
                others={},
            )
        return self.others[key]


def place(
    manifest: Manifest, members: Sequence[Member], links: Links | None = None, *, latency_share: float = 1.0
) -> Placement:
    """The best placement of a model on nodes.

    The first and the last shard, which see texts and answers, are placed on trusted nodes only. Fetching shards takes
    time and disk, so nodes that would have to are used where that saves more than a tenth.

    Args:
        manifest: the model.
        members: nodes that have it, or can fetch it.
        links: between them.
        latency_share: see `planning.placement.place_shards`.

    Raises:
        ClusterError: no placement fits the nodes' budgets; the message names the smallest budget that works.
    """
    links = links or {}
    found = _best(manifest, members, links, latency_share)
    owners = [member for member in members if not member.fetches]
    if owners and not {segment.node for segment in found.segments} <= {member.offer.name for member in owners}:
        with suppress(ClusterError):
            alone = _best(manifest, owners, links, latency_share)
            if alone.objective(latency_share) <= _FETCHED_GAIN * found.objective(latency_share):
                return alone
    return found


def _best(manifest: Manifest, members: Sequence[Member], links: Links, latency_share: float) -> Placement:
    costs = _Costs(manifest, members, links)
    count = len(manifest.shards)
    nodes = [Node(name=member.offer.name, trusted=member.offer.trusted) for member in members]
    found = place_shards(
        nodes,
        stage_places(manifest),
        count,
        costs.turn,
        costs.send_s,
        private=(0, count - 1),
        latency_share=latency_share,
    )
    if found is None:
        raise _refusal(manifest, members, nodes, costs)
    return found


def by_hand(
    manifest: Manifest, members: Sequence[Member], stages: Mapping[str, str], links: Links | None = None
) -> Placement:
    """The placement that a caller names.

    Args:
        manifest: the model.
        members: nodes that have it.
        stages: name of a node -> its shards, as FIRST:LAST, in the order of the model.
        links: between the nodes.

    Raises:
        ConfigError: a node is none of the members, or the ranges are not all shards, one after another.
        ClusterError: a stage does not fit the budget of its node.
    """
    known = {member.offer.name: member for member in members}
    names = [shard.name for shard in manifest.shards]
    costs, ranges, end = _Costs(manifest, members, links or {}), list[tuple[Node, int, int]](), 0
    for name, shards in stages.items():
        if name not in known:
            raise ConfigError(f"stages names the node '{name}'; those that have the model are {', '.join(known)}.")
        own = stage_of(manifest, shards)
        begin, end_before = names.index(own.shards[0].name), end
        end = begin + len(own.shards)
        cuts = {0, len(names), *stage_places(manifest)}
        if begin != end_before or not {begin, end} <= cuts:
            raise ConfigError(
                f"'{shards}' on the node '{name}' does not follow the stage before it: that ends before shard "
                f"'{names[min(end_before, len(names) - 1)]}'. Each stage of a decoder has at least one block."
            )
        ranges.append((Node(name=name), begin, end))
        if costs.turn(*ranges[-1]) is None:
            raise costs.lack(known[name], shards, begin, end)
    if end != len(names):
        raise ConfigError(f"stages ends before shard '{names[end]}'. Place all shards.")
    found = priced(ranges, costs.turn, costs.send_s)
    assert found is not None
    return found


class _Costs:
    """Times and memory of stages on nodes; equal stages are planned once for each node."""

    def __init__(self, manifest: Manifest, members: Sequence[Member], links: Links) -> None:
        self._links = links
        self._members = {member.offer.name: member for member in members}
        self._speeds = {member.offer.name: _evened(manifest, member.speed) for member in members}
        self._dims = profile_dims(manifest)
        # Finding out where a model may be cut takes milliseconds each time.
        self._stage = cache(partial(stage, manifest))
        self._needs = cache(self._needs_of)
        self._crossing = cache(lambda place: crossing_bytes(manifest, place, self._dims))
        self._file_bytes = cache(
            lambda begin, end: sum(record.nbytes for record in files_of(self._stage(begin, end), manifest))
        )
        self._kinds = _kinds(manifest)

    def has_disk(self, member: Member, begin: int, end: int) -> bool:
        """Whether a node has the files of a stage, or may take as much disk as they do."""
        return not member.fetches or self._file_bytes(begin, end) <= member.offer.fetched_bytes

    def turn(self, node: Node, begin: int, end: int) -> Turn | None:
        """See `planning.placement.Costs`."""
        member, key = self._members[node.name], self._key(begin, end)
        if not self.has_disk(member, begin, end):
            return None
        if key not in member.turns:
            member.turns[key] = self._turn(member, begin, end)
        return member.turns[key]

    def send_s(self, sender: Node, receiver: Node, place: int) -> float:
        """See `planning.placement.Sends`."""
        link = self._links.get(frozenset((sender.name, receiver.name)), ASSUMED)
        return CALL_S + link.latency_s + self._crossing(place) / link.bytes_per_s

    def lack(self, member: Member, shards: str, begin: int, end: int) -> ClusterError:
        """The error for a stage that a node has no room for."""
        offer = member.offer
        if not self.has_disk(member, begin, end):
            return ClusterError(
                f"{shards} does not fit the disk of the node {offer.name}, which may fetch "
                f"{format_bytes(offer.fetched_bytes)}. Start it with a larger --fetch, or give it other shards."
            )
        return ClusterError(
            f"{shards} does not fit the node {offer.name}: it needs a budget of "
            f"{format_bytes(self.needed_bytes(member, begin, end))}, and has {format_bytes(offer.budget_bytes)}. Raise "
            "its budget, or give it other shards."
        )

    def needed_bytes(self, member: Member, begin: int, end: int) -> int:
        """The smallest budget of a node that works for a stage."""
        key = self._key(begin, end)
        if key not in member.needed:
            try:
                member.needed[key] = self._plan(member, begin, end, 1).budget_bytes
            except BudgetError as error:
                member.needed[key] = error.needed_bytes
        return member.needed[key]

    def _key(self, begin: int, end: int) -> Hashable:
        """Equal for stages that cost the same on a node: where shards lie in a stage changes little."""
        return frozenset(Counter(self._kinds[begin:end]).items())

    def _turn(self, member: Member, begin: int, end: int) -> Turn | None:
        try:
            plan = self._plan(member, begin, end, member.offer.budget_bytes)
        except BudgetError:
            return None
        speed = self._speeds[member.offer.name]
        own = self._stage(begin, end)
        rates = Rates.of(own, speed, plan.threads)
        read_s = plan.streamed_bytes / rates.bandwidth(plan.loaders)
        run_s = planner.rested_pass_s(own, speed, plan)
        if plan.steady_pass_s is not None and plan.streamed_bytes:
            # Sessions, and computing while shards are read, take time of their own.
            read_s = max(read_s, plan.steady_pass_s)
        return Turn(run_s=run_s, read_s=read_s)

    def _plan(self, member: Member, begin: int, end: int, budget_bytes: int) -> Plan:
        return planner.make_plan(
            self._stage(begin, end),
            self._speeds[member.offer.name],
            budget_bytes=budget_bytes,
            needs=self._needs(begin, end),
        )

    def _needs_of(self, begin: int, end: int) -> Needs:
        own = self._stage(begin, end)
        return first_needs(own, Decoding(own), needs.planning_dims(own))


def _kinds(manifest: Manifest) -> list[object]:
    """Of each shard, what its cost depends on: shards of one kind differ in their names only."""
    return [
        (shard.role, shard.nbytes, shard.memory_bytes, shard.packed, len(shard.lookups)) for shard in manifest.shards
    ]


def _evened(manifest: Manifest, speed: Profile) -> Profile:
    """The profile with the same times for shards of one kind: what differs was chance."""
    groups: dict[object, list[str]] = {}
    for shard, kind in zip(manifest.shards, _kinds(manifest), strict=True):
        groups.setdefault(kind, []).append(shard.name)
    times = {}
    for threads, own in speed.times.items():
        times[threads] = {
            name: ShardTimes(
                **{
                    each.name: float(np.median([getattr(own[one], each.name) for one in names]))
                    for each in fields(ShardTimes)
                }
            )
            for names in groups.values()
            for name in names
        }
    return replace(speed, times=times)


def _slowed(manifest: Manifest, speed: Profile, run: float, read: float) -> Profile:
    """The profile of a node on which computing and reading take this many times as long."""
    rates = Rates.of(manifest, speed, None)
    times = {
        threads: {
            name: ShardTimes(**{field.name: getattr(one, field.name) * run for field in fields(one)})
            for name, one in own.items()
        }
        for threads, own in rates.times.items()
    }
    direct = speed.read_bytes_per_s or (rates.read_bytes_per_s if rates.direct else {})
    return replace(
        speed,
        times=times,
        read_bytes_per_s={loaders: rate / read for loaders, rate in direct.items()},
        cached_read_bytes_per_s={loaders: rate / read for loaders, rate in speed.cached_read_bytes_per_s.items()},
    )


def _refusal(manifest: Manifest, members: Sequence[Member], nodes: Sequence[Node], costs: _Costs) -> ClusterError:
    """The error for a model that has no place, with the smallest budget of every node that gives it one."""
    places = [0, *stage_places(manifest), len(manifest.shards)]
    known = {member.offer.name: member for member in members}
    needed = {
        (name, begin, end): costs.needed_bytes(member, begin, end)
        for name, member in known.items()
        for number, begin in enumerate(places)
        for end in places[number + 1 :]
        if costs.has_disk(member, begin, end)
    }

    def works(budget_bytes: int) -> bool:
        def cost(node: Node, begin: int, end: int) -> Turn | None:
            budget = max(budget_bytes, known[node.name].offer.budget_bytes)
            return Turn(run_s=0.0, read_s=0.0) if needed.get((node.name, begin, end), inf) <= budget else None

        return (
            place_shards(nodes, places[1:-1], places[-1], cost, lambda *_: 0.0, private=(0, places[-1] - 1)) is not None
        )

    budgets = ", ".join(f"{name} {format_bytes(member.offer.budget_bytes)}" for name, member in known.items())
    sizes = sorted(set(needed.values()))
    if not works(sizes[-1]):
        return ClusterError(
            "No placement works: the first and the last shard, which see texts and answers, run on trusted nodes only, "
            f"and there is none among {', '.join(known)}. Start a node without --untrusted."
        )
    least, most = 0, len(sizes) - 1
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if works(sizes[middle]) else (middle + 1, most)
    return ClusterError(
        f"The model does not fit the nodes that have it ({budgets}). The smallest budget of a node that works is "
        f"{format_bytes(sizes[least])}, rounded up: {sizes[least]} bytes. Raise the nodes' budgets to that, or add a "
        "node."
    )


def planned(manifest: Manifest, members: Sequence[Member]) -> Iterator[None]:
    """Plan all stages that these nodes could have, a step each, so that placing the model is quick after that."""
    costs, places = _Costs(manifest, members, {}), [0, *stage_places(manifest), len(manifest.shards)]
    for member in members:
        for number, begin in enumerate(places):
            for end in places[number + 1 :]:
                costs.turn(Node(name=member.offer.name), begin, end)
                yield


def placed(manifest: Manifest, members: Sequence[Member], links: Links, placement: Placement) -> Placement | None:
    """A placement with the times that it has on these nodes; None where a node is not there, or has no room.

    Args:
        manifest: the model.
        members: nodes that have it, as they are now.
        links: between them.
        placement: which of them runs which shards.
    """
    known = {member.offer.name for member in members}
    if not known.issuperset(segment.node for segment in placement.segments):
        return None
    costs = _Costs(manifest, members, links)
    ranges = [(Node(name=segment.node), segment.begin, segment.end) for segment in placement.segments]
    return priced(ranges, costs.turn, costs.send_s)


def have_room_for_both(manifest: Manifest, members: Sequence[Member], before: Placement, after: Placement) -> bool:
    """Whether each node's budget holds its stages of two placements at the same time; one that is in both counts once.

    Args:
        manifest: the model.
        members: the nodes of the second one.
        before: a placement.
        after: another one.
    """
    costs, known = _Costs(manifest, members, {}), {member.offer.name: member for member in members}
    own = {segment.node: (segment.begin, segment.end) for segment in before.segments}
    for segment in after.segments:
        member, there = known[segment.node], own.get(segment.node)
        if there is None or there == (segment.begin, segment.end):
            continue
        needed = costs.needed_bytes(member, *there) + costs.needed_bytes(member, segment.begin, segment.end)
        if needed - member.offer.process_bytes > member.offer.budget_bytes:
            return False
    return True
