"""Calls that wait for a sweep."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic

from pipeload.machine.threads import Result
from pipeload.pipeline.session import Stopper
from pipeload.pipeline.sweep import Feed

if TYPE_CHECKING:
    from pipeload.pipeline.exchange import Exchange

__all__ = ["Call", "Request", "Served"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Served:
    """A feed, and what its pass takes.

    Attributes:
        feed: what passes through the shards.
        pass_bytes: memory that the pass needs beside weights and caches.
        held_bytes: the part of it that is in use all the time, also while other feeds run.
        cache_bytes: memory of all caches that are open while it runs.
        kind: see `Replanner.after_pass`.
    """

    feed: Feed
    pass_bytes: int
    held_bytes: int
    cache_bytes: int
    kind: object = None


class Call(Generic[Result]):
    """One call that is queued or runs."""

    def __init__(self, exchange: Exchange, work: Callable[[Request], Result], served: Served | None = None) -> None:
        self._exchange = exchange
        self._request = Request(work=work, served=served)
        if served:
            served.feed.stopper = self._request.stopper
        exchange.submit(self._request)

    def result(self) -> Result:
        """Wait for the end of the call; whoever is interrupted while waiting has withdrawn it."""
        try:
            result: Result = self._request.result.result()
        except BaseException:
            self.withdraw()
            raise
        return result

    def withdraw(self) -> None:
        """Nobody waits any more: forget the call, or end it if it runs."""
        self._exchange.withdraw(self._request)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One call that waits for its pass.

    Attributes:
        work: serves it, and those that join it.
        served: what it passes through the shards; None for a call that runs no pass, which nobody joins.
        result: what its caller waits for.
        stopper: ends it.
    """

    work: Callable[[Request], Any]
    served: Any = None
    result: Future[Any] = field(default_factory=Future)
    stopper: Stopper = field(default_factory=Stopper)
