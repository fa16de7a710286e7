"""What a model that is open does when its nodes change: the cluster is looked at, and the model moves when that pays.

What nodes tell goes with Dask's own messages to the scheduler, where the connection looks anyway. The decisions are
`planning.adapting`'s, the predictions `placing`'s: both are pure. Predictions are made in a thread, and only when
something has changed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from pipeload.cluster.costs import Links, Member
from pipeload.cluster.offer import Offer
from pipeload.cluster.placing import have_room_for_both, place, placed, planned
from pipeload.cluster.ring import Ring
from pipeload.cluster.rings import Rings
from pipeload.cluster.watch import Watch
from pipeload.errors import ClosedError, ClusterError, PipeloadError
from pipeload.format.manifest import Manifest
from pipeload.machine.sizes import format_bytes
from pipeload.planning.adapting import Adapting, Outlook, Sending, Slowness
from pipeload.planning.placement import Placement

__all__ = ["Adapter", "usable_bytes"]

_STEPS, _WHOLE = 40, 0.98
"""Less memory than the budget counts in steps of this part of it; what is this near to it is all of it."""
_NOTICED_LOOKS = 10
"""A call that a node refuses for want of memory waits for a move for this many looks: first the node has to tell."""
_ASK_AGAIN_S = 60.0
"""A node that cannot tell its speed is asked again after this time."""
_SENT_BYTES, _OTHER_LINK = 1_000_000, 2.0
"""A link on which as many bytes take this many times as long, or as short, has changed."""

_LOG = logging.getLogger("pipeload.cluster")

Nodes: TypeAlias = tuple[tuple[str, str, int, tuple[float, float]], ...]
"""Process, name, usable budget and slowness of each node: what predictions depend on."""


def usable_bytes(offer: Offer, told_bytes: int) -> int:
    """The budget to place by: the node's own, or less where its memory is short, in steps: it swings all the time.

    Args:
        offer: the node's.
        told_bytes: what it may use now.
    """
    if told_bytes >= offer.budget_bytes * _WHOLE:
        return offer.budget_bytes
    step = max(1, offer.budget_bytes // _STEPS)
    return told_bytes // step * step


class Adapter:
    """Moves one model. All of it runs in the client's loop, but for predictions and the move itself.

    Args:
        rings: the model's.
        manifest: of the whole model.
        watch: of the cluster.
        sha256: of the model's manifest.
        latency_share: see `place_shards`.
        offers: gives the nodes that have the model, or take its shards from others, by address.
        member: asks one of them for its speed; gives an error where it cannot tell.
        links: measures those between nodes that are not known yet, and anew those of some processes.
        ring: gives one of a placement, beside the present one.
    """

    def __init__(
        self,
        rings: Rings,
        manifest: Manifest,
        watch: Watch,
        sha256: str,
        latency_share: float,
        *,
        offers: Callable[[], dict[str, Offer]],
        member: Callable[[str, Offer], Awaitable[Member | PipeloadError]],
        links: Callable[[list[Member], frozenset[str]], Awaitable[Links]],
        ring: Callable[[Placement, Sequence[Member], Links, Ring], Ring],
    ) -> None:
        self._rings, self._manifest = rings, manifest
        self._watch, self._sha256, self._latency_share = watch, sha256, latency_share
        self._offers, self._member, self._links, self._ring = offers, member, links, ring
        self._adapting, self._slowness, self._sending = Adapting(latency_share), Slowness(), Sending()
        self._members: dict[str, Member] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._silent: set[str] = set()
        self._seen: tuple[Nodes, Placement] | None = None
        self._outlook = Outlook(present=None, best=None)
        self._refusal: ClusterError | None = None
        self._before: Nodes = ()
        self._known_links: Links | None = None
        self._links_before: Links | None = None
        self._begun: Ring | None = None
        self._looked: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Look at the nodes until the model is closed."""
        looked = asyncio.Event()
        self._rings.notice = self.notice

        def hear(told: object) -> None:
            if not isinstance(told, ClusterError):
                looked.set()

        self._watch.listeners.add(hear)
        try:
            while not self._rings.closed:
                await looked.wait()
                looked.clear()
                await self.look(time.monotonic())
                self._tell_looked()
        except ClosedError:
            return
        except Exception:  # noqa: BLE001 - calls go on; the log tells it
            _LOG.exception("A model on a cluster stays where it is from now on, since looking at its nodes failed.")
        finally:
            self._watch.listeners.discard(hear)
            self._rings.notice = None
            self._tell_looked()
            for asking in self._asking.values():
                asking.cancel()

    async def look(self, now_s: float) -> None:
        """Take one look, and move the model where that pays.

        Args:
            now_s: by a clock that never goes back.
        """
        members, ring = self._present(now_s), self._rings.present
        if not members or any(member.offer.process in self._asking for member in ring.members):
            return
        nodes = _nodes(members)
        if self._begun is not ring:
            self._begun, used = ring, _nodes(ring.members)
            processes = {process for process, *_ in used}
            self._before = (*used, *(one for one in nodes if one[0] not in processes))
            self._links_before = self._known_links
        anew = self._sending.look(self._sent(), now_s)
        if anew or self._seen != (nodes, ring.placement):
            links = self._known_links = await self._links(members, anew)
            self._links_before = links if self._links_before is None else self._links_before
            found = await asyncio.to_thread(self._predicted, members, links, ring.placement)
            if found is None:
                return
            (self._outlook, self._refusal), self._seen = found, (nodes, ring.placement)
        decision, best = self._adapting.look(self._outlook, now_s), self._outlook.best
        if self._outlook.present is not None:
            self._rings.refuse(None)
        elif decision == "give up" and self._refusal is not None and not self._asking.keys() - self._silent:
            # A node that has just joined may have room: it is asked for its speed first.
            self._rings.refuse(self._refusal)
        if decision != "move" or best is None:
            return
        links_before, links_now = self._links_before or {}, self._known_links or {}
        changes = [*_changes(self._before, nodes), *_link_changes(links_before, links_now)]
        why = _why(changes, self._outlook, self._latency_share)
        together = await asyncio.to_thread(have_room_for_both, self._manifest, members, ring.placement, best)
        moved = await asyncio.to_thread(
            self._rings.move, ring, lambda seen: self._ring(best, members, links_now, seen), why, together=together
        )
        # Where a node was lost meanwhile, the calls have placed the model anew.
        if moved or self._rings.present is ring:
            self._adapting.changed(time.monotonic(), failed=not moved)

    async def notice(self) -> None:
        """Wait until the model has left its placement, or has not done so for some looks."""
        ring = self._rings.present
        for _ in range(_NOTICED_LOOKS):
            if self._rings.present is not ring or self._rings.notice is None:
                return
            self._looked = self._looked or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._looked)

    def _tell_looked(self) -> None:
        looked, self._looked = self._looked, None
        if looked is not None:
            looked.set_result(None)

    def _present(self, now_s: float) -> list[Member]:
        """The nodes as they are now; those whose speed is not known yet are asked, and take part later."""
        found = []
        for address, offer in self._offers().items():
            if offer.process in self._rings.lost:
                continue
            known = self._members.get(offer.process)
            if known is None:
                self._ask(address, offer)
                continue
            usable = usable_bytes(offer, self._watch.budgets.get(address, offer.budget_bytes))
            own = [one for one in self._watch.facts.get(address, ()) if one.get("sha256") == self._sha256]
            measured = next(((one["slowness"][0], one["slowness"][1]) for one in own if one["slowness"]), None)
            slowness = self._slowness.look(offer.process, measured, now_s, runs=bool(own))
            found.append(known.now(self._manifest, usable, slowness))
        names = [member.offer.name for member in found]
        # Two nodes of one name cannot be told apart; the first one keeps it.
        return [member for place, member in enumerate(found) if member.offer.name not in names[:place]]

    def _sent(self) -> dict[tuple[str, str], float]:
        """Processes of a stage's node and the next one's -> how much longer sending takes than at its best."""
        offers = self._offers()
        return {
            (offers[address].process, offers[following].process): factor
            for address, stages in self._watch.facts.items()
            for facts in stages
            if facts.get("sha256") == self._sha256
            for following, factor in facts.get("links", {}).items()
            if address in offers and following in offers
        }

    def _ask(self, address: str, offer: Offer) -> None:
        if offer.process in self._asking:
            return

        async def ask() -> None:
            try:
                told = await self._member(address, offer)
                if isinstance(told, Member):
                    self._members[offer.process] = told
                else:
                    self._silent.add(offer.process)
                    await asyncio.sleep(_ASK_AGAIN_S)
            finally:
                del self._asking[offer.process]
                self._silent.discard(offer.process)

        self._asking[offer.process] = asyncio.ensure_future(ask())

    def _predicted(
        self, members: Sequence[Member], links: Links, placement: Placement
    ) -> tuple[Outlook, ClusterError | None] | None:
        """The outlook, and the reason where no placement has room; None where the model is closed meanwhile."""
        for _ in planned(self._manifest, members):
            if self._rings.closed:
                return None
        present, refusal = placed(self._manifest, members, links, placement), None
        best: Placement | None = None
        try:
            best = place(self._manifest, members, links, latency_share=self._latency_share)
        except ClusterError as error:
            refusal = error
        return Outlook(present=present, best=best), refusal


