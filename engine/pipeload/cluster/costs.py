"""What a stage costs on a node: its times, and the memory and disk that it needs. Pure.

A stage is planned as the node will plan it, by the node's own budget and speed; equal stages are planned once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from typing import TypeAlias

import numpy as np

from pipeload.cluster.links import PIECE_BYTES, Link
from pipeload.cluster.offer import Offer
from pipeload.cluster.route import crossing_bytes
from pipeload.cluster.store import files_of
from pipeload.decode import Decoding
from pipeload.errors import BudgetError, ClusterError
from pipeload.format.caches import past_symbols
from pipeload.format.manifest import Manifest
from pipeload.format.stages import stage
from pipeload.machine.sizes import format_bytes
from pipeload.measuring.profiler import profile_dims
from pipeload.opening import first_needs
from pipeload.planning import needs, planner
from pipeload.planning.needs import Needs, tensor_bytes
from pipeload.planning.placement import Node, Placement, Turn
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.rates import Rates

__all__ = ["ASSUMED", "CALL_S", "Costs", "Links", "Member", "copying_s"]

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


def copying_s(
    manifest: Manifest, before: Placement, after: Placement, links: Links, *, dims: Mapping[str, int], length: int
) -> float:
    """Seconds until the stages after a move have the caches of a text from those before; all take them at once.

    Args:
        manifest: the model.
        before: the placement that the model leaves.
        after: the one that it moves to.
        links: between the nodes.
        dims: sizes of the symbolic dimensions in a step of the text.
        length: its tokens.
    """
    slowest_s = 0.0
    for target in after.segments:
        own_s = 0.0
        for source in before.segments:
            begin, end = max(source.begin, target.begin), min(source.end, target.end)
            if begin >= end or (source.node, source.begin, source.end) == (target.node, target.begin, target.end):
                continue
            taken = stage(manifest, begin, end)
            if not taken.caches:
                continue
            sizes = {**dims, **dict.fromkeys(past_symbols(taken), length)}
            found = [tensor_bytes(spec, sizes) for spec in taken.inputs if spec.name in taken.cache_inputs]
            own_s += sum(-(-nbytes // PIECE_BYTES) for nbytes in found) * CALL_S
            if source.node != target.node:
                link = links.get(frozenset((source.node, target.node)), ASSUMED)
                own_s += sum(map(link.seconds, found))
        slowest_s = max(slowest_s, own_s)
    return slowest_s


class Costs:
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
        return CALL_S + link.seconds(self._crossing(place))

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
