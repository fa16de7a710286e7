"""The exporter's boundary: exceptions of the system and of libraries become ExportErrors with fact, path and remedy.

Exceptions of the caller's own progress function pass as they are.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeload.errors import ExportError, PipeloadError
from pipeload.foreign import first_line, foreign_errors
from pipeload.notify import Notify

__all__ = ["boundary", "system_error"]

_REMEDIES = {
    errno.ENOSPC: "Make room there and try again.",
    errno.EDQUOT: "Make room there and try again.",
    errno.EROFS: "Name a folder on a disk that can be written.",
    errno.EACCES: "Name a folder in which this user may read and write.",
    errno.EPERM: "Name a folder in which this user may read and write.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Name a path without a circle of symbolic links.",
    errno.EEXIST: "Name a path whose folders are none of them files.",
    errno.ENOTDIR: "Name a path whose folders are none of them files.",
    errno.EMFILE: "Allow this process more open files (ulimit -n).",
}
_OTHER = "Check the disk and the path, then try again."
_REPORT = "Please report the model."


@contextmanager
def boundary(fact: str, place: Path, progress: Notify | None) -> Iterator[Notify]:
    """A context that raises PipeloadErrors, the exceptions of `progress`, and nothing else.

    Args:
        fact: the first part of the message, without a full stop.
        place: the folder at work, for errors of the system that name no path.
        progress: the caller's function.

    Yields:
        The function to tell the progress to.

    Raises:
        ExportError: the system or a library raised something, which is its cause.
    """
    raised: list[BaseException] = []

    def notify(what: str, done: int, total: int) -> None:
        if progress is not None:
            try:
                progress(what, done, total)
            except BaseException as error:
                raised.append(error)
                raise

    try:
        yield notify
    except BaseException as error:
        if any(error is one for one in raised):
            raise
        if isinstance(error, OSError):
            raise system_error(fact, error, place) from error
        if isinstance(error, MemoryError) and not isinstance(error, PipeloadError):
            raise ExportError(f"{fact}: there is not enough memory. Free some, or use a larger machine.") from error
        with foreign_errors(ExportError, fact, _REPORT):
            raise


def system_error(fact: str, error: OSError, place: Path) -> ExportError:
    """The ExportError for an error of the system.

    Args:
        fact: the first part of the message, without a full stop.
        error: the system's.
        place: named where the error has no path.
    """
    # Of a copy, the second path is the one that was written to.
    path = next((name for name in (error.filename2, error.filename) if name and isinstance(name, str)), place)
    return ExportError(f"{fact}: {first_line(error)} ({path}). {_REMEDIES.get(error.errno or 0, _OTHER)}")
