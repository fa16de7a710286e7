"""The boundary to libraries and the system: their exceptions become errors of pipeload, which keep nothing alive."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pipeload.errors import ExportError, LoadError, PipeloadError, RunError

__all__ = ["chain", "first_line", "foreign_errors", "let_go", "shortage_in", "system_error_in"]

_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
_OWN_MEMORY = (ExportError, LoadError, RunError)
"""Errors whose facts stay true where memory is short."""
_MEMORY_REMEDY = "Pass less at once, lower the memory budget, or end other programs."
_NUMBER = re.compile(r"system error number (\d+)")


@contextmanager
def foreign_errors(kind: Callable[[str], Exception], fact: str, remedy: str) -> Iterator[None]:
    """Turn an exception of a library or the system into one of pipeload's errors, with the original as its cause.

    Errors of pipeload pass as they are; so do KeyboardInterrupt, SystemExit and GeneratorExit.

    Args:
        kind: makes the error from its message; a class of `errors`, as a rule.
        fact: the failure, without a full stop; the first line of the original follows it.
        remedy: a sentence that tells the reader how to mend it.
    """
    try:
        yield
    except PipeloadError:
        raise
    except BaseException as error:
        # A panic in a library that is written in Rust is no Exception, but as foreign as one.
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        if isinstance(error, MemoryError) and kind not in _OWN_MEMORY:
            raise RunError(f"The process has no memory left: {first_line(error)}. {_MEMORY_REMEDY}") from error
        raise kind(f"{fact}: {first_line(error)}. {remedy}") from error


def system_error_in(error: BaseException, path: str) -> OSError | None:
    """The system's error that onnxruntime met at a file, and tells by its number alone; None where it met none."""
    if found := _NUMBER.search(str(error)):
        number = int(found[1])
        return OSError(number, os.strerror(number), path)
    return None


def shortage_in(error: BaseException) -> str | None:
    """What the process lacks, where the interpreter's own error tells that; None for any other error.

    Anywhere in a program it may find no memory, no thread, no descriptor, or no room for another library.
    """
    *_, error = chain(error, ("__cause__",))
    if isinstance(error, MemoryError):
        return "no memory is left to it"
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return first_line(error)
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "the system starts no more threads for it"
    if isinstance(error, ImportError) and (error.path or "").endswith(".so"):
        return first_line(error)
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or its type where it has none."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines()
    return lines[0].strip().removesuffix(".") if lines else type(error).__name__


def let_go(error: BaseException) -> None:
    """Clear the frames of an error: whatever keeps it must not keep sessions and activations alive."""
    for link in chain(error):
        traceback.clear_frames(link.__traceback__)


def chain(error: BaseException, links: Sequence[str] = ("__cause__", "__context__")) -> Iterator[BaseException]:
    """The error, its causes and contexts, and theirs, each once: exceptions may form circles.

    Args:
        error: where to begin.
        links: the attributes to follow; of several, the last one first.
    """
    seen: set[int] = set()
    found: list[BaseException | None] = [error]
    while found:
        link = found.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            found += [getattr(link, name) for name in links]
            yield link
