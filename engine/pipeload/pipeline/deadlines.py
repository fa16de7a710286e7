"""Deadlines: by when the calls of a thread or task are to be done.

```
with deadline(2):      each wait of a call takes at most what is left of the 2 s, and no pass begins after them
    model.embed(...)   waits: for a pass, for memory of other models, for nodes of a cluster
```
A call that is late ends as one whose caller is interrupted.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Real

from pipeload.errors import ConfigError, DeadlineError
from pipeload.machine.threads import Result

__all__ = ["Deadline", "check", "current", "deadline", "held", "late", "left_s", "lifted", "result_of", "within"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """A deadline that runs.

    Attributes:
        limit_s: seconds that it has allowed.
        ends_s: when it passes, by `time.monotonic`.
    """

    limit_s: float
    ends_s: float


_CURRENT: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


def deadline(seconds: float) -> AbstractContextManager[None]:
    """Let the calls of a model that the body makes be done within a time, waits included; a late one ends with
    `DeadlineError`.

    It counts from the body's begin, for all models and methods, on one machine or a cluster: also the time for which a
    call waits behind others, for memory of other models, for stages to be opened or moved, and for its second try when
    a node was lost. It is looked at in each wait, and before each pass: an answer whose last pass was in time is given.
    A late call ends as an interrupted one does: its part in a pass ends at the next shard, other calls go on, and the
    model stays open. Pieces of text that a streamer has got stay got.

    It holds for the thread, or the task of asyncio, that runs the body; `asyncio.to_thread` takes it along, and a
    `TextStream` that is made in the body takes it to the thread that generates. An iterator, such as that of
    `run_many`, has the deadline of the place where it is iterated.

    Args:
        seconds: that the body may take, above 0. Of several deadlines, one within another, the one that passes first
            holds.

    Raises:
        ConfigError: seconds is no number above 0, or endless.

    Example:
        >>> with pipeload.load("models/exported/minilm", "128MB") as model, pipeload.deadline(10):
        ...     vectors = model.embed(["a cat", "a dog"])
    """
    if not isinstance(seconds, Real) or isinstance(seconds, bool) or not 0 < seconds < math.inf:
        raise ConfigError(
            f"The deadline is {seconds!r:.80}; it must be a number of seconds above 0. Leave it out for calls that may "
            "take any time."
        )
    return _within(float(seconds))


deadline.__module__ = "pipeload"


@contextmanager
def _within(limit_s: float) -> Iterator[None]:
    with within(Deadline(limit_s=limit_s, ends_s=time.monotonic() + limit_s)):
        yield


@contextmanager
def within(own: Deadline | None) -> Iterator[None]:
    """The body has this deadline too; of it and the present one, the one that passes first holds."""
    outer = _CURRENT.get()
    token = _CURRENT.set(min((one for one in (outer, own) if one), key=lambda one: one.ends_s, default=None))
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def lifted() -> Iterator[None]:
    """The body has no deadline: it gives something back."""
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Deadline | None:
    """The deadline in force."""
    return _CURRENT.get()


def left_s() -> float | None:
    """Seconds that are left, at least 0; None without a deadline."""
    own = _CURRENT.get()
    return None if own is None else min(max(0.0, own.ends_s - time.monotonic()), threading.TIMEOUT_MAX)


def check(when: str) -> None:
    """Raise DeadlineError where the deadline has passed.

    Args:
        when: ends the sentence "The deadline of 2 s passed ...", such as "before a pass began".
    """
    if left_s() == 0:
        raise late(when)


def late(when: str) -> DeadlineError:
    """The error of a call that the deadline in force has ended; see `check`."""
    own = _CURRENT.get()
    assert own is not None
    return DeadlineError(
        f"The deadline of {own.limit_s:g} s passed {when}. Give pipeload.deadline more seconds, or pass less at once."
    )


def result_of(outcome: Future[Result], when: Callable[[], str]) -> Result:
    """The outcome of a call, waited for until the deadline. One that is there by then counts.

    Args:
        outcome: of the call.
        when: see `check`.

    Raises:
        DeadlineError: the deadline has passed.
    """
    left = left_s()
    try:
        return outcome.result(left)
    except TimeoutError:
        if left is None or outcome.done():
            # The call's own error, or an answer of the last moment.
            return outcome.result()
        raise late(when()) from None


@contextmanager
def held(lock: threading.Lock, when: str) -> Iterator[None]:
    """The body has a lock, which is waited for until the deadline.

    Raises:
        DeadlineError: the deadline has passed.
    """
    left = left_s()
    if not lock.acquire(timeout=-1 if left is None else left):
        raise late(when)
    try:
        yield
    finally:
        lock.release()
