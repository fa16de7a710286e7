"""The stages of one placement, open on their nodes, and calls through them. All of it runs in the client's loop."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeload.cluster.costs import Links, Member, copying_s
from pipeload.cluster.messages import Job, NodeLostError, Place, Text, call
from pipeload.cluster.offer import Offer
from pipeload.cluster.route import leaving, shards_of
from pipeload.cluster.stage import Stage
from pipeload.cluster.watch import Watch
from pipeload.errors import ClosedError, ClusterError, PipeloadError
from pipeload.foreign import foreign_errors, let_go
from pipeload.format.manifest import Manifest
from pipeload.format.stages import stage as stage_of
from pipeload.inputs import Arrays
from pipeload.planning.placement import Placement

__all__ = ["Ring"]

_FAREWELL_S = 5.0
"""A node that does not answer for this time closes the stage when it hears that nothing refers to it any more."""

_LOG = logging.getLogger("pipeload.cluster")

_Answer = TypeVar("_Answer")


@dataclass(slots=True, kw_only=True, eq=False)
class _Opened:
    """A stage that is open, or is being opened.

    Attributes:
        process: of its node.
        begin, end: its first shard, and the one after the last.
        place: where to call it.
        actor: Dask's.
        rings: number of those that it belongs to.
    """

    process: str
    begin: int
    end: int
    place: Place
    actor: Any
    rings: int = 0


class Ring:
    """Open stages.

    Args:
        client: Dask's.
        watch: of the cluster.
        manifest: the whole model.
        sha256: of it.
        name: the model's.
        sources: addresses of nodes that may have files of the model, for those that have not all.
        placement: which node runs which shards.
        members: the nodes that it names.
        beside: the ring whose stages are taken over where they are the same; both are open until one is closed.
        links: between the nodes of both.

    Attributes:
        placement: see above.
    """

    def __init__(
        self,
        client: Any,
        watch: Watch,
        manifest: Manifest,
        sha256: str,
        name: str,
        sources: Sequence[str],
        placement: Placement,
        members: Sequence[Member],
        beside: Ring | None = None,
        links: Links | None = None,
    ) -> None:
        known = {member.offer.name: member for member in members}
        self._client, self._watch, self._manifest = client, watch, manifest
        self._sha256, self._name, self._sources = sha256, name, [*sources]
        self.placement = placement
        self._members = [known[segment.node] for segment in placement.segments]
        self._route = uuid.uuid4().hex
        self._beside, self._links = beside, links or {}
        self._taken: dict[str, asyncio.Future[bool]] = {}
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        there = {(one.process, one.begin, one.end): one for one in beside._stages} if beside else {}
        self._stages: list[_Opened] = []
        self._new: list[_Opened] = []
        for member, segment in zip(self._members, placement.segments, strict=True):
            process, begin, end = member.offer.process, segment.begin, segment.end
            stage = there.get((process, begin, end))
            if stage is None:
                place = Place(node=member.offer.name, address=member.address, key=f"pipeload-stage-{uuid.uuid4().hex}")
                stage = _Opened(process=process, begin=begin, end=end, place=place, actor=None)
                self._new.append(stage)
            stage.rings += 1
            self._stages.append(stage)

    async def bring(self) -> None:
        """Let every node take those files of its stage that it has not. Calls may go on meanwhile.

        Raises:
            PipeloadError: a node cannot, or was lost.
        """
        await self._unless_lost(
            [
                self._fetched(member, stage)
                for member, stage in zip(self._members, self._stages, strict=True)
                if stage in self._new and not member.offer.has(self._sha256)
            ]
        )

    async def start(self) -> None:
        """Open every stage that is not open yet on its node, once the node has its files.

        Raises:
            PipeloadError: a stage cannot be opened, or a node was lost.
        """
        self._watch.listeners.add(self._hear)
        try:
            await self.bring()
            for stage in self._new:
                stage.actor = self._client.submit(
                    Stage,
                    self._sha256,
                    self._name,
                    shards_of(self._manifest, stage.begin, stage.end),
                    key=stage.place.key,
                    actor=True,
                    pure=False,
                    workers=[stage.place.address],
                    allow_other_workers=False,
                )
            await self._unless_lost([self._ready(stage) for stage in self._new])
            names = leaving(self._manifest, [0, *(segment.end for segment in self.placement.segments)])
            following = [*self._places[1:], None]
            await self._unless_lost(
                [
                    self._call(place, "follow", self._route, after, sorted(passes))
                    for place, after, passes in zip(self._places, following, names, strict=True)
                ]
            )
        except BaseException:
            await self.close()
            raise

    async def run(self, arrays: Arrays) -> Arrays:
        """One pass through all stages.

        Raises:
            NodeLostError: a node was lost.
            PipeloadError: as `Model.run`.
        """
        number = self._begun()
        return dict(await self._answered(number, [self._call(self._places[0], "run", self._route, number, arrays)]))

    async def step(self, pieces: Sequence[tuple[Arrays, Job]]) -> Any:
        """One step of a decoder, in pieces that follow each other through the stages.

        Returns:
            The logits, or the largest ones, of the last piece.

        Raises:
            NodeLostError: a node was lost.
            TextLostError: the caches are of no use any more.
            PipeloadError: as `Model.step`.
        """
        number, in_flight = self._begun(), asyncio.Semaphore(len(self._places) + 1)

        async def send(arrays: Arrays, job: Job) -> None:
            async with in_flight:
                await self._call(self._places[0], "step", self._route, number if job.last else "", arrays, job)

        return await self._answered(number, [send(*piece) for piece in pieces])

    def copying_s(self, before: Ring, dims: Mapping[str, int], length: int) -> float | None:
        """Seconds until these stages have the caches of a text from those before; None where they cannot take them.

        Args:
            before: the ring that has them.
            dims: sizes of the symbolic dimensions in a step of the text.
            length: its tokens.
        """
        if self._beside is not before:
            return None
        ways = self._manifest, before.placement, self.placement, self._links
        return copying_s(*ways, dims=dims, length=length)

    async def take(self, text: Text) -> bool:
        """Let the stages take the caches of a text from the ring before. Returns whether they have them.

        Who asks again gets the same answer.
        """
        if text.state not in self._taken:
            self._taken[text.state] = asyncio.ensure_future(self._take(text))
        return await asyncio.shield(self._taken[text.state])

    async def settled(self) -> None:
        """The move to these stages has ended: no caches are taken from the ring before any more."""
        self._beside = None
        self._taken.clear()

    async def end_state(self, state: str) -> None:
        """Give the memory of a state's caches back on all nodes."""
        if (taking := self._taken.pop(state, None)) is not None:
            await asyncio.wait([taking])
        await asyncio.gather(*(self._told(place, "end_state", state) for place in self._places))

    async def close(self, reason: PipeloadError | None = None) -> None:
        """Close the stages, but for those of another ring. May be called again.

        Args:
            reason: the error of calls that wait, and of later ones; None tells that the model was closed.
        """
        self._watch.listeners.discard(self._hear)
        if not self._lost.done():
            self._lost.set_exception(reason or ClosedError("The model was closed during the call. Load it again."))
        self._lost.exception()
        stages, self._stages = self._stages, []
        for stage in stages:
            stage.rings -= 1

        async def leave(stage: _Opened) -> None:
            if stage.actor is None:
                return
            # That of a node that was lost would be waited for in vain.
            if not _is_at(stage.place, reason):
                await self._told(stage.place, *(("part", self._route) if stage.rings else ("close",)))
            if not stage.rings:
                stage.actor.release()

        await asyncio.gather(*map(leave, stages))

    @property
    def members(self) -> list[Member]:
        """Its nodes, as they were when it was placed."""
        return [*self._members]

    def processes_at(self, address: str) -> frozenset[str]:
        """The process of the node at an address, if it is one of these."""
        return frozenset(member.offer.process for member in self._members if member.address == address)

    def _hear(self, told: dict[str, Offer] | ClusterError) -> None:
        if self._lost.done():
            return
        if isinstance(told, ClusterError):
            self._lost.set_exception(told)
            return
        for member in self._members:
            offer = told.get(member.address)
            if offer is None or offer.process != member.offer.process:
                text = f"The node {member.offer.name} at {member.address} was lost: the scheduler does not hear of it."
                self._lost.set_exception(NodeLostError(text, member.address))
                return

    async def _take(self, text: Text) -> bool:
        before = self._beside
        if before is None or not before._stages:
            return False
        held = [(one.place, self._caches_of(one)) for one in before._stages]
        try:
            takes = []
            for stage in self._stages:
                own = self._caches_of(stage)
                sources = [(place, sorted(names & own)) for place, names in held if names & own]
                takes.append(self._call(stage.place, "take", self._route, text, sources))
            # A node of either ring may be lost.
            await before._unless_lost([self._unless_lost(takes)])
        except PipeloadError as error:
            _LOG.info("The caches of a text were not copied, and are computed again: %s", error)
            let_go(error)
            await asyncio.gather(*(self._told(place, "end_state", text.state) for place in self._places))
            return False
        return True

    def _caches_of(self, stage: _Opened) -> frozenset[str]:
        return stage_of(self._manifest, stage.begin, stage.end).cache_inputs

    @property
    def _places(self) -> list[Place]:
        return [stage.place for stage in self._stages]

    def _begun(self) -> str:
        """The number of a new call, unless a node was lost."""
        if self._lost.done():
            self._lost.result()
        return uuid.uuid4().hex

    async def _fetched(self, member: Member, stage: _Opened) -> None:
        """Let a node take the files of its shards from others. That may take minutes, and ends with the node."""
        shards = shards_of(self._manifest, stage.begin, stage.end)
        fact = f"The node {member.offer.name} could not fetch shards {shards}"
        try:
            with foreign_errors(ClusterError, "It does not answer", "Its log may have more."):
                sources = [source for source in self._sources if source != member.address]
                await self._client.rpc(member.address).pipeload_fetch(
                    sha256=self._sha256, name=self._name, shards=shards, sources=sources
                )
        except PipeloadError as error:
            raise ClusterError(f"{fact}. {error}") from error

    async def _ready(self, stage: _Opened) -> None:
        error = await stage.actor.exception()
        if isinstance(error, PipeloadError):
            raise error
        if error is not None:
            raise ClusterError(f"The node {stage.place.node} could not open its stage: {error}.") from error

    async def _answered(self, number: str, passes: Sequence[Coroutine[Any, Any, None]]) -> Any:
        places = self._places
        try:
            return (await self._unless_lost([self._call(places[-1], "answer", number), *passes]))[0]
        except (PipeloadError, asyncio.CancelledError) as error:
            # It is cancelled where the caller was interrupted, has left, or is late.
            there = [place for place in places if not _is_at(place, error)]
            await asyncio.gather(*(self._told(place, "forget", number) for place in there))
            raise

    async def _unless_lost(self, calls: Sequence[Coroutine[Any, Any, _Answer]]) -> list[_Answer]:
        """The results of all calls, or the first error, which is also that of a node that was lost meanwhile."""
        tasks = [asyncio.ensure_future(each) for each in calls]
        pending: set[asyncio.Future[Any]] = {*tasks}
        try:
            while pending:
                done, pending = await asyncio.wait({*pending, self._lost}, return_when=asyncio.FIRST_COMPLETED)
                pending.discard(self._lost)
                for task in sorted(done, key=lambda each: each is self._lost):
                    task.result()
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _told(self, place: Place, method: str, *arguments: Any) -> None:
        """Call a stage that may be gone."""
        with suppress(PipeloadError, asyncio.TimeoutError):
            await asyncio.wait_for(self._call(place, method, *arguments), _FAREWELL_S)

    async def _call(self, place: Place, method: str, *arguments: Any) -> Any:
        return await call(self._client.rpc, place, method, *arguments)


def _is_at(place: Place, error: BaseException | None) -> bool:
    return isinstance(error, NodeLostError) and error.address == place.address
