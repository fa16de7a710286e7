"""Which ring a model's calls go to, and which are on their way: a model moves between two passes.

```
enter     the present ring, or a wait while there is none: stages that have no room beside each other are closed first
to        later calls go to another ring; those on their way end where they began
ended     waits for the last one there
```
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future

from pipeload.cluster.ring import Ring
from pipeload.errors import ClosedError

__all__ = ["Calls"]


class Calls:
    """The calls of one model. Safe to use from several threads.

    Args:
        ring: the first one.

    Attributes:
        ring: the present one, or the one before while there is none.
    """

    def __init__(self, ring: Ring) -> None:
        self._changed = threading.Condition()
        self._counts: Counter[Ring] = Counter()
        self._shut = self._closed = self._moving = False
        self._waiting: list[Future[None]] = []
        self._moves = 0
        self.ring = ring

    @property
    def moves(self) -> int:
        """The number of moves that have ended."""
        return self._moves

    @property
    def closed(self) -> bool:
        """Whether the model is closed, or being closed."""
        return self._closed

    def enter(self) -> Ring | Future[None]:
        """Count a call that begins. Returns its ring, or what ends when it may try again.

        Raises:
            ClosedError: the model is closed.
        """
        with self._changed:
            if self._closed:
                raise _closed()
            if not self._shut:
                self._counts[self.ring] += 1
                return self.ring
            return self._next()

    def leave(self, ring: Ring) -> None:
        """Count a call of this ring no more."""
        with self._changed:
            self._counts[ring] -= 1
            if not self._counts[ring]:
                del self._counts[ring]
            self._changed.notify_all()

    def settled(self, moves: int) -> Future[None] | None:
        """What ends with the move that goes on, or has ended since there were this many; None where there is none."""
        with self._changed:
            if self._closed or (not self._moving and self._moves == moves):
                return None
            ends = self._next()
            if not self._moving:
                self._wake()
            return ends

    def move(self) -> None:
        """A move begins: the stages before and after it have less memory than either will have."""
        with self._changed:
            self._moving = True

    def shut(self) -> None:
        """Let later calls wait."""
        with self._changed:
            self._shut = True
            self._changed.notify_all()

    def to(self, ring: Ring) -> None:
        """Let later calls, and those that wait, go to this ring."""
        with self._changed:
            self.ring, self._shut = ring, False
            self._wake()
            self._changed.notify_all()

    def rest(self) -> None:
        """The move has ended; later calls go to the present ring."""
        with self._changed:
            self._moving = self._shut = False
            self._moves += 1
            self._wake()

    def ended(self, ring: Ring) -> None:
        """Wait until no call is on its way in this ring.

        Raises:
            ClosedError: the model was closed meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._counts[ring])
            if self._closed:
                raise _closed()

    def close(self) -> None:
        """End all waiting with ClosedError. May be called again."""
        with self._changed:
            self._closed = True
            self._wake(_closed())
            self._changed.notify_all()

    def _next(self) -> Future[None]:
        self._waiting.append(Future())
        self._changed.notify_all()
        return self._waiting[-1]

    def _wake(self, error: ClosedError | None = None) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            # A caller that was interrupted has cancelled it.
            if not future.set_running_or_notify_cancel():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)


def _closed() -> ClosedError:
    return ClosedError("The model was closed during the call. Load it again.")