def _nodes(members: Sequence[Member]) -> Nodes:
    return tuple(sorted((one.offer.process, one.offer.name, one.offer.budget_bytes, one.slowness) for one in members))


def _changes(before: Nodes, now: Nodes) -> list[str]:
    """What has changed at the nodes, in words."""
    known = {process: (budget, slowness) for process, _, budget, slowness in before}
    there = {process for process, *_ in now}
    reasons = [f"the node {name} is there no more" for process, name, *_ in before if process not in there]
    for process, name, budget, slowness in now:
        if process not in known:
            reasons.append(f"the node {name} has joined")
            continue
        budget_before, slowness_before = known[process]
        if budget != budget_before:
            less = "less" if budget < budget_before else "more"
            reasons.append(f"the node {name} may use {format_bytes(budget)}, {less} than before")
        if slowness != slowness_before:
            reasons.append(f"the node {name} takes {max(slowness):.1f} times as long as at its best")
    return reasons


def _link_changes(before: Links, now: Links) -> list[str]:
    """What has changed at the links, in words."""
    reasons = []
    for pair in before.keys() & now.keys():
        factor = now[pair].seconds(_SENT_BYTES) / before[pair].seconds(_SENT_BYTES)
        if not 1 / _OTHER_LINK < factor < _OTHER_LINK:
            text = f"{factor:.1f} times as long as" if factor > 1 else f"1/{1 / factor:.1f} of the time of"
            reasons.append(f"sending between the nodes {' and '.join(sorted(pair))} takes {text} before")
    return sorted(reasons)


def _why(reasons: Sequence[str], outlook: Outlook, latency_share: float) -> str:
    """The reason for a move, in words: what has changed, and what is gained."""
    if outlook.present is None:
        gain = "a stage has no place any more"
    else:
        assert outlook.best is not None
        share = 1 - outlook.best.objective(latency_share) / outlook.present.objective(latency_share)
        gain = f"another placement promises to take {share:.0%} less time"
    text = f"{', '.join(reasons)}: {gain}" if reasons else gain
    return f"{text[0].upper()}{text[1:]}."
