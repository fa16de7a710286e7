"""Offers and speeds -> which node runs which stage, and what that promises. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import inf

from pipeload.cluster.costs import Costs, Links, Member
from pipeload.cluster.route import stage_places
from pipeload.errors import ClusterError, ConfigError
from pipeload.format.manifest import Manifest
from pipeload.format.stages import stage_of
from pipeload.machine.sizes import format_bytes
from pipeload.planning.placement import Node, Placement, Turn, place_shards, priced

__all__ = ["by_hand", "have_room_for_both", "place", "placed", "planned"]

_FETCHED_GAIN = 1.1


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
    costs = Costs(manifest, members, links)
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
    costs, ranges, end = Costs(manifest, members, links or {}), list[tuple[Node, int, int]](), 0
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


def _refusal(manifest: Manifest, members: Sequence[Member], nodes: Sequence[Node], costs: Costs) -> ClusterError:
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
    costs, places = Costs(manifest, members, {}), [0, *stage_places(manifest), len(manifest.shards)]
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
    costs = Costs(manifest, members, links)
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
    costs, known = Costs(manifest, members, {}), {member.offer.name: member for member in members}
    own = {segment.node: (segment.begin, segment.end) for segment in before.segments}
    for segment in after.segments:
        member, there = known[segment.node], own.get(segment.node)
        if there is None or there == (segment.begin, segment.end):
            continue
        needed = costs.needed_bytes(member, *there) + costs.needed_bytes(member, segment.begin, segment.end)
        if needed - member.offer.process_bytes > member.offer.budget_bytes:
            return False
    return True
