"""Tables whose file is checked by the slices of a tied head.

The prologue takes rows of such a table before the head is loaded. Reading the whole file first would cost a pass the
same time as the head itself, and the loaders check each slice of the head before the pass has an answer. So the
prologue may take unchecked rows, provided that the slices are then read from the very file that the rows came from.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from pipeload.errors import ShardError
from pipeload.storage.stamps import Stamp

__all__ = ["TiedTable"]


class TiedTable:
    """The rows and slices that were read of one such file. May be used from any thread.

    Args:
        name: the file, as the manifest names it.
        slices: the keys of the head's slices, which together are all of the file's tensors.
    """

    def __init__(self, name: str, slices: Iterable[str]) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._read: dict[str, Stamp | None] = dict.fromkeys(slices)
        self._rows: Stamp | None = None

    def may_take_rows(self, stamp: Stamp) -> bool:
        """Whether every slice was read, and found right, from the file with this stamp, or is yet to be read.

        If so, a slice that is later read from a changed file is an error: the rows came from an unchecked file.
        """
        with self._lock:
            if any(read not in (None, stamp) for read in self._read.values()):
                return False
            self._rows = stamp if None in self._read.values() else None
            return True

    def slice_was_read(self, key: str, stamp: Stamp) -> None:
        """Note that a slice was read, and found right, from the file with this stamp.

        Raises:
            ShardError: rows were taken from the file as it was before.
        """
        with self._lock:
            self._read[key] = stamp
            if self._rows is None:
                return
            changed = self._rows != stamp
            if changed or None not in self._read.values():
                self._rows = None
        if changed:
            raise ShardError(
                f"'{self._name}' changed while a pass read it, so that its answer could not be checked. Run it again."
            )
