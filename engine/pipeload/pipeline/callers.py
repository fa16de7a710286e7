"""Callers that may leave: another thread ends the calls that they wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar, Token
from types import TracebackType

from pipeload.errors import ClosedError
from pipeload.machine.threads import Result
from pipeload.pipeline import deadlines

__all__ = ["Caller", "wait_for"]


class Caller:
    """A context: the calls that a thread makes in it are those of one caller, who may leave. For one thread at a time.

    Attributes:
        left: the caller has left. The call that it waited for has ended with ClosedError, before its next shard, and so
            does each later one.
    """

    def __init__(self) -> None:
        self.left = False
        self._lock = threading.Lock()
        self._outcome: Future[object] | None = None
        self._token: Token[Caller | None] | None = None

    def leave(self) -> None:
        """End the caller's calls, from any thread. May be called again."""
        with self._lock:
            self.left = True
            outcome = self._outcome
        if outcome is not None:
            # An answer that is there already stays one.
            outcome.cancel()

    def wait(self, outcome: Future[Result], when: Callable[[], str]) -> Result:
        """The outcome of a call. See `wait_for`.

        Raises:
            ClosedError: the caller has left.
            DeadlineError: the deadline has passed.
        """
        with self._lock:
            if self.left:
                raise ClosedError("The call was ended, since its caller has left.")
            self._outcome = outcome  # type: ignore[assignment] # only cancelled
        try:
            return deadlines.result_of(outcome, when)
        except CancelledError:
            raise ClosedError("The call was ended, since its caller has left.") from None
        finally:
            with self._lock:
                self._outcome = None

    def __enter__(self) -> Caller:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)


_CURRENT: ContextVar[Caller | None] = ContextVar("caller", default=None)


def wait_for(outcome: Future[Result], when: Callable[[], str]) -> Result:
    """The outcome of a call of this thread.

    Args:
        outcome: of the call.
        when: ends the sentence "The deadline of 2 s passed ...".

    Raises:
        ClosedError: the caller has left meanwhile; see `Caller`.
        DeadlineError: the deadline has passed meanwhile.
    """
    caller = _CURRENT.get()
    return deadlines.result_of(outcome, when) if caller is None else caller.wait(outcome, when)
