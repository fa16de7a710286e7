"""Which files were checked against their sha256 before, on this machine: so that a cold start need not hash them again.

A stamp is what the file system says about a file that was read whole and found right: device, inode, size, time of the
last change of content and of the last change of anything. Whoever changes, replaces or copies a file makes another
stamp, and the file is checked when it is read next. Damage that the disk does silently, later, keeps the stamp:
`pipeload verify` reads everything.
"""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import msgspec

from pipeload.machine.files import read_file
from pipeload.machine.user_cache import keep_file, user_cache

__all__ = ["Stamp", "Stamps", "stamps_of"]

Stamp: TypeAlias = tuple[int, int, int, int, int]
_FRESH_NS = 2_000_000_000
"""A file that changed so recently could change again without another time stamp."""
_MOST_BYTES = 16 << 20


def stamps_of(directory: Path, manifest_bytes: bytes) -> Stamps:
    """The kept stamps of a sharded model directory.

    Args:
        directory: where it lies.
        manifest_bytes: its manifest, which says what each file's sha256 must be.
    """
    identity = hashlib.sha256(str(directory.resolve()).encode() + b"\0" + manifest_bytes).hexdigest()
    folder = user_cache("verified")
    return Stamps(folder / f"{identity[:32]}.json" if folder else None)


class Stamps:
    """What was checked: in this process, and in earlier ones. May be used from any thread.

    Args:
        path: the file that keeps the stamps; None keeps nothing beyond this process.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._checked: set[str] = set()
        self._kept: dict[str, Stamp] = {}
        self._changed = False
        if path is not None:
            try:
                self._kept = msgspec.json.decode(read_file(path, most_bytes=_MOST_BYTES), type=dict[str, Stamp])
            except (OSError, msgspec.DecodeError, UnicodeDecodeError):
                self._kept = {}

    def has(self, key: str, path: Path) -> bool:
        """Whether what `key` names in the file was checked, and the file is still the same."""
        with self._lock:
            if key in self._checked:
                return True
            known = self._kept.get(key)
            if known is None or known != _stamp_if_there(path):
                return False
            self._checked.add(key)
            return True

    def add(self, key: str, path: Path, before: Stamp) -> None:
        """What `key` names was read and found right.

        Args:
            key: a file, or a range of one.
            path: the file.
            before: its stamp when reading began; a file that changed meanwhile is remembered in this process only.
        """
        with self._lock:
            self._checked.add(key)
            if _stamp_if_there(path) == before and time.time_ns() - max(before[3:]) > _FRESH_NS:
                self._kept[key] = before
                self._changed = True

    def save(self) -> None:
        """Keep the stamps for later processes, where the user's cache can be written."""
        with self._lock:
            if self._path is None or not self._changed:
                return
            self._changed = False
            data = msgspec.json.encode(self._kept)
        keep_file(self._path, data)


def stamp(path: Path) -> Stamp:
    """The stamp of a file as it is now."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _stamp_if_there(path: Path) -> Stamp | None:
    with suppress(OSError):
        return stamp(path)
    return None
