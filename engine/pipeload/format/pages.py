"""Sizes in whole pages."""

from __future__ import annotations

from pipeload.format.manifest import PAGE_BYTES

__all__ = ["page_ceil", "page_floor", "room_bytes"]


def page_ceil(nbytes: int) -> int:
    """The next multiple of the page size."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def page_floor(nbytes: int) -> int:
    """The last multiple of the page size that is not above."""
    return nbytes // PAGE_BYTES * PAGE_BYTES


def room_bytes(begin: int, end: int) -> int:
    """Bytes of memory for the bytes `begin` to `end` of a shard: all pages in which they lie."""
    return page_ceil(end) - page_floor(begin)
