"""Byte reservations under a hard limit, granted in plan order, closable.

Loading Agents reserve before they read. The Inference Agent takes shards in order, so the order of the grants matters:
if a later shard got the last bytes, the earlier one that inference waits for could never be loaded. Each reservation
therefore carries a ticket, and ticket n is granted after ticket n - 1 was granted or skipped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pipeload.errors import ClosedError, LoadError
from pipeload.machine.sizes import format_bytes

__all__ = ["Reservations"]


class Reservations:
    """The bytes that the plan gives to weights.

    Args:
        limit_bytes: the sum of all reservations never exceeds it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._changed = threading.Condition()
        self._limit_bytes = limit_bytes
        self._reserved_bytes = 0
        self._turn = 0
        self._skipped: set[int] = set()
        self._closed = False

    @property
    def reserved_bytes(self) -> int:
        """Bytes that are reserved now."""
        return self._reserved_bytes

    def reserve(self, nbytes: int, ticket: int, cancelled: Callable[[], bool]) -> bool:
        """Wait for the ticket's turn and for the bytes. Returns False, with nothing reserved, when cancelled.

        Args:
            nbytes: the bytes to reserve.
            ticket: 0, 1, 2 ...: every number is reserved exactly once.
            cancelled: checked after every change; see `wake`.

        Raises:
            LoadError: `nbytes` exceeds the limit, so waiting cannot help.
            ClosedError: the budget was closed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closed
                    or cancelled()
                    or nbytes > self._limit_bytes
                    or (self._turn == ticket and self._reserved_bytes + nbytes <= self._limit_bytes)
                )
            )
            self._skip(ticket)
            if self._closed:
                raise ClosedError("The model was closed.")
            if cancelled():
                return False
            if nbytes > self._limit_bytes:
                raise LoadError(
                    f"A shard needs {format_bytes(nbytes)}, more than the {format_bytes(self._limit_bytes)} that the "
                    "plan has for weights. This is a fault of the planner: please report the model and the budget."
                )
            self._reserved_bytes += nbytes
            return True

    def release(self, nbytes: int) -> None:
        """Give reserved bytes back."""
        with self._changed:
            self._reserved_bytes -= nbytes
            self._changed.notify_all()

    def set_limit(self, limit_bytes: int) -> None:
        """Change the limit; bytes reserved above it stay reserved until they are released."""
        with self._changed:
            self._limit_bytes = limit_bytes
            self._changed.notify_all()

    def wake(self) -> None:
        """Make every waiting reservation check its `cancelled` again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End every wait, now and later, with ClosedError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def skip(self, ticket: int) -> None:
        """The ticket will not be reserved, if it was not: let the next one have its turn."""
        with self._changed:
            if ticket >= self._turn:
                self._skip(ticket)

    def _skip(self, ticket: int) -> None:
        """Finish this ticket: the next one has its turn."""
        self._skipped.add(ticket)
        while self._turn in self._skipped:
            self._skipped.remove(self._turn)
            self._turn += 1
        self._changed.notify_all()
