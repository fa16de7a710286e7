"""What the nodes of a cluster tell a client: which models they have, files of these, speeds, and links."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
from distributed.comm import get_address_host

from pipeload.cluster.costs import Links, Member
from pipeload.cluster.links import Link
from pipeload.cluster.loop import Loop
from pipeload.cluster.node import SETTINGS_BYTES
from pipeload.cluster.offer import Offer
from pipeload.cluster.store import files_of
from pipeload.cluster.watch import Watch
from pipeload.errors import ClusterError, ConfigError, LoadError, PipeloadError, ShardError
from pipeload.foreign import foreign_errors
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME, Manifest
from pipeload.planning.profile import Profile

__all__ = ["Nodes"]

_ASK_S = 120.0
"""A node measures a model that it has no profile of, and may have to fetch its first shards before."""


class Nodes:
    """The nodes of a cluster. Safe to use from several threads; coroutines run in the client's loop.

    Args:
        loop: the client's.
        watch: of the cluster.
        pool: Dask's connections of the client.

    Attributes:
        known: process of a node and sha256 of a model -> the node with its speed of that model.
        known_links: processes of two nodes -> the link between them.
    """

    def __init__(self, loop: Loop, watch: Watch, pool: Callable[[str], Any]) -> None:
        self._loop, self._watch, self._pool = loop, watch, pool
        self.known: dict[tuple[str, str], Member] = {}
        self.known_links: dict[frozenset[str], Link] = {}
        # By machine: nodes that share cores and disk would measure each other.
        self._measuring: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def named(self, model: str | os.PathLike[str]) -> tuple[str, str]:
        """A model's sha256 and name.

        Args:
            model: its name on the nodes, or its directory here.

        Raises:
            ConfigError: it is no name.
            ClusterError: no node has such a model, or nodes have several of this name.
        """
        with foreign_errors(
            ConfigError, f"{model!r:.80} is no name of a model", "Pass a str, or the path of one here."
        ):
            path = Path(model)
        if (path / MANIFEST_NAME).is_file():
            return hashlib.sha256(manifests.content(path)).hexdigest(), path.resolve().name
        self._loop.ask(self._watch.look())
        names = self._names()
        found = {sha256 for sha256, own in names.items() if str(model) in own}
        if len(found) == 1:
            return found.pop(), str(model)
        if found:
            raise ClusterError(
                f"The nodes have {len(found)} different models of the name {model}. Copy one of them to all nodes, or "
                "name the model by its directory here."
            )
        known = ", ".join(sorted({name for own in names.values() for name in own})) or "none"
        raise ClusterError(
            f"No node has a model of the name {model}; there are {known}. Start a node that has it.{self._others()}"
        )

    def members(self, sha256: str, manifest: Manifest, lost: frozenset[str] = frozenset()) -> dict[str, Offer]:
        """The nodes that have a model, or take its shards from others, by address.

        Args:
            sha256: of the model's manifest.
            manifest: the model's.
            lost: processes of nodes that do not count.

        Raises:
            ClusterError: no node has all of it, nor have all of them together.
        """
        self._loop.ask(self._watch.look())
        found = self.candidates(sha256, lost)
        if any(offer.has(sha256) for offer in found.values()):
            return found
        there = self._loop.ask(self._files(sha256, found))
        missing = [record.path for record in files_of(manifest, manifest) if record.sha256 not in there]
        if missing and there:
            raise ClusterError(
                f"No node has all of the model, and none has {len(missing)} of its files, such as '{missing[0]}'. "
                f"Start one with `pipeload node` that has it in --models.{self._others()}"
            )
        if missing:
            raise self._none()
        return found

    def candidates(self, sha256: str, lost: frozenset[str] = frozenset()) -> dict[str, Offer]:
        """The nodes that have a model, or take its shards from others, as the latest look has found them.

        Args:
            sha256: of the model's manifest.
            lost: processes of nodes that do not count.
        """
        return {
            address: offer
            for address, offer in self._watch.offers.items()
            if (offer.has(sha256) or offer.fetched_bytes) and offer.process not in lost
        }

    def manifest(self, sha256: str) -> tuple[Manifest, bytes]:
        """A model's manifest, and its bytes.

        Raises:
            ClusterError: no node has it.
        """
        content = self._asked(sha256, "pipeload_manifest", sha256)
        return manifests.parse(content, Path(MANIFEST_NAME)), content

    def bring(self, sha256: str, manifest: Manifest, content: bytes, directory: Path) -> None:
        """Write a model's manifest, tokenizer and settings.

        Args:
            sha256: of the manifest.
            manifest: the model's.
            content: its bytes.
            directory: gets the files.

        Raises:
            ClusterError: no node gives a file, or it cannot be written.
        """
        weights = {shard.weights.path for shard in manifest.shards if shard.weights}
        weights |= {lookup.path for shard in manifest.shards for lookup in shard.lookups}
        weights |= {shard.graph.path for shard in manifest.shards}
        for record in files_of(manifest, manifest):
            if record.path not in weights and record.nbytes <= SETTINGS_BYTES:
                _write(directory / record.path, self._asked(sha256, "pipeload_file", record.sha256, path=record.path))
        _write(directory / MANIFEST_NAME, content)

    async def speeds(self, sha256: str, offers: Mapping[str, Offer]) -> list[Member]:
        """The nodes that tell their speed of a model; one that does not answer takes no part.

        Those of one machine are asked one after another, so that each measures as if it were alone.

        Args:
            sha256: of the model's manifest.
            offers: the nodes to ask, by address.

        Raises:
            ClusterError: none of them can tell.
        """
        found = await asyncio.gather(*(self.speed(sha256, address, offer) for address, offer in offers.items()))
        members = [member for member in found if isinstance(member, Member)]
        if not members:
            refusals = " ".join(dict.fromkeys(str(refusal) for refusal in found))
            raise ClusterError(f"None of the nodes that have the model can run it. {refusals}")
        return members

    async def speed(self, sha256: str, address: str, offer: Offer) -> Member | PipeloadError:
        """A node with its speed of a model, or the error where it cannot tell that.

        Args:
            sha256: of the model's manifest.
            address: the node's.
            offer: likewise.
        """
        key = offer.process, sha256
        async with self._measuring[get_address_host(address)]:
            if key not in self.known:
                fetches = not offer.has(sha256)
                sources = [own for own in self.candidates(sha256) if own != address] if fetches else []
                asked = {"sha256": sha256, "name": self._name(sha256), "sources": sources}
                try:
                    told = await self.call(address, "pipeload_speed", asked)
                except PipeloadError as error:
                    return error
                speed = msgspec.convert(told, Profile, str_keys=True)
                self.known[key] = Member(address=address, offer=offer, speed=speed, fetches=fetches)
            return self.known[key]

    async def links(self, members: list[Member], anew: frozenset[str] = frozenset()) -> Links:
        """The links between nodes, measured by one node after another: they would disturb each other.

        Args:
            members: the nodes.
            anew: processes of those whose links are measured again.
        """
        for number, member in enumerate(members):
            others = {
                other.address: other.offer.process
                for other in members[number + 1 :]
                if _pair(member, other) not in self.known_links or anew & _pair(member, other)
            }
            if others:
                with suppress(PipeloadError):
                    arguments = {"others": others, "anew": bool(anew)}
                    told = await self.call(member.address, "pipeload_links", arguments)
                    for other in members:
                        if other.address in told:
                            self.known_links[_pair(member, other)] = msgspec.convert(told[other.address], Link)
        return {
            frozenset((one.offer.name, other.offer.name)): self.known_links[_pair(one, other)]
            for one, other in combinations(members, 2)
            if _pair(one, other) in self.known_links
        }

    async def call(self, address: str, operation: str, arguments: Mapping[str, Any]) -> Any:
        """The answer of a node to what `Node.listen_to` names.

        Raises:
            PipeloadError: of the node; a ClusterError where it does not answer.
        """
        with foreign_errors(ClusterError, f"The node at {address} does not answer", "This machine must reach it too."):
            return await asyncio.wait_for(getattr(self._pool(address), operation)(**arguments), _ASK_S)

    def _asked(self, sha256: str, operation: str, wanted: str, **arguments: Any) -> bytes:
        """The answer of a node that has the model, or some files of it, and answers with these bytes.

        Args:
            sha256: of the model's manifest.
            operation: see `call`.
            wanted: sha256 of the answer.
            arguments: of the operation.
        """
        self._loop.ask(self._watch.look())
        found = self.candidates(sha256)
        owners = [address for address, offer in found.items() if offer.has(sha256)]
        others = [address for address, offer in found.items() if not offer.has(sha256)]
        refusals: list[PipeloadError] = []
        for address in (*random.sample(owners, len(owners)), *random.sample(others, len(others))):
            try:
                data = bytes(self._loop.ask(self.call(address, operation, {"sha256": sha256, **arguments})))
            except (ClusterError, ShardError, LoadError) as error:
                refusals.append(error)
                continue
            if hashlib.sha256(data).hexdigest() == wanted:
                return data
            refusals.append(
                ClusterError(f"The node at {address} sent other bytes than the manifest says. Start it again.")
            )
        if not owners:
            raise self._none()
        raise refusals[0]

    async def _files(self, sha256: str, offers: Mapping[str, Offer]) -> set[str]:
        """The sha256 of each file of a model that is whole on some of these nodes."""

        async def of(address: str) -> list[str]:
            with suppress(PipeloadError):
                return list(await self.call(address, "pipeload_files", {"sha256": sha256}))
            return []

        return {one for found in await asyncio.gather(*map(of, offers)) for one in found}

    def _names(self) -> dict[str, set[str]]:
        """The names of each model that nodes have, or have fetched files of, by the manifest's sha256."""
        found: dict[str, set[str]] = {}
        for offer in self._watch.offers.values():
            for name, sha256 in offer.models.items():
                found.setdefault(sha256, set()).add(name)
        for fetched in self._watch.fetched.values():
            for sha256, name in fetched.items():
                if name:
                    found.setdefault(sha256, set()).add(name)
        return found

    def _name(self, sha256: str) -> str:
        return min(self._names().get(sha256, ()), default="")

    def _none(self) -> ClusterError:
        return ClusterError(
            f"No node has the model. Start one with `pipeload node` that has it in --models.{self._others()}"
        )

    def _others(self) -> str:
        """What is to say of nodes that take part in nothing."""
        return "".join(f" {address}: {error}" for address, error in self._watch.strangers.items())


def _pair(one: Member, other: Member) -> frozenset[str]:
    """Two starts of nodes, whichever measures the way between them."""
    return frozenset((one.offer.process, other.offer.process))


def _write(path: Path, data: bytes) -> None:
    with foreign_errors(ClusterError, f"{path} cannot be written", "Make room for temporary files."):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
