"""The sha256 of a file and of parts of it, computed while its bytes pass once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["RangeDigests"]


class RangeDigests:
    """The digests of ranges of a stream.

    Args:
        ranges: first byte and end of each.

    Attributes:
        position: bytes that have passed.

    Example:
        >>> digests = RangeDigests([(0, 4), (1, 3)])
        >>> digests.update(b"abcd")
        >>> digests.hexdigest(1, 3) == hashlib.sha256(b"bc").hexdigest()
        True
    """

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._digests = {span: hashlib.sha256() for span in ranges}
        self.position = 0

    def update(self, piece: bytes | memoryview) -> None:
        """The next bytes of the stream."""
        begin, view = self.position, memoryview(piece)
        self.position += len(view)
        for (first, end), digest in self._digests.items():
            if first < self.position and begin < end:
                digest.update(view[max(first - begin, 0) : end - begin])

    def hexdigest(self, begin: int, end: int) -> str:
        """The sha256 of one of the ranges."""
        return self._digests[begin, end].hexdigest()
