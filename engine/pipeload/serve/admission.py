"""Places for calls: at most a number of them are served or wait, and a client that goes away gives its place up.

A call runs on a thread, since the engine's calls wait for sweeps. No admitted call waits for a thread: there are as
many as places. All calls of a model wait in the engine's own queue, where one sweep serves them all, so a short call
waits for the sweep that runs and takes part in the next one, however long the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from starlette.types import Receive

from pipeload.errors import ClosedError
from pipeload.pipeline.callers import Caller
from pipeload.serve.errors import ApiError

__all__ = ["Admission", "ClientGone", "Place"]

Result = TypeVar("Result")


class ClientGone(Exception):  # noqa: N818 - no error: the client has changed its mind
    """The client of a call went away."""


class Place:
    """The place of one call.

    Args:
        pool: has a thread for each place.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._caller = Caller()

    async def run(self, call: Callable[[], Result]) -> Result:
        """Run a call of the engine on a thread.

        Raises:
            ClientGone: the client went away meanwhile.
            PipeloadError: as the call.
        """

        def within() -> Result:
            with self._caller:
                return call()

        future = asyncio.get_running_loop().run_in_executor(self._pool, within)
        try:
            return await future
        except asyncio.CancelledError:
            # The server ends: the thread must not go on.
            self._caller.leave()
            raise
        except ClosedError:
            if self._caller.left:
                raise ClientGone from None
            raise

    def leave(self) -> None:
        """The client has gone: its calls end before the next sweep."""
        self._caller.leave()

    @property
    def left(self) -> bool:
        """Whether the client has gone."""
        return self._caller.left

    async def watch(self, receive: Receive) -> None:
        """Leave when the client's connection ends. To be cancelled when the answer was sent."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.leave()


class Admission:
    """Counts calls.

    Args:
        most: calls that are served or wait.
        pool: has a thread for each of them.
    """

    def __init__(self, most: int, pool: ThreadPoolExecutor) -> None:
        self._most = most
        self._pool = pool
        self.places: set[Place] = set()

    @property
    def full(self) -> bool:
        """Whether the next call would be refused."""
        return len(self.places) >= self._most

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place for one call.

        Raises:
            ApiError: all places are taken.
        """
        if self.full:
            raise ApiError(
                429,
                f"{self._most} calls are served or wait, as many as --max-waiting allows. Try again later.",
                code="too_many_calls",
                retry_after_s=1,
            )
        place = Place(self._pool)
        self.places.add(place)
        try:
            yield place
        finally:
            self.places.discard(place)
