"""Sizes in whole pages: those of the format in files, those of the system in memory."""

from __future__ import annotations

import mmap

from pipeload.format.manifest import PAGE_BYTES

__all__ = ["memory_ceil", "page_ceil", "page_floor", "room_bytes"]

_MEMORY_PAGE_BYTES = max(PAGE_BYTES, mmap.PAGESIZE)
"""4 KiB; 16 or 64 KiB with some kernels for Arm, such as that of the Raspberry Pi 5."""


def page_ceil(nbytes: int) -> int:
    """The next multiple of a file's page size."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def page_floor(nbytes: int) -> int:
    """The last multiple of a file's page size that is not above."""
    return nbytes // PAGE_BYTES * PAGE_BYTES


def memory_ceil(nbytes: int) -> int:
    """Memory that this number of bytes occupies: whole pages of the system."""
    return -(-nbytes // _MEMORY_PAGE_BYTES) * _MEMORY_PAGE_BYTES


def room_bytes(begin: int, end: int) -> int:
    """Bytes of memory for the bytes `begin` to `end` of a shard: all pages in which they lie."""
    return memory_ceil(page_ceil(end) - page_floor(begin))
