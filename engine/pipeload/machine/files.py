"""Files: the one place where pipeload opens them to read, and where they are written whole or not at all.

A stranger's directory may hold anything under a file's name: a pipe that no program writes to, a link to `/dev/zero`,
a socket. This module opens only regular files, and checks and reads the open descriptor: between a check of the path
and its opening, another file could take its place.

Every fault of a file is an `OSError` whose `strerror` states the fact and whose `filename` is the path; the caller
adds the remedy.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from pipeload.machine.sizes import format_bytes

__all__ = [
    "append_file",
    "descriptors",
    "open_file",
    "opening",
    "read_at",
    "read_file",
    "read_into",
    "read_stream",
    "replace_file",
    "write_whole",
]

_READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_PIECE_BYTES = 1 << 20
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def open_file(path: Path, *, below: Path | None = None) -> Iterator[int]:
    """A descriptor of a regular file, open for reading until the context ends. It never waits for another process.

    Args:
        path: the file.
        below: a folder in which the path, which has no symbolic link in it, lies: a link that takes the place of a part
            of the path between that check and the opening is not followed.

    Raises:
        OSError: the file is missing, or cannot be opened, or is no regular file.
    """
    # Without O_NONBLOCK, opening a pipe waits until a program writes to it. For regular files it means nothing.
    flags = _READING | os.O_NONBLOCK
    with descriptors() as held:
        if below is None:
            _open(held, path, flags)
        else:
            _open_below(held, below, path, flags)
        [descriptor] = held
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind == stat.S_IFDIR:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'something else')}, no regular file", str(path))
        yield descriptor


@contextmanager
def descriptors() -> Iterator[list[int]]:
    """A list of open descriptors, which are closed when the context ends; `opening` adds one."""
    held: list[int] = []
    closing = map(os.close, held)
    try:
        yield held
    finally:
        # One call closes all of them, also those that were added since.
        deque(closing, 0)


def opening(path: Path | str, flags: int, mode: int = 0o666, *, within: int | None = None) -> Iterator[int]:
    """A descriptor that is opened in the step of the interpreter in which a list takes it.

    So it is always in the list: `held += opening(path, flags)`. Between a call of `os.open` and the keeping of its
    result Ctrl-C may come, and a number closes nothing when it is lost.

    Args:
        path: the file or folder.
        flags: as for `os.open`.
        mode: permissions of a file that is made, before the umask.
        within: an open folder in which the path lies.

    Raises:
        OSError, ValueError: as `os.open`, in that step.
    """
    return map(partial(os.open, mode=mode, dir_fd=within), [path], [flags])


def read_file(path: Path, *, most_bytes: int, below: Path | None = None) -> bytes:
    """The content of a regular file.

    Args:
        path: the file.
        most_bytes: at most this many bytes are read; a larger file is refused.
        below: see `open_file`.

    Raises:
        OSError: the file is missing, cannot be read, is no regular file, or holds more.
    """
    with open_file(path, below=below) as descriptor:
        return _read(descriptor, path, most_bytes)


def read_stream(path: Path, *, most_bytes: int) -> bytes:
    """The content of a file, pipe or device that the user named, such as `/dev/stdin`; it waits as `cat` does.

    Args:
        path: the file, pipe or device.
        most_bytes: a stream that brings more is refused.

    Raises:
        OSError: it is missing, cannot be read, or brings more.
    """
    with descriptors() as held:
        _open(held, path, _READING)
        return _read(held[0], path, most_bytes)


def read_at(descriptor: int, nbytes: int, offset: int) -> bytes:
    """These bytes of an open file: fewer only where it ends, also where one read of the system brings a part of them.

    Raises:
        OSError: they cannot be read.
    """
    pieces: list[bytes] = []
    while nbytes and (piece := os.pread(descriptor, nbytes, offset)):
        pieces.append(piece)
        nbytes, offset = nbytes - len(piece), offset + len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_into(descriptor: int, target: memoryview, offset: int) -> int:
    """Fill memory with bytes of an open file, as `read_at` does. Returns how many there were.

    Raises:
        OSError: they cannot be read.
    """
    done = 0
    while done < len(target) and (count := os.preadv(descriptor, [target[done:]], offset + done)):
        done += count
    return done


def write_whole(path: Path, data: bytes) -> None:
    """Write a file with the process's usual permissions; a failure keeps the older file, and leaves no partial one.

    A device or a pipe cannot be replaced: it is written to. So is what `/dev` and `/proc` name, such as `/dev/stdout`,
    even where it leads to a file: other output goes there too.

    Args:
        path: the file, in an existing folder; an older file is replaced.
        data: its whole content.

    Raises:
        OSError: it cannot be written; its `filename` is `path`.
    """
    try:
        if path.exists() and not (path.is_file() and _is_own_file(path)):
            with path.open("ab") as file:
                file.write(data)
            return
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    replace_file(path, data)


def append_file(path: Path, data: bytes) -> None:
    """Write at the end of a file, which is made where it is missing.

    Raises:
        OSError: it cannot be written; its `filename` is `path`.
    """
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _is_own_file(path: Path) -> bool:
    """Whether the path names a file, and not an open descriptor of a process."""
    folder = path.absolute().parent
    return folder != Path("/dev") and not folder.is_relative_to("/dev/fd") and not folder.is_relative_to("/proc")


def replace_file(path: Path, data: bytes) -> None:
    """As `write_whole`, but a pipe or a link in the place of the file is replaced too: it never waits for a reader.

    Raises:
        OSError: it cannot be written; its `filename` is `path`.
    """
    try:
        staging = path.absolute().with_name(f".staging-{secrets.token_hex(8)}")
        try:
            staging.write_bytes(data)
            staging.replace(path)
        finally:
            with suppress(OSError):
                staging.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    except ValueError as error:
        _refuse_name(path, error)


def _open(held: list[int], path: Path, flags: int) -> None:
    try:
        held += opening(path, flags)
    except ValueError as error:
        _refuse_name(path, error)


def _open_below(held: list[int], folder: Path, path: Path, flags: int) -> None:
    """Open a path part by part, each within the open folder before it, and none through a symbolic link."""
    *folders, name = path.relative_to(folder).parts
    try:
        with descriptors() as inner:
            inner += opening(folder, _FOLDER)
            for part in folders:
                inner += opening(part, _FOLDER | os.O_NOFOLLOW, within=inner[-1])
            held += opening(name, flags | os.O_NOFOLLOW, within=inner[-1])
    except OSError as error:
        if error.errno == errno.ELOOP or (error.errno == errno.ENOTDIR and folders):
            fact = "a part of its path became another file, or a link, while it was opened"
            raise OSError(error.errno, fact, str(path)) from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    except ValueError as error:
        _refuse_name(path, error)


def _read(descriptor: int, path: Path, most_bytes: int) -> bytes:
    try:
        size = os.fstat(descriptor).st_size
        pieces: list[bytes] = []
        left = most_bytes + 1 if size <= most_bytes else 0
        # One read brings a file whose size is known, and one more its end.
        while left and (piece := os.read(descriptor, min(left, max(size + 1, _PIECE_BYTES)))):
            pieces.append(piece)
            left -= len(piece)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    if not left:
        raise OSError(errno.EFBIG, f"it holds more than the {format_bytes(most_bytes)} that are read of it", str(path))
    return b"".join(pieces)


def _refuse_name(path: Path, error: ValueError) -> NoReturn:
    # The system's own functions take no NUL and no lone surrogate in a name: Python refuses before it asks.
    raise OSError(errno.EINVAL, f"{str(path)!r} is no name of a file ({error})", str(path)) from error
