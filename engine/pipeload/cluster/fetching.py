"""Files of a model that a node takes from other nodes, in pieces: from where it stopped, and from the next node where
one fails.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

from pipeload.cluster.store import PIECE_BYTES, Incoming, Store, files_of
from pipeload.errors import ClusterError, PipeloadError, ShardError
from pipeload.foreign import foreign_errors
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME, FileRecord, Manifest

__all__ = ["Fetcher"]

_ANSWER_S = 60.0
"""A node that has not sent what it was asked for after this time is given up."""


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
        self, sha256: str, own: Callable[[Manifest], Manifest], sources: Sequence[str], in_use: Collection[str]
    ) -> None:
        """Bring the files of a stage, as far as they are not here.

        Args:
            sha256: of the model's manifest.
            own: the manifest of the model -> that of the stage.
            sources: addresses of nodes that have all of the model, in the order in which they are asked.
            in_use: sha256 of the manifests of models that are open here.

        Raises:
            ClusterError: no source gives a file. What has come of it is kept.
            ConfigError: there is no room for them.
            LoadError: a file cannot be written.
        """
        async with self._one:
            content = await self._manifest(sha256, sources)
            directory = await asyncio.to_thread(self.store.begin, sha256, content)
            whole = manifests.parse(content, directory / MANIFEST_NAME)
            records = files_of(own(whole), whole)
            if missing := self.store.missing(sha256, records):
                await asyncio.to_thread(self.store.make_room, sha256, records, in_use)
                for record in missing:
                    await self._bring(sha256, whole, record, sources)
                # It has just been used, however long that took.
                await asyncio.to_thread(self.store.begin, sha256, content)

    async def _manifest(self, sha256: str, sources: Sequence[str]) -> bytes:
        with suppress(PipeloadError):
            content = manifests.content(self.store.directory(sha256))
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
        refusals = []
        for source in sources:
            try:
                content = await self._asked(source, "pipeload_manifest", sha256=sha256)
            except _SourceError as error:
                refusals.append(f"{source}: {error}")
                continue
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
            refusals.append(f"{source} sends another manifest.")
        raise ClusterError(f"The manifest {sha256[:16]} ... could not be fetched. {' '.join(refusals)}")

    async def _bring(self, sha256: str, whole: Manifest, record: FileRecord, sources: Sequence[str]) -> None:
        refusals: list[str] = []
        for source in sources:
            incoming = await asyncio.to_thread(self.store.incoming, sha256, whole, record)
            try:
                await self._file(incoming, sha256, source)
                return
            except _SourceError as error:
                refusals.append(f"{source}: {error}")
        raise ClusterError(
            f"'{record.path}' of {record.nbytes} bytes could not be fetched. {' '.join(refusals)} Another try goes on "
            "with what has come."
        )

    async def _file(self, incoming: Incoming, sha256: str, source: str) -> None:
        path = incoming.record.path
        try:
            while incoming.left:
                asked = {"offset": incoming.position, "nbytes": min(PIECE_BYTES, incoming.left)}
                piece = await self._asked(source, "pipeload_piece", sha256=sha256, path=path, **asked)
                await asyncio.to_thread(incoming.add, piece)
            await asyncio.to_thread(incoming.finish)
        except ShardError as error:
            raise _SourceError(str(error)) from error

    async def _asked(self, source: str, operation: str, **arguments: Any) -> bytes:
        assert self.pool is not None
        try:
            with foreign_errors(_SourceError, "It sends nothing", "Look at its log."):
                async with asyncio.timeout(_ANSWER_S):
                    return bytes(await getattr(self.pool(source), operation)(**arguments))
        except PipeloadError as error:
            # Of the other node: the same error here would be one of this node's disk.
            raise _SourceError(str(error)) from error


class _SourceError(ClusterError):
    """A node does not give a file."""
