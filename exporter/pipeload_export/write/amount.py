"""How many bytes of weights are written, and how many it will be in all."""

from __future__ import annotations

__all__ = ["Amount"]


class Amount:
    """The bytes of weights files. How many those to come have is estimated by those that were begun.

    Whether a weight is stored in 16 bits is known once its values were seen; and what several shards take is written
    for each of them.

    Args:
        nbytes: bytes of the graph's constants, as it computes with them.

    Attributes:
        done: bytes that are written.

    Example:
        >>> amount = Amount(1000)
        >>> amount.begin(100, of=200)
        >>> amount.total
        500
    """

    def __init__(self, nbytes: int) -> None:
        self._left = nbytes
        self._begun = 0
        self._begun_of = 0
        self.done = 0

    def begin(self, nbytes: int, *, of: int) -> None:
        """A file is begun.

        Args:
            nbytes: bytes of its weights.
            of: bytes of the constants that they are.
        """
        self._left = max(self._left - of, 0)
        self._begun += nbytes
        self._begun_of += of

    @property
    def total(self) -> int:
        """Bytes of all files, those to come included."""
        return self._begun + (self._left * self._begun // self._begun_of if self._begun_of else self._left)
