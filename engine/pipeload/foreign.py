"""The boundary to libraries and the system: what they raise becomes an error of pipeload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeload.errors import PipeloadError

__all__ = ["first_line", "foreign_errors"]


@contextmanager
def foreign_errors(kind: Callable[[str], PipeloadError], fact: str, remedy: str) -> Iterator[None]:
    """Raise what a library or the system raises inside as one of pipeload's errors, with the original as its cause.

    Errors of pipeload pass as they are; so do KeyboardInterrupt, SystemExit and GeneratorExit.

    Args:
        kind: makes the error of its message; a class of `errors`, as a rule.
        fact: what failed, without a full stop; the first line of the original follows it.
        remedy: what the reader can do, as a sentence.
    """
    try:
        yield
    except PipeloadError:
        raise
    except BaseException as error:
        # A panic in a library that is written in Rust is no Exception, but as foreign as one.
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise kind(f"{fact}: {first_line(error)}. {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or its type where it has none."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines()
    return lines[0].strip().removesuffix(".") if lines else type(error).__name__
