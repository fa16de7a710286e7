"""The weights files that an export has finished: if it is killed, the next one takes them over.

A file is noted when its bytes are on the disk, with its digests, in a line of its own that is on the disk in its turn.
What a file holds follows from its header, the ranges of it that are hashed, and the identity of the export. So a later
export that comes to the same header and ranges takes the file as it is.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from pipeload.machine.files import open_file

__all__ = ["Finished", "Journal"]

_LEAST_BYTES = 1 << 20
"""Smaller files are written again, which takes no longer than to wait for the disk."""
_MOST_BYTES = 64 << 20


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A weights file that was written.

    Attributes:
        path: below the export's folder.
        plan: sha256 of its header and of the ranges of it that have digests.
        nbytes: its size.
        sha256: of its bytes beside those ranges.
        ranges: first byte, end and sha256 of each range.
    """

    path: str
    plan: str
    nbytes: int
    sha256: str
    ranges: tuple[tuple[int, int, str], ...]

    def range_sha256(self, begin: int, end: int) -> str:
        """The sha256 of one of the ranges."""
        return next(sha256 for *span, sha256 in self.ranges if span == [begin, end])


class Journal:
    """The finished files of one export, and those of killed ones before it; a context manager.

    Args:
        root: the export's folder. Its file `journal` has the lines of the killed exports already, and its folder
            `before` a folder for each of them, in which the files that it made are where they were in its own.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / "journal"
        self._before = root / "before"
        self._writer = ThreadPoolExecutor(1, "pipeload-journal")
        self._last: Future[None] | None = None
        self._known: dict[tuple[str, str], Finished] = {}
        with suppress(FileNotFoundError):
            for line in self._path.read_bytes()[:_MOST_BYTES].splitlines():
                with suppress(ValueError, RecursionError):  # of a line that was being written, or lost with the power
                    finished = msgspec.json.decode(line, type=Finished)
                    self._known[finished.path, finished.plan] = finished

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        self._writer.shutdown()

    def close(self) -> None:
        """Wait until all files are noted; no more are taken. May be called again."""
        self._writer.shutdown()
        if self._last:
            self._last.result()

    def name(self, path: Path) -> str:
        """A file's path below the export's folder."""
        return str(path.relative_to(self._root))

    def take(self, path: Path, plan: str) -> Finished | None:
        """Put the file that a killed export has finished in its place, if there is one; None if there is none."""
        name = self.name(path)
        finished = self._known.get((name, plan))
        for folder in self._before.iterdir() if finished else ():
            file = folder / name
            if finished and file.is_file() and file.stat().st_size == finished.nbytes:
                file.replace(path)
                return finished
        return None

    def add(self, path: Path, finished: Finished) -> None:
        """Note a file. The disk is waited for beside the making of the next file; its error is raised there."""
        if finished.nbytes < _LEAST_BYTES:
            return
        if self._last:
            self._last.result()
        self._last = self._writer.submit(self._note, path, finished)

    def _note(self, path: Path, finished: Finished) -> None:
        try:
            with open_file(path) as descriptor:
                os.fsync(descriptor)
        except FileNotFoundError:
            return  # the same weights as those of an earlier shard, whose file serves for both
        with self._path.open("ab") as journal:
            journal.write(msgspec.json.encode(finished) + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
