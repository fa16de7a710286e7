"""Files of a model that a node takes from other nodes, in pieces: from where it stopped, and from the next node where
one fails.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

from pipeload.cluster.sources import SourceError, Sources
from pipeload.cluster.store import PIECE_BYTES, Incoming, Store, files_of
from pipeload.errors import ClusterError, PipeloadError, ShardError
from pipeload.foreign import foreign_errors
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME, FileRecord, Manifest

__all__ = ["Fetcher"]

_ANSWER_S = 60.0
"""A node that has not sent what it was asked for after this time is given up."""
_LIST_S = 10.0
"""The same for what it has."""


class Fetcher:
    """Takes files of models from other nodes, one after another.

    Args:
        store: gets them.

    Attributes:
        store: see above.
        pool: Dask's connections of this process, once there are some.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.pool: Callable[[str], Any] | None = None
        self._one = asyncio.Lock()

    async def bring(
        self,
        sha256: str,
        name: str,
        own: Callable[[Manifest], Manifest],
        sources: Sequence[str],
        in_use: Collection[str],
    ) -> None:
        """Bring the files of a stage, as far as they are not here.

        Args:
            sha256: of the model's manifest.
            name: the model's.
            own: the manifest of the model -> that of the stage.
            sources: addresses of nodes that may have files of the model.
            in_use: sha256 of the manifests of models that are open here.

        Raises:
            ClusterError: no source gives a file. What has come of it is kept.
            ConfigError: there is no room for them.
            LoadError: a file cannot be written.
        """
        async with self._one:
            content = await self._manifest(sha256, sources)
            directory = await asyncio.to_thread(self.store.begin, sha256, name, content)
            whole = manifests.parse(content, directory / MANIFEST_NAME)
            records = files_of(own(whole), whole)
            if missing := self.store.missing(sha256, records):
                await asyncio.to_thread(self.store.make_room, sha256, records, in_use)
                known = Sources(sources, lambda source: self._files(source, sha256))
                # Nodes that fetch the same files at the same time have each other's sooner.
                for record in random.sample(missing, len(missing)):
                    await self._bring(sha256, whole, record, known)
                # It has just been used, however long that took.
                await asyncio.to_thread(self.store.begin, sha256, name, content)

    async def _manifest(self, sha256: str, sources: Sequence[str]) -> bytes:
        with suppress(PipeloadError):
            content = manifests.content(self.store.directory(sha256))
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
        refusals = []
        for source in random.sample(sources, len(sources)):
            try:
                content = bytes(await self._asked(source, "pipeload_manifest", sha256=sha256))
            except SourceError as error:
                refusals.append(f"{source}: {error}")
                continue
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
            refusals.append(f"{source} sends another manifest.")
        raise ClusterError(f"The manifest {sha256[:16]} ... could not be fetched. {' '.join(refusals)}")

    async def _files(self, source: str, sha256: str) -> list[str]:
        return list(await self._asked(source, "pipeload_files", _LIST_S, sha256=sha256))

    async def _bring(self, sha256: str, whole: Manifest, record: FileRecord, sources: Sources) -> None:
        refusals: list[str] = []

        async def take(source: str) -> None:
            incoming = await asyncio.to_thread(self.store.incoming, sha256, whole, record)
            has_part = incoming.position > 0
            try:
                await self._file(incoming, sha256, source, sources)
            except _WrongError:
                if not has_part:
                    raise
                # What came before, of others, may be wrong: all of it is taken from this node.
                incoming = await asyncio.to_thread(self.store.incoming, sha256, whole, record)
                await self._file(incoming, sha256, source, sources)

        for source in await sources.having(record):
            try:
                await take(source)
                return
            except SourceError as error:
                refusals.append(f"{source}: {error}")
                sources.failed(source)
        raise ClusterError(
            f"'{record.path}' of {record.nbytes} bytes could not be fetched. "
            f"{' '.join(refusals) or 'None of the nodes that answer has it.'} Another try goes on with "
            "what has come."
        )

    async def _file(self, incoming: Incoming, sha256: str, source: str, sources: Sources) -> None:
        path = incoming.record.path
        try:
            while incoming.left:
                asked = {"offset": incoming.position, "nbytes": min(PIECE_BYTES, incoming.left)}
                piece = bytes(await self._asked(source, "pipeload_piece", sha256=sha256, path=path, **asked))
                sources.sent(source, len(piece))
                await asyncio.to_thread(incoming.add, piece)
            await asyncio.to_thread(incoming.finish)
        except ShardError as error:
            raise _WrongError(str(error)) from error

    async def _asked(self, source: str, operation: str, within_s: float | None = None, **arguments: Any) -> Any:
        assert self.pool is not None
        try:
            with foreign_errors(SourceError, "It sends nothing", "Look at its log."):
                async with asyncio.timeout(within_s or _ANSWER_S):
                    return await getattr(self.pool(source), operation)(**arguments)
        except PipeloadError as error:
            # Of the other node: the same error here would be one of this node's disk.
            raise SourceError(str(error)) from error


class _WrongError(SourceError):
    """A file that has come is none of the manifest's."""
