"""The nodes that may send a model's files: those that have all of it, and those that have fetched some."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from pipeload.errors import ClusterError
from pipeload.format.manifest import FileRecord

__all__ = ["SourceError", "Sources"]


class SourceError(ClusterError):
    """A node does not give a file, or what it is asked for."""


class Sources:
    """Whom to ask for which file. Nodes that fetch at the same time become sources of each other as files come.

    Args:
        addresses: of the nodes.
        files: address of a node -> sha256 of the model's files that it has whole; raises SourceError.
    """

    def __init__(self, addresses: Sequence[str], files: Callable[[str], Awaitable[Sequence[str]]]) -> None:
        self._addresses, self._files = [*addresses], files
        self._failed: set[str] = set()
        self._sent: Counter[str] = Counter()

    async def having(self, record: FileRecord) -> list[str]:
        """The nodes that have a file, in the order to ask them: those first that have sent the least, and by chance.

        One that has failed is asked again where no other one has the file.
        """
        good = [address for address in self._addresses if address not in self._failed]
        found = await self._with(record, good) or await self._with(record, sorted(self._failed))
        return sorted(found, key=lambda address: (self._sent[address], random.random()))

    def sent(self, address: str, nbytes: int) -> None:
        """Count bytes of a node."""
        self._sent[address] += nbytes

    def failed(self, address: str) -> None:
        """Ask others instead of this node."""
        self._failed.add(address)

    async def _with(self, record: FileRecord, addresses: Sequence[str]) -> list[str]:
        async def has(address: str) -> bool:
            try:
                return record.sha256 in await self._files(address)
            except SourceError:
                self.failed(address)
                return False

        there = await asyncio.gather(*map(has, addresses))
        return [address for address, it_has in zip(addresses, there, strict=True) if it_has]
