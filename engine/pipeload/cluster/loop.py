"""The loop in which a client waits for a cluster, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextvars import Context
from typing import Any, TypeVar

from pipeload.errors import ClosedError, ClusterError
from pipeload.foreign import foreign_errors
from pipeload.pipeline.callers import wait_for

__all__ = ["Loop"]

_CLOSED = "The connection to the cluster is closed. Connect again."
_ASKED = "while the cluster was asked"
_JOIN_S = 15.0

_Made = TypeVar("_Made")


class Loop:
    """A loop in the thread `pipeload-cluster`, which ends with it. Safe to use from several threads."""

    def __init__(self) -> None:
        # A model that the garbage collector finds, at any time, begins to close its stages.
        self._lock = threading.RLock()
        self._closed = False
        self._waiting: set[Future[Any]] = set()
        self._farewell: Callable[[], Awaitable[object]] | None = None
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="pipeload-cluster", daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, _Made]) -> Future[_Made]:
        """Begin a coroutine. It has none of its caller's context: it may outlive the call, and so its deadline.

        Raises:
            ClosedError: the loop is closed.
        """
        with self._lock:
            if not self._closed:
                future = Context().run(asyncio.run_coroutine_threadsafe, work, self._loop)
                self._waiting.add(future)
                future.add_done_callback(self._waiting.discard)
                return future
        work.close()
        raise ClosedError(_CLOSED)

    def result(self, future: Future[_Made], when: str = _ASKED) -> _Made:
        """Wait for what `begin` has begun. A caller that is interrupted, leaves, or has a deadline that passes, cancels
        it.

        Args:
            future: what it has given.
            when: ends the sentence "The deadline of 2 s passed ...".

        Raises:
            ClosedError: the loop was closed meanwhile, or the caller has left.
            DeadlineError: the caller's deadline has passed.
            ClusterError: a library failed in it.
            PipeloadError: of the coroutine.
        """
        try:
            with foreign_errors(ClusterError, "The cluster failed", "The logs of its processes have more."):
                try:
                    return wait_for(future, lambda: when)
                except CancelledError:
                    raise ClosedError(_CLOSED) from None
        except BaseException:
            future.cancel()
            raise

    def ask(self, work: Coroutine[Any, Any, _Made], when: str = _ASKED) -> _Made:
        """The result of a coroutine.

        Args:
            work: the coroutine.
            when: as for `result`.

        Raises:
            PipeloadError: as `result`.
        """
        return self.result(self.begin(work), when)

    def at_the_end(self, farewell: Callable[[], Awaitable[object]]) -> None:
        """Set what the loop does last."""
        self._farewell = farewell

    def close(self) -> None:
        """End what runs in the loop, whose waiting callers get a ClosedError; then the loop. May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for future in [*self._waiting]:
            future.cancel()
        self._loop.call_soon_threadsafe(self._ended.set)
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_closed())

    async def _until_closed(self) -> None:
        await self._ended.wait()
        if self._farewell is not None:
            await self._farewell()
