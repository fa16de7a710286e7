"""The C library's heap: give freed memory back, and bound the memory that it keeps."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

__all__ = ["foreign_allocator", "limit_heap", "trim"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""From glibc's malloc.h."""


class _Symbol(ctypes.Structure):
    """`Dl_info` of dlfcn.h: which file a function lies in."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def foreign_allocator() -> str | None:
    """Name of the library whose `malloc` stands in for that of glibc, such as a preloaded jemalloc; None without one.

    It keeps what is freed, by rules of its own, and heeds neither `limit_heap` nor `trim`.
    """
    try:
        own, used = (Path(_file_of(name)) for name in ("gnu_get_libc_version", "malloc"))
    except (OSError, AttributeError, TypeError):
        return None
    # A program that takes the address of malloc, as Python's on aarch64, has an entry of its own for it, which leads to
    # the C library's: only another library stands in for that.
    return used.name if used != own and ".so" in used.name else None


def _file_of(function: str) -> str:
    library, found = ctypes.CDLL(None), _Symbol()
    address = ctypes.cast(getattr(library, function), ctypes.c_void_p)
    if not library.dladdr(address, ctypes.byref(found)):
        raise OSError(f"{function} lies in no file")
    return os.fsdecode(found.file)


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
