"""A range of an open file -> page-aligned memory, in large pieces, with nothing left in the page cache.

Reads are direct I/O, so that no byte is copied twice; file systems without O_DIRECT get ordinary reads, each piece
followed by `POSIX_FADV_DONTNEED`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from pipeload.errors import LoadError, ShardError
from pipeload.format.manifest import PAGE_BYTES
from pipeload.format.pages import page_ceil, page_floor
from pipeload.storage.stamps import Stamp, stamp_of

__all__ = ["OpenFile", "read_bytes", "read_into", "read_range", "set_direct", "wrong_size"]

_PIECE_S = 0.1
"""Read sizes adapt so that one read takes about this long; a cancelled load notices within that time."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file of the model directory while it is open.

    Attributes:
        name: as the manifest names it.
        nbytes: its size by the manifest.
        descriptor: checks and reads both go through it, so they meet the same file.
        stamp: the file system's record of it when it was opened.
    """

    name: str
    nbytes: int
    descriptor: int
    stamp: Stamp

    def stamp_now(self) -> Stamp:
        """The file system's record of it now: another stamp means that it may have changed since it was opened."""
        return stamp_of(self.descriptor)


def read_range(
    file: OpenFile,
    offset: int,
    nbytes: int,
    place: Callable[[int, int], memoryview],
    piece_bytes: int,
    *,
    most_bytes: int = 0,
    direct: bool = True,
) -> Iterator[memoryview]:
    """Read a range, piece by piece.

    Args:
        file: the open file.
        offset: first byte of the range, a multiple of the page size.
        nbytes: its length.
        place: (begin, end) within the range -> page-aligned memory for these bytes.
        piece_bytes: bytes of the first read.
        most_bytes: fast reads grow to at most this size.
        direct: past the page cache where the file system can.

    Yields:
        The bytes of each read, without those behind the range.

    Raises:
        ShardError: the file ends before the range does.
        LoadError: the system cannot read it.
    """
    direct = set_direct(file.descriptor, direct)
    position = 0
    while position < nbytes:
        end = min(position + piece_bytes, page_ceil(nbytes))
        target = place(position, end)
        begin_s = time.perf_counter()
        try:
            count = os.preadv(file.descriptor, [target], offset + position)
        except OSError as error:
            if not (direct and error.errno == errno.EINVAL):
                raise LoadError(
                    f"Reading '{file.name}' at byte {offset + position} failed: {error.strerror}. "
                    "Check the disk, then load the model again."
                ) from error
            direct = set_direct(file.descriptor, False)
            continue
        if count == 0:
            raise wrong_size(file, offset + position)
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.descriptor, offset + position, count, os.POSIX_FADV_DONTNEED)
        in_time = int(count * _PIECE_S / max(time.perf_counter() - begin_s, 1e-9))
        piece_bytes = max(piece_bytes, page_floor(min(in_time, most_bytes)))
        yield target[: min(count, nbytes - position)]
        position += count
        if direct and position < nbytes and position % PAGE_BYTES:
            # Direct I/O cannot go on from an unaligned place: ordinary reads can, or meet the end of the file.
            direct = set_direct(file.descriptor, False)


def read_bytes(file: OpenFile, nbytes: int, offset: int) -> bytes:
    """Bytes of an open file, by ordinary reads. For the errors see `read_into`."""
    data = b""
    while len(data) < nbytes:
        piece = os.pread(file.descriptor, nbytes - len(data), offset + len(data))
        if not piece:
            raise wrong_size(file, offset + len(data))
        data += piece
    return data


def read_into(file: OpenFile, target: memoryview, offset: int) -> None:
    """Fill memory from an open file, by ordinary reads: the system may bring a part of what one asks for.

    Raises:
        ShardError: the file ends before the memory is full.
        OSError: the system cannot read it.
    """
    position = 0
    while position < len(target):
        count = os.preadv(file.descriptor, [target[position:]], offset + position)
        if count == 0:
            raise wrong_size(file, offset + position)
        position += count


def wrong_size(file: OpenFile, place: int) -> ShardError:
    """The error for a file whose size differs from the manifest's, or for a read that returned too few bytes.

    Args:
        file: the open file.
        place: the first byte that a read did not return.
    """
    size = os.fstat(file.descriptor).st_size
    if size != file.nbytes:
        return ShardError(
            f"'{file.name}' has {size} bytes, the manifest says {file.nbytes}. Copy or export the model again."
        )
    return ShardError(
        f"'{file.name}' brought no byte {place}, although it has {size} bytes. Check the disk, or copy or export the "
        "model again."
    )


def set_direct(descriptor: int, direct: bool) -> bool:
    """Make reads of an open file direct or ordinary, as far as its file system can. Returns whether they are direct."""
    if not hasattr(os, "O_DIRECT"):
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if direct:
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            return True
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return False
