"""Weights that several resident shards have in common (ALBERT's layers): one buffer for all of them."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from pipeload.format.manifest import WeightsRange
from pipeload.storage.buffers import Buffer

__all__ = ["SharedWeights"]


@dataclass(slots=True)
class _Use:
    """A range in memory: its buffer, the bytes that are reserved for it, and the number of shards over it."""

    buffer: Buffer
    reserved_bytes: int
    shards: int = 0


class SharedWeights:
    """The ranges that resident shards share. May be used from any thread.

    A range's bytes are reserved once, apart from its shards, until the last of them leaves. Where the shards will be
    packed, each has reserved the bytes of its own copy instead: until it has one, they cover the buffer too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[WeightsRange, _Use] = {}

    def __contains__(self, span: WeightsRange) -> bool:
        """Whether a shard uses the range now."""
        with self._lock:
            return span in self._uses

    @property
    def reserved_bytes(self) -> int:
        """Bytes that are reserved for ranges, apart from shards."""
        with self._lock:
            return sum(use.reserved_bytes for use in self._uses.values())

    @property
    def unused_bytes(self) -> int:
        """Bytes that shards have reserved for packed copies, and that nothing occupies yet."""
        with self._lock:
            uses = [use for use in self._uses.values() if not use.reserved_bytes]
            return sum((use.shards - 1) * use.buffer.nbytes for use in uses)

    def join(self, span: WeightsRange, nbytes: int, reserved_bytes: int) -> tuple[Buffer, bool]:
        """The range's buffer, for one more shard; and whether it is new, so that the caller must fill it.

        The caller is the only one that loads a shard of this range now.

        Args:
            span: the range.
            nbytes: size of a new buffer.
            reserved_bytes: what a new buffer has reserved, apart from the shard; `leave` returns them.

        Raises:
            LoadError: the system has no memory for a buffer.
        """
        with self._lock:
            use = self._uses.get(span)
            if use is None:
                use = self._uses[span] = _Use(Buffer(nbytes), reserved_bytes)
            use.shards += 1
            return use.buffer, use.shards == 1

    def leave(self, span: WeightsRange) -> int | None:
        """One shard less uses the range. Where it was the last, its buffer must be closed, and these bytes released."""
        with self._lock:
            use = self._uses[span]
            use.shards -= 1
            return None if use.shards else self._uses.pop(span).reserved_bytes
