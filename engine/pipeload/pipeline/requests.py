"""The queue of calls: calls wait here for the Inference Agent, and callers wait for their calls."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Generic

from pipeload.errors import ClosedError
from pipeload.machine.threads import Result
from pipeload.pipeline.callers import wait_for
from pipeload.pipeline.sweep import Feed
from pipeload.planning.needs import Needs

if TYPE_CHECKING:
    from pipeload.pipeline.joining import Rows

__all__ = ["Call", "Calls"]

_NONE = Needs()


class Call(Generic[Result]):
    """One call that is queued or runs.

    Args:
        work: serves this call, and the calls that join it; the Inference Agent passes this call to it.
        feed: passes through the shards; without one the call runs no sweep, and no other call joins it.
        needs: memory that its sweep needs beside weights.
        kind: see `Replanner.after_pass`.
        rows: of the feed, where they may share a batch with those of other calls.
        passes: that its caller has had for the same text, or the same texts, before.
    """

    def __init__(
        self,
        work: Callable[[Call[Result]], Result],
        feed: Feed | None = None,
        needs: Needs = _NONE,
        *,
        kind: object = None,
        rows: Rows | None = None,
        passes: int = 0,
    ) -> None:
        self.work = work
        self.runs_sweep = feed is not None
        self.feed = feed or Feed()
        self.needs = needs
        self.kind = kind
        self.rows = rows
        self.passes = passes
        self.outcome: Future[Result] = Future()
        self._queue: Calls | None = None

    def result(self) -> Result:
        """Wait for the end of the call. A caller that is interrupted while waiting, leaves, or has a deadline that
        passes, withdraws the call.
        """
        try:
            return wait_for(self.outcome, self._when)
        except BaseException:
            self.withdraw()
            raise

    def withdraw(self) -> None:
        """Stop waiting for the call: forget it, or end it if it runs."""
        assert self._queue is not None
        self._queue.forget(self)

    def _when(self) -> str:
        """When its deadline passed; see `deadlines.check`."""
        assert self._queue is not None
        if not self.runs_sweep:
            return "while the model changed its plan"
        return "while a pass waited behind other calls" if self._queue.has_waiting(self) else "while a pass ran"


class Calls:
    """The waiting calls, in order, and the calls being served.

    The caller who has had the fewest passes is next, so that those who begin do not wait for all who go on; but no two
    calls in a row overtake others, so that a call with k calls before it waits for at most 2k + 1 passes beside the one
    that runs. Calls that run no sweep, and those behind them, are not overtaken.

    Args:
        changed: the exchange's condition, under whose lock the queue lies too.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._closed = False
        self._cause: BaseException | None = None
        self._waiting: deque[Call[Any]] = deque()
        self._served: list[Call[Any]] = []
        self._expected, self._patience_s = 1, 0.0
        self._overtook = False

    def submit(self, call: Call[Result]) -> Call[Result]:
        """Queue a call, and return it. Raises ClosedError when closed."""
        with self._changed:
            if self._closed:
                raise ClosedError("The model is closed. Load it again.") from self._cause
            call._queue = self
            self._waiting.append(call)
            self._changed.notify_all()
        return call

    def next(self) -> Call[Any] | None:
        """The next call to serve; None when closed."""
        with self._changed:
            self._served = []
            while not self._closed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                # Callers served together come back one by one.
                self._changed.wait_for(lambda: self._closed or len(self._waiting) >= self._expected, self._patience_s)
                self._expected, self._patience_s = 1, 0.0
                # The callers may have withdrawn all calls meanwhile.
                if self._waiting and not self._closed:
                    self._served = [self._take()]
                    return self._served[0]
            return None

    def _take(self) -> Call[Any]:
        call = self._waiting[0]
        if not self._overtook:
            call = min(self._sweeping() or [call], key=lambda one: one.passes)
        self._overtook = call is not self._waiting[0]
        self._waiting.remove(call)
        return call

    def _sweeping(self) -> list[Call[Any]]:
        """The waiting calls that run a sweep, up to one that runs none."""
        return [*takewhile(lambda call: call.runs_sweep, self._waiting)]

    def join(self, choose: Callable[[Sequence[Call[Any]]], Sequence[Call[Any]]] = list) -> list[Call[Any]]:
        """Take the calls behind the current one that run a sweep too, to serve them together.

        Args:
            choose: those of them that are taken; without it, all of them.
        """
        with self._changed:
            joined = list(choose(self._sweeping()))
            for call in joined:
                self._waiting.remove(call)
            self._served += joined
            return joined

    def part(self, joined: Sequence[Call[Any]]) -> None:
        """Put calls that were to join back to the front of the queue."""
        with self._changed:
            self._served = [call for call in self._served if call not in joined]
            if not self._closed:
                self._waiting.extendleft(reversed(joined))
                return
        _end(joined, self._cause)

    def expect(self, count: int, patience_s: float) -> None:
        """Delay the next sweep by at most `patience_s` until `count` more calls are queued."""
        with self._changed:
            self._expected, self._patience_s = count + len(self._waiting), patience_s

    @property
    def idle(self) -> bool:
        """Whether no call runs or waits."""
        with self._changed:
            return not self._served and not self._waiting

    def has_waiting(self, call: Call[Any]) -> bool:
        """Whether this call waits."""
        with self._changed:
            return call in self._waiting

    def close(self, cause: BaseException | None = None) -> None:
        """End every waiting or running call with ClosedError, raised from `cause` if there is one."""
        with self._changed:
            self._closed = True
            self._cause = self._cause or cause
            waiting, self._waiting = list(self._waiting), deque()
            for call in self._served:
                call.feed.stopper.stop()
            self._changed.notify_all()
        _end(waiting, cause)

    def forget(self, call: Call[Any]) -> None:
        """The caller no longer waits for the call: take it out, or end it if it runs."""
        with self._changed:
            if call in self._waiting:
                self._waiting.remove(call)
            call.feed.stopper.stop()
            self._changed.notify_all()


def _end(calls: Iterable[Call[Any]], cause: BaseException | None) -> None:
    for call in calls:
        error = ClosedError("The model was closed before the call began.")
        error.__cause__ = cause
        # Not where the caller has left, and waits no more.
        if call.outcome.set_running_or_notify_cancel():
            call.outcome.set_exception(error)
