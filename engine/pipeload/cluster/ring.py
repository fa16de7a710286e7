"""The stages of one placement, open on their nodes, and calls through them. All of it runs in the client's loop."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, TypeVar

from pipeload.cluster.messages import Job, NodeLostError, Place, call
from pipeload.cluster.offer import Offer
from pipeload.cluster.placing import Member
from pipeload.cluster.route import leaving, shards_of
from pipeload.cluster.stage import Stage
from pipeload.cluster.watch import Watch
from pipeload.errors import ClosedError, ClusterError, PipeloadError
from pipeload.foreign import foreign_errors
from pipeload.format.manifest import Manifest
from pipeload.inputs import Arrays
from pipeload.planning.placement import Placement

__all__ = ["Ring"]

_FAREWELL_S = 5.0
"""A node that does not answer for this time closes the stage when it hears that nothing refers to it any more."""

_Answer = TypeVar("_Answer")


class Ring:
    """Open stages.

    Args:
        client: Dask's.
        watch: of the cluster.
        manifest: the whole model.
        placement: which node runs which shards.
        members: the nodes that it names.

    Attributes:
        placement: see above.
    """

    def __init__(
        self, client: Any, watch: Watch, manifest: Manifest, placement: Placement, members: Sequence[Member]
    ) -> None:
        known = {member.offer.name: member for member in members}
        self._client, self._watch, self._manifest = client, watch, manifest
        self.placement = placement
        self._members = [known[segment.node] for segment in placement.segments]
        self._places: list[Place] = []
        self._actors: list[Any] = []
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self, sha256: str, name: str, sources: Sequence[str]) -> None:
        """Open every stage on its node, once the node has its files.

        Args:
            sha256: of the model's manifest.
            name: the model's.
            sources: addresses of nodes that have all of the model, for those that have not.

        Raises:
            PipeloadError: a stage cannot be opened, or a node was lost.
        """
        self._watch.listeners.add(self._hear)
        try:
            places = [0, *(segment.end for segment in self.placement.segments)]
            await self._unless_lost(
                [
                    self._fetched(member, sha256, shards_of(self._manifest, begin, end), sources)
                    for member, (begin, end) in zip(self._members, pairwise(places), strict=True)
                    if not member.offer.has(sha256)
                ]
            )
            for member, (begin, end) in zip(self._members, pairwise(places), strict=True):
                key = f"pipeload-stage-{uuid.uuid4().hex}"
                actor = self._client.submit(
                    Stage,
                    sha256,
                    name,
                    shards_of(self._manifest, begin, end),
                    key=key,
                    actor=True,
                    pure=False,
                    workers=[member.address],
                    allow_other_workers=False,
                )
                self._actors.append(actor)
                self._places.append(Place(node=member.offer.name, address=member.address, key=key))
            opening = zip(self._actors, self._places, strict=True)
            await self._unless_lost([self._opened(actor, place) for actor, place in opening])
            names = leaving(self._manifest, places)
            following = [*self._places[1:], None]
            await self._unless_lost(
                [
                    self._call(place, "follow", after, sorted(passes))
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
        return dict(await self._answered(number, [self._call(self._places[0], "run", number, arrays)]))

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
                await self._call(self._places[0], "step", number if job.last else "", arrays, job)

        return await self._answered(number, [send(*piece) for piece in pieces])

    async def end_state(self, state: str) -> None:
        """Give the memory of a state's caches back on all nodes."""
        await self._everywhere("end_state", state)

    async def close(self, reason: PipeloadError | None = None) -> None:
        """Close the stages. May be called again.

        Args:
            reason: the error of calls that wait, and of later ones; None tells that the model was closed.
        """
        self._watch.listeners.discard(self._hear)
        if not self._lost.done():
            self._lost.set_exception(reason or ClosedError("The model was closed during the call. Load it again."))
        self._lost.exception()
        await self._everywhere("close", besides=reason)
        actors, self._actors, self._places = self._actors, [], []
        for actor in actors:
            actor.release()

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

    def _begun(self) -> str:
        """The number of a new call, unless a node was lost."""
        if self._lost.done():
            self._lost.result()
        return uuid.uuid4().hex

    async def _fetched(self, member: Member, sha256: str, shards: str, sources: Sequence[str]) -> None:
        """Let a node take the files of its shards from others. That may take minutes, and ends with the node."""
        fact = f"The node {member.offer.name} could not fetch shards {shards}"
        try:
            with foreign_errors(ClusterError, "It does not answer", "Its log may have more."):
                await self._client.rpc(member.address).pipeload_fetch(sha256=sha256, shards=shards, sources=[*sources])
        except PipeloadError as error:
            raise ClusterError(f"{fact}. {error}") from error

    async def _opened(self, actor: Any, place: Place) -> None:
        error = await actor.exception()
        if isinstance(error, PipeloadError):
            raise error
        if error is not None:
            raise ClusterError(f"The node {place.node} could not open its stage: {error}.") from error

    async def _answered(self, number: str, passes: Sequence[Coroutine[Any, Any, None]]) -> Any:
        last = self._places[-1]
        try:
            return (await self._unless_lost([self._call(last, "answer", number), *passes]))[0]
        except PipeloadError as error:
            if not _is_at(last, error):
                with suppress(PipeloadError, asyncio.TimeoutError):
                    await asyncio.wait_for(self._call(last, "forget", number), _FAREWELL_S)
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

    async def _everywhere(self, method: str, *arguments: Any, besides: PipeloadError | None = None) -> None:
        """Call all stages, but for that of a node that was lost, which would be waited for in vain."""

        async def one(place: Place) -> None:
            with suppress(PipeloadError, asyncio.TimeoutError):
                await asyncio.wait_for(self._call(place, method, *arguments), _FAREWELL_S)

        await asyncio.gather(*(one(place) for place in self._places if not _is_at(place, besides)))

    async def _call(self, place: Place, method: str, *arguments: Any) -> Any:
        return await call(self._client.rpc, place, method, *arguments)


def _is_at(place: Place, error: PipeloadError | None) -> bool:
    return isinstance(error, NodeLostError) and error.address == place.address
