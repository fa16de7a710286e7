"""The files whose sha256 this machine has checked before: a cold start need not hash them again.

A stamp is the file system's record of a file that was read whole and found right: device, inode, size, time of the
last change of content and of the last change of anything. A program that changes, replaces or copies a file makes
another stamp. Every read compares stamps, and a file with another stamp is hashed again, in the same process too.
Later silent damage on the disk keeps the stamp: `pipeload verify` reads everything.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path
from typing import TypeAlias

import msgspec

from pipeload.machine.files import read_file
from pipeload.machine.user_cache import keep_file, user_cache

__all__ = ["Stamp", "Stamps", "is_fresh", "stamp_of", "stamps_of"]

Stamp: TypeAlias = tuple[int, int, int, int, int]
_FRESH_NS = 2_000_000_000
"""File systems keep times in steps of up to two seconds (FAT); most take the clock of the last timer tick."""
_MOST_BYTES = 16 << 20


def stamps_of(directory: Path, manifest_bytes: bytes) -> Stamps:
    """The kept stamps of a sharded model directory.

    Args:
        directory: the sharded model directory.
        manifest_bytes: its manifest, which gives each file's sha256.
    """
    identity = hashlib.sha256(str(directory.resolve()).encode() + b"\0" + manifest_bytes).hexdigest()
    folder = user_cache("verified")
    return Stamps(folder / f"{identity[:32]}.json" if folder else None)


class Stamps:
    """The stamps of checked files, from this process and earlier ones. May be used from any thread.

    Args:
        path: the file that keeps the stamps; None keeps nothing beyond this process.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._kept: dict[str, Stamp] = {}
        self._changed = False
        if path is not None:
            try:
                self._kept = msgspec.json.decode(read_file(path, most_bytes=_MOST_BYTES), type=dict[str, Stamp])
            except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                self._kept = {}

    def has(self, key: str, stamp: Stamp) -> bool:
        """Whether the file or range `key` was read and found right in a file with this stamp."""
        with self._lock:
            return self._kept.get(key) == stamp

    def add(self, key: str, before: Stamp, after: Stamp) -> None:
        """Remember that the file or range `key` was read and found right.

        Args:
            key: a file, or a range of one.
            before: the file's stamp when reading began.
            after: its stamp when all was read. A file that changed meanwhile, or too recently for its next change to
                make another stamp, is not remembered: the next read hashes it again.
        """
        if before != after or is_fresh(before):
            return
        with self._lock:
            self._changed = self._changed or self._kept.get(key) != before
            self._kept[key] = before

    def save(self) -> None:
        """Keep the stamps for later processes, where the user's cache can be written."""
        with self._lock:
            if self._path is None or not self._changed:
                return
            self._changed = False
            data = msgspec.json.encode(self._kept)
        keep_file(self._path, data)


def stamp_of(file: int | Path) -> Stamp:
    """The stamp, as it is now, of an open file (its descriptor) or of the file at a path."""
    found = os.stat(file)  # noqa: PTH116 - a descriptor has no path
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def is_fresh(stamp: Stamp) -> bool:
    """Whether a file with this stamp changed so recently that it could change again and keep the stamp.

    The time of the last change of anything decides: no program can set it, and every write moves it on.
    """
    return time.time_ns() - stamp[4] <= _FRESH_NS
