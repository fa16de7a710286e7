"""The cluster as a program sees it: its nodes, and the models on them."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from distributed import Client

from pipeload.cluster.adapter import Adapter, usable_bytes
from pipeload.cluster.certificates import check_accepted, security_of
from pipeload.cluster.costs import Links, Member
from pipeload.cluster.history import EVENTS
from pipeload.cluster.loop import Loop
from pipeload.cluster.model import ClusterModel
from pipeload.cluster.nodes import Nodes
from pipeload.cluster.offer import Offer
from pipeload.cluster.placing import by_hand, place
from pipeload.cluster.ring import Ring
from pipeload.cluster.state import Texts
from pipeload.cluster.watch import Watch
from pipeload.errors import ClosedError, ClusterError, ConfigError
from pipeload.foreign import foreign_errors
from pipeload.format.manifest import Manifest
from pipeload.planning.placement import Placement

__all__ = ["Change", "Connection", "Status"]

_CONNECT_S = 15
_FAREWELL_S = 5.0


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A node and its open stages.

    Attributes:
        address: where it listens.
        offer: see there.
        budget_bytes: what the node may use now: its budget, or less where its memory is short.
        stages: of each open one, the model's name and sha256, its shards, the number of its calls, of those that run or
            wait, the seconds of computing and reading of its latest pass, how much longer both take than at their
            best, None before, and how much longer sending takes, by address of the next node.
    """

    address: str
    offer: Offer
    budget_bytes: int
    stages: list[dict[str, Any]]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A change of the placement of a model that is open somewhere, as the cluster's scheduler knows it.

    Attributes:
        at_s: when the scheduler heard of it, in seconds since 1970.
        model: the model's name.
        before: nodes and shards until then.
        after: the same from then on; None where the placement before stays.
        why: the reason, and what failed.
        waited_s: seconds in which no call of the model could begin.
    """

    at_s: float
    model: str
    before: str
    after: str | None
    why: str
    waited_s: float


class Connection:
    """A connection to a cluster. Made by `pipeload.connect`; a context manager, safe to use from several threads.

    Args:
        address: the scheduler's.
        certificates: the directory with ca.pem, client.pem and client-key.pem; None for a loopback address without TLS.

    Raises:
        ConfigError: the address is none, or certificates are missing.
        ClusterError: no scheduler answers there.
    """

    def __init__(self, address: str, certificates: Path | None = None) -> None:
        security = security_of(address, certificates, "client")
        self._address = address
        self._models: weakref.WeakSet[ClusterModel] = weakref.WeakSet()
        self._closing = threading.Lock()
        self._closed = False
        self.loop = Loop()
        try:
            with foreign_errors(
                ClusterError,
                f"No cluster answers at {address}",
                "Start it with `pipeload cluster start`, and look at address, certificates and firewall.",
            ):
                self._client = self.loop.begin(_connected(address, security)).result()
            self.loop.at_the_end(partial(_disconnected, self._client))
            self._watch = Watch(self._client.scheduler)
            self._nodes = Nodes(self.loop, self._watch, self._client.rpc)
            self.loop.ask(self._watch.look())
            self.loop.begin(self._watch.run())
        except BaseException:
            self.loop.close()
            raise
        # One that is dropped, or left open when the program ends, takes leave too.
        self._finalizer = weakref.finalize(self, self.loop.close)

    @property
    def lost(self) -> bool:
        """Whether the scheduler was lost: models answer no more, and only another connection opens new ones."""
        return self._watch.lost

    def nodes(self) -> list[Status]:
        """The nodes of the cluster, by name, and the stages that are open on them; none of another version of pipeload.

        Raises:
            ClusterError: the scheduler does not answer.
        """
        self.loop.ask(self._watch.look())
        found = [
            Status(
                address=address,
                offer=offer,
                budget_bytes=self._watch.budgets[address],
                stages=self._watch.facts.get(address, []),
            )
            for address, offer in self._watch.offers.items()
        ]
        return sorted(found, key=lambda one: one.offer.name)

    def reconfigurations(self) -> list[Change]:
        """The latest changes of the placements of all models of the cluster, the oldest first. At most 100.

        Raises:
            ClusterError: the scheduler does not answer.
        """
        return self.loop.ask(self._changes())

    def plan(
        self, model: str | os.PathLike[str], *, stages: Mapping[str, str] | None = None, latency_share: float = 1.0
    ) -> Placement:
        """Where a model would run, and what that promises; nothing is opened.

        Args:
            model: as for `load`.
            stages: as for `load`.
            latency_share: as for `load`.

        Raises:
            ClusterError: as `load`.
        """
        sha256, _ = self._nodes.named(model)
        placement, _ = self._placed(sha256, self._nodes.manifest(sha256)[0], frozenset(), stages, latency_share)
        return placement

    def manifest(self, model: str | os.PathLike[str]) -> Manifest:
        """A model's manifest, of a node that has it.

        Args:
            model: as for `load`.

        Raises:
            ClusterError: no node has the model, or none answers.
        """
        return self._nodes.manifest(self._nodes.named(model)[0])[0]

    def load(
        self, model: str | os.PathLike[str], *, stages: Mapping[str, str] | None = None, latency_share: float = 1.0
    ) -> ClusterModel:
        """Open a model on the nodes that have it, and on nodes that take their shards from these, where that pays.

        Args:
            model: its name on the nodes, or its directory here; the manifest's sha256 tells the model.
            stages: name of a node -> its shards, as `"FIRST:LAST"`, in the order of the model; a node that is lost is
                replaced by what is best then. None finds the best placement, and moves the model when its nodes change
                and another one pays.
            latency_share: 1 places for the shortest time of one pass after another, 0 for the most passes a second with
                enough of them at the same time; between, for the weighted sum.

        Returns:
            The model, a context manager, with the methods of `pipeload.Model`.

        Raises:
            ClusterError: no node has the model, nodes have several models of this name, no placement fits the nodes'
                budgets, or a node was lost.
            PipeloadError: a stage cannot be opened, as `pipeload.load`.
        """
        self._check_usable()
        sha256, name = self._nodes.named(model)
        manifest, content = self._nodes.manifest(sha256)
        given = [stages]

        def ring(
            placement: Placement,
            members: Sequence[Member],
            links: Links | None = None,
            beside: Ring | None = None,
            lost: frozenset[str] = frozenset(),
        ) -> Ring:
            sources = [*self._nodes.candidates(sha256, lost)]
            return Ring(self._client, self._watch, manifest, sha256, name, sources, placement, members, beside, links)

        def open_ring(lost: frozenset[str]) -> Ring:
            # What the caller has named holds for the first placement.
            wanted = given.pop() if given else None
            placement, members = self._placed(sha256, manifest, lost, wanted, latency_share)

            async def started() -> Ring:
                made = ring(placement, members, lost=lost)
                await made.start()
                return made

            return self.loop.ask(started(), "while the stages of the model were opened")

        with foreign_errors(ClusterError, "The model's settings cannot be kept here", "Make room for temporary files."):
            folder = tempfile.TemporaryDirectory(prefix="pipeload-cluster-", ignore_cleanup_errors=True)
        try:
            directory = Path(folder.name) / name
            self._nodes.bring(sha256, manifest, content, directory)
            opened = ClusterModel(self.loop, name, directory, manifest, open_ring, self._tell)
        except BaseException:
            folder.cleanup()
            raise
        weakref.finalize(opened, folder.cleanup)
        with self._closing:
            self._models.add(opened)
            closed = self._closed
        if closed:
            opened.close()
            self._check_usable()
        if stages is None and Texts(manifest).can_go_on:
            self._adapt(opened, sha256, latency_share, ring)
        return opened

    def close(self) -> None:
        """Close the models that were loaded, and the connection; calls that run end with ClosedError. May be called
        again.
        """
        with self._closing:
            self._closed = True
            models = [*self._models]
        for model in models:
            model.close()
        self._finalizer()

    def __repr__(self) -> str:
        return f"<pipeload.cluster.Connection to {self._address}{', closed' if self._closed else ''}>"

    def __enter__(self) -> Connection:
        self._check_usable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tell(self, change: Mapping[str, Any]) -> None:
        """Let the scheduler keep a change; one that is lost, or a closed connection, takes none."""
        with suppress(ClosedError):
            self.loop.begin(self._told(change))

    async def _changes(self) -> list[Change]:
        with foreign_errors(ClusterError, "The cluster's scheduler does not answer", "Connect again."):
            told = await asyncio.wait_for(self._client.get_events(EVENTS), _CONNECT_S)
        found = []
        for at_s, change in told:
            # Of a client of another version.
            with suppress(msgspec.ValidationError, TypeError):
                found.append(msgspec.convert({"at_s": at_s, **change}, Change))
        return found

    async def _told(self, change: Mapping[str, Any]) -> None:
        with suppress(OSError, RuntimeError):
            await self._client.log_event(EVENTS, dict(change))

    def _placed(
        self,
        sha256: str,
        manifest: Manifest,
        lost: frozenset[str],
        stages: Mapping[str, str] | None,
        latency_share: float,
    ) -> tuple[Placement, list[Member]]:
        _check(stages, latency_share)
        offers = {
            address: offer
            for address, offer in self._nodes.members(sha256, manifest, lost).items()
            # A node that is not named need not fetch shards to be measured by them.
            if stages is None or offer.has(sha256) or offer.name in stages
        }
        members = []
        for member in self.loop.ask(self._nodes.speeds(sha256, offers)):
            told_bytes = self._watch.budgets.get(member.address, member.offer.budget_bytes)
            members.append(member.now(manifest, usable_bytes(member.offer, told_bytes), member.slowness))
        names = [member.offer.name for member in members]
        if len(set(names)) < len(names):
            raise ClusterError(f"Two nodes have one name: {', '.join(sorted(names))}. Start them with --name.")
        links = self.loop.ask(self._nodes.links(members))
        if stages is not None:
            return by_hand(manifest, members, stages, links), members
        return place(manifest, members, links, latency_share=latency_share), members

    def _adapt(self, model: ClusterModel, sha256: str, latency_share: float, ring: Callable[..., Ring]) -> None:
        """Let a model move when its nodes change."""
        adapter = Adapter(
            model.rings,
            model.manifest,
            self._watch,
            sha256,
            latency_share,
            offers=partial(self._nodes.candidates, sha256),
            member=partial(self._nodes.speed, sha256),
            links=self._nodes.links,
            ring=ring,
        )
        self.loop.begin(adapter.run())

    def _check_usable(self) -> None:
        if self._closed:
            raise ClosedError("The connection to the cluster is closed. Connect again.")


async def _connected(address: str, security: Any) -> Client:
    await check_accepted(address, security, "client")
    return await Client(
        address,
        security=security,
        timeout=_CONNECT_S,
        set_as_default=False,
        direct_to_workers=True,
        asynchronous=True,
    )


async def _disconnected(client: Client) -> None:
    # What does not hear of it notices that the connection has ended.
    with suppress(OSError):
        await client.close(timeout=_FAREWELL_S)


def _check(stages: object, latency_share: object) -> None:
    if stages is not None and not (
        isinstance(stages, Mapping)
        and stages
        and all(isinstance(name, str) and isinstance(shards, str) for name, shards in stages.items())
    ):
        raise ConfigError(f"stages is {stages!r:.80}; it must be shards by name of a node, as text, or None.")
    if not isinstance(latency_share, int | float) or not 0 <= latency_share <= 1:
        raise ConfigError(f"latency_share is {latency_share!r:.80}; it must be from 0 (throughput) to 1 (latency).")
