"""The sha256 of a file and of ranges of it, computed while its bytes pass once.

The shards' ranges of a weights file have digests of their own. The file's is of the bytes beside them (header, tables),
so no byte is hashed twice; in older directories it is of all bytes.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator

from pipeload.format.manifest import FileRecord, Manifest, WeightsRange

__all__ = ["FileDigests", "ranges_of"]


class FileDigests:
    """The digests of a file and of ranges of it.

    Args:
        ranges: first byte and end of each.
        apart: the file's digest leaves out the bytes of the ranges.

    Attributes:
        position: bytes that have passed.

    Example:
        >>> digests = FileDigests([(1, 3)], apart=True)
        >>> digests.update(b"abcd")
        >>> digests.range_sha256(1, 3) == hashlib.sha256(b"bc").hexdigest()
        True
        >>> digests.sha256 == hashlib.sha256(b"ad").hexdigest()
        True
    """

    def __init__(self, ranges: Iterable[tuple[int, int]], *, apart: bool) -> None:
        self._ranges = {span: hashlib.sha256() for span in ranges}
        self._file = hashlib.sha256()
        self._parts = [(*span, digest) for span, digest in self._ranges.items()]
        self._parts += [(*span, self._file) for span in _beside(self._ranges if apart else ())]
        self.position = 0

    @property
    def sha256(self) -> str:
        """The file's own."""
        return self._file.hexdigest()

    def update(self, piece: bytes | memoryview) -> None:
        """The next bytes of the file."""
        begin, view = self.position, memoryview(piece)
        self.position += len(view)
        for first, end, digest in self._parts:
            if first < self.position and begin < end:
                digest.update(view[max(first - begin, 0) : end - begin])

    def range_sha256(self, begin: int, end: int) -> str:
        """The sha256 of one of the ranges."""
        return self._ranges[begin, end].hexdigest()

    def agree(self, record: FileRecord, ranges: Iterable[WeightsRange]) -> bool:
        """Whether the digests are those of the manifest: the file's, and those of these ranges of it."""
        return self.sha256 == record.sha256 and all(
            self.range_sha256(span.offset, span.offset + span.nbytes) == span.sha256 for span in ranges
        )

    @classmethod
    def of(cls, record: FileRecord, ranges: Iterable[WeightsRange]) -> FileDigests:
        """Digests to be compared with those of the manifest: the file's, and those of these ranges of it."""
        return cls([(span.offset, span.offset + span.nbytes) for span in ranges], apart=record.ranges_apart)


def ranges_of(manifest: Manifest) -> dict[str, list[WeightsRange]]:
    """Path of a weights file -> the ranges of it that shards load, each once."""
    found: dict[str, dict[WeightsRange, None]] = {}
    for shard in manifest.shards:
        if shard.weights:
            found.setdefault(shard.weights.path, {})[shard.weights] = None
    return {path: list(ranges) for path, ranges in found.items()}


def _beside(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """First byte and end of what lies before, between and behind the ranges."""
    position = 0
    for begin, end in sorted(ranges):
        if position < begin:
            yield position, begin
        position = max(position, end)
    yield position, sys.maxsize
