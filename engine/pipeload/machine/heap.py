"""The C library's heap: give freed memory back, and bound the memory that it keeps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache

__all__ = ["limit_heap", "trim"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""From glibc's malloc.h."""


def trim() -> None:
    """Give freed heap memory back to the system where the C library can (glibc's `malloc_trim`)."""
    release = _malloc_trim()
    if release is not None:
        release(0)


def limit_heap() -> None:
    """Keep the C library's heap from piling up freed memory, where it offers a setting (glibc's `mallopt`).

    By default glibc has eight arenas for each core, and keeps up to 64 MB in each of them once large blocks were freed.
    From this call on, for the rest of the process, blocks from 128 KiB on go back to the system when freed, an arena
    keeps 1 MiB, and threads that have no arena yet share the first: the heap grows no further with their number.
    """
    _set_option(_M_MMAP_THRESHOLD, 128 << 10)
    _set_option(_M_TRIM_THRESHOLD, 1 << 20)
    _set_option(_M_ARENA_MAX, 1)


def _set_option(option: int, value: int) -> None:
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(option, value)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        function = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_size_t]
    function.restype = ctypes.c_int
    return function
