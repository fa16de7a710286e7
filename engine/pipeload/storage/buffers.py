"""Page-aligned memory that shards are read into and that sessions borrow."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import LoadError
from pipeload.format.manifest import WeightSpec
from pipeload.format.pages import memory_ceil, page_floor
from pipeload.format.placement import AS_READ, Placement

__all__ = ["Buffer", "BufferPool", "Part", "stored_in", "tensor_in"]


class Buffer:
    """Page-aligned anonymous memory, which shards are read into and sessions borrow.

    Pages occupy memory from their first use on. `close` gives the memory back even while views exist: they are
    then all zeros, never a dangling pointer.

    Raises:
        LoadError: the system refuses to map `nbytes`.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = memory_ceil(max(nbytes, 1))
        try:
            # Private: `close` cannot drop pages of a shared mapping, and huge pages for those are seldom enabled.
            self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise LoadError(
                f"The system has no memory for a buffer of {self.nbytes} bytes ({error}). Lower the memory budget, "
                "raise the limit of the process (ulimit -v), or end other programs."
            ) from error
        # Huge pages make the first fill several times cheaper; a forked child must not keep copies. Where there is no
        # such advice, nothing is lost.
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            with suppress(OSError, AttributeError):
                self._map.madvise(getattr(mmap, advice))
        self._view = memoryview(self._map)

    def piece(self, begin: int, end: int) -> memoryview:
        """A writable view of the bytes `begin` to `end`."""
        return self._view[begin:end]

    def array(self, dtype: str, shape: tuple[int, ...], begin: int) -> NDArray[Any]:
        """The tensor that begins at this byte of the buffer, without a copy; bfloat16 appears as uint16."""
        element = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
        if 0 in shape:
            # It may lie behind the last byte.
            return np.empty(shape, element)
        return np.frombuffer(self._map, dtype=element, count=prod(shape), offset=begin).reshape(shape)

    def close(self) -> None:
        """Give the memory back to the system."""
        self._view.release()
        try:
            self._map.close()
        except BufferError:
            # An array over it still exists: drop the pages now, the address range goes with the array. So do the pages
            # where the process has locked its memory (mlockall): an error here would hide the one that led here.
            with suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a shard's weights in memory; it begins and ends with whole tensors.

    Attributes:
        begin: first byte, counted from the beginning of the shard's range.
        end: the byte after the last one.
        buffer: the memory that holds it.
        placement: where it is read to in the buffer, and where the tensors lie that are moved or widened there
            (`pipeload.storage.widening`); those between `begin` and `end` are among them.
    """

    begin: int
    end: int
    buffer: Buffer
    placement: Placement = AS_READ

    def piece(self, begin: int, end: int) -> memoryview:
        """The memory of a range that was counted from the page in which the part begins."""
        return self.buffer.piece(self.placement.read_at + begin, self.placement.read_at + end)


def stored_in(parts: Sequence[Part], spec: WeightSpec, range_offset: int) -> NDArray[Any]:
    """The tensor as it is stored, as an array over the part that was read; bfloat16 appears as uint16.

    Args:
        parts: all parts of a shard's weights.
        spec: the tensor, with its offset in the file.
        range_offset: where in the file the shard's range begins.
    """
    place = spec.offset - range_offset
    part = next((part for part in parts if part.begin <= place < part.end), parts[0])
    return part.buffer.array(spec.dtype, spec.shape, part.placement.read_at + place - page_floor(part.begin))


def tensor_in(parts: Sequence[Part], spec: WeightSpec, range_offset: int) -> NDArray[Any]:
    """The tensor as the shard's graph takes it, as an array over the part that holds it, without a copy.

    Args:
        parts: all parts of a shard's weights, whose tensors were widened where that is due.
        spec: the tensor, with its offset in the file.
        range_offset: where in the file the shard's range begins.
    """
    for part in parts:
        if spec.name in part.placement.places:
            return part.buffer.array(spec.memory_dtype, spec.shape, part.placement.places[spec.name])
    return stored_in(parts, spec, range_offset)


class BufferPool:
    """Buffers of equal size that are reused, so that their pages are made only once.

    The budget limits the number of buffers in use: the loader reserves a buffer's bytes before it takes one. Idle
    buffers have no reservation, so the pool keeps at most as many as the plan has.

    Args:
        buffer_bytes: size of each.
        keep: a returned buffer is kept while at most this many exist, idle and used ones together.
    """

    def __init__(self, buffer_bytes: int, keep: int) -> None:
        self._buffer_bytes = buffer_bytes
        self._keep = keep
        self._lock = threading.Lock()
        self._idle: list[Buffer] = []
        self._count = 0

    @property
    def idle_bytes(self) -> int:
        """Memory of the idle buffers."""
        with self._lock:
            return len(self._idle) * self._buffer_bytes

    @property
    def used(self) -> int:
        """The number of buffers in use."""
        with self._lock:
            return self._count - len(self._idle)

    @property
    def complete(self) -> bool:
        """Whether all buffers that are kept have been made."""
        return self._count >= self._keep

    def take(self) -> Buffer:
        """An idle buffer, or a new one. Its content is undefined."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
            self._count += 1
        try:
            return Buffer(self._buffer_bytes)
        except BaseException:
            with self._lock:
                self._count -= 1
            raise

    def give(self, buffer: Buffer) -> None:
        """Put a buffer back, or give its memory back to the system when there are more than planned."""
        with self._lock:
            if self._count <= self._keep:
                self._idle.append(buffer)
                return
            self._count -= 1
        buffer.close()

    def close(self) -> None:
        """Give the memory of all idle buffers back to the system."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._count -= len(idle)
        for buffer in idle:
            buffer.close()
