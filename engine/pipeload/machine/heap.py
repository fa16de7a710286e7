"""The C library's heap: give freed memory back, and bound the memory that it keeps."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

__all__ = ["foreign_allocator", "is_scattered", "limit_heap", "one_arena", "reused", "trim"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""From glibc's malloc.h."""
_MAPPED_BYTES, _KEPT_BYTES = 128 << 10, 1 << 20
_MOST_BYTES = 1 << 30, 32 << 20
"""What `reused` asks for, in turn: glibc before 2.35 refuses more than half of a heap of 64 MiB."""
_LOCK = threading.Lock()
_limited = _scattered = False
_reusing = 0
"""How many threads are inside of `reused`."""


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
    keeps 1 MiB, and threads that have no arena yet share those that there are: no more are made.
    """
    global _limited, _scattered
    with _LOCK:
        if _limited:
            return
        _limited = True
        _set_option(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        _set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        one_arena()
        _scattered = _arenas() > 1


def one_arena() -> None:
    """Let all threads that have no arena of the heap yet share the first one, for the rest of the process.

    A program that calls this before it starts threads has one arena: what one thread frees, another one can take.
    """
    _set_option(_M_ARENA_MAX, 1)


def is_scattered() -> bool:
    """Whether the heap had several arenas when it was limited: what is freed in one is of no use to others' threads."""
    return _scattered


@contextmanager
def reused() -> Iterator[None]:
    """Take large blocks from the heap, too, and let it keep what is freed, so that the next ones take the same pages.

    The system has to clear each page that it gives, which takes longer than to fill it. Without `limit_heap` the C
    library does so by itself. What the heap keeps goes with `trim`.
    """
    global _reusing
    with _LOCK:
        _reusing += 1
        if _limited and _reusing == 1:
            any(_set_option(_M_MMAP_THRESHOLD, most) for most in _MOST_BYTES)
            _set_option(_M_TRIM_THRESHOLD, _MOST_BYTES[0])
    try:
        yield
    finally:
        with _LOCK:
            _reusing -= 1
            if _limited and not _reusing:
                _set_option(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def _arenas() -> int:
    """The arenas that the heap has; 1 where the C library does not tell (glibc's `malloc_info` does)."""
    with suppress(OSError, AttributeError):
        library, text, size = ctypes.CDLL(None), ctypes.c_char_p(), ctypes.c_size_t()
        library.open_memstream.restype = ctypes.c_void_p
        stream = ctypes.c_void_p(library.open_memstream(ctypes.byref(text), ctypes.byref(size)))
        told = library.malloc_info(0, stream)
        library.fclose(stream)
        found = (text.value or b"").count(b"<heap nr=")
        library.free(text)
        return found if told == 0 else 1
    return 1


def _set_option(option: int, value: int) -> bool:
    """Returns whether the C library took it."""
    with suppress(OSError, AttributeError, TypeError):
        return bool(ctypes.CDLL(None).mallopt(option, value))
    return False


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        function = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_size_t]
    function.restype = ctypes.c_int
    return function
