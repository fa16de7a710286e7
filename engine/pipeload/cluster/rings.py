"""The present stages of a model, how its calls get there, and how others take their place.

A model moves between two passes: calls on their way end on the stages before, later ones begin on those after. Where a
node is lost, calls are tried once more, on the nodes that are left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakSet

from pipeload.cluster.calls import Calls
from pipeload.cluster.history import History
from pipeload.cluster.loop import Loop
from pipeload.cluster.messages import NodeLostError, TextLostError
from pipeload.cluster.ring import Ring
from pipeload.cluster.state import ClusterState
from pipeload.errors import BudgetError, ClosedError, ClusterError, DeadlineError, PipeloadError
from pipeload.pipeline import deadlines

__all__ = ["FAREWELL_S", "Begun", "Rings"]

_ATTEMPTS = 2
"""A call whose node was lost is tried this many times in all."""
FAREWELL_S = 30.0
"""Closing stages is waited for this long."""
_MOVING = "while the model moved to other stages"
_SHORT_SHARE = 0.98
"""A node that refuses a call within less than this fraction of its budget is short of memory."""

_Answer = TypeVar("_Answer")


class Begun(NamedTuple, Generic[_Answer]):
    """A call on its way.

    Attributes:
        ring: its stages.
        future: its answer.
        moves: those of the model that had ended when it began.
    """

    ring: Ring
    future: Future[_Answer]
    moves: int


class Rings:
    """The rings of one model. Safe to use from several threads.

    Args:
        loop: the client's.
        open_ring: opens the best one without these processes of lost nodes.
        history: of the model's placements.

    Attributes:
        lost: processes of the nodes that were lost.
        replaced: how often the model was placed anew, since a node was lost.
        notice: waits until a placement without room was left, or has room after all; None where the model does not
            adapt.
    """

    def __init__(self, loop: Loop, open_ring: Callable[[frozenset[str]], Ring], history: History) -> None:
        self._loop, self._open_ring, self._history = loop, open_ring, history
        self._placing = threading.Lock()
        self._opening: Future[None] | None = None
        self._refusal: ClusterError | None = None
        self._texts: WeakSet[ClusterState] = WeakSet()
        self._keeping = threading.Lock()
        self.lost: frozenset[str] = frozenset()
        self.replaced = 0
        self.notice: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._calls = Calls(open_ring(self.lost))

    @property
    def present(self) -> Ring:
        """The present one."""
        return self._calls.ring

    @property
    def closed(self) -> bool:
        """Whether the model is closed, or being closed."""
        return self._calls.closed

    def keep(self, state: ClusterState) -> None:
        """Let the caches of a text follow the model where it moves, as long as something refers to them."""
        with self._keeping:
            self._texts.add(state)

    def begin(self, once: Callable[[Ring], Future[_Answer]]) -> Begun[_Answer]:
        """Begin a call on the present stages; waits while there are none.

        Raises:
            DeadlineError: the caller's deadline has passed.
        """
        deadlines.check("before a pass began")
        while isinstance(ring := self._calls.enter(), Future):
            self._loop.result(ring, _MOVING)
        moves = self._calls.moves
        try:
            future = once(ring)
        except BaseException:
            self._calls.leave(ring)
            raise
        # Not when its caller takes the answer: of a list of passes, the caller may wait for room to begin the next one.
        future.add_done_callback(partial(_leave, self._calls, ring))
        return Begun(ring, future, moves)

    def answer(
        self,
        once: Callable[[Ring], Future[_Answer]],
        begun: Begun[_Answer] | None = None,
        *,
        failed: Callable[[], object] = bool,
    ) -> _Answer:
        """What a call gives, on a new placement where a node was lost.

        Args:
            once: begins the call.
            begun: its first try, where that has begun.
            failed: called after each try that failed.
        """
        tries, waited = _ATTEMPTS, False
        while True:
            begun = begun or self.begin(once)
            try:
                made = self._loop.result(begun.future, _ran(begun.ring))
            except BaseException as error:
                failed()
                tries -= 1
                if isinstance(error, BudgetError) and not waited and (ends := self._calls.settled(begun.moves)):
                    # The stages before and after a move were there together. That is no fault of the nodes.
                    self._loop.result(ends, _MOVING)
                    waited, tries = True, tries + 1
                elif isinstance(error, BudgetError) and not waited and self.notice and _is_short(begun.ring, error):
                    # The model will leave that node in a few looks, if another placement has room.
                    self._loop.ask(self.notice(), "while a node was short of memory")
                    waited, tries = True, tries + 1
                elif isinstance(error, BudgetError) and self._refusal is not None:
                    raise self._refusal from error
                elif isinstance(error, NodeLostError):
                    if not tries:
                        text = f"{error} The call was tried twice. Call again once the nodes stay."
                        raise ClusterError(text) from error
                    self._replace(begun.ring, error)
                elif not isinstance(error, TextLostError) or not tries:
                    raise
                begun = None
            else:
                return made

    def refuse(self, error: ClusterError | None) -> None:
        """Set the error of calls that have no room on the present stages, where no other ones have; None unsets it."""
        if error is not None and self._refusal is None:
            self._history.add(
                self.present.placement, None, f"A stage has no room any more, nor has any other placement. {error}"
            )
        self._refusal = error

    def move(self, seen: Ring, prepare: Callable[[Ring], Ring], why: str, *, together: bool) -> bool:
        """Move to other stages, between two passes. Returns whether the model has moved.

        Calls on their way end on the stages before. Texts go on from their caches, which are copied where both rings
        are there and that is faster, or from their tokens.

        Args:
            seen: the ring that the decision was made for; where it is not the present one, nothing is done.
            prepare: called, in the loop, with the ring before; gives one that is to be started.
            why: the reason.
            together: the nodes have room for the stages before and after at the same time. Else calls wait while the
                ones are closed and the others opened.
        """
        with self._placing:
            if self._calls.closed or self._calls.ring is not seen:
                return False

            async def prepared() -> Ring:
                return prepare(seen)

            self._calls.move()
            shut_s: float | None = None
            try:
                ring = self._loop.ask(prepared())
                try:
                    if together:
                        self._wait_for(ring.start())
                        self._calls.to(ring)
                        self._calls.ended(seen)
                        self._wait_for(self._bring_texts(seen, ring))
                    else:
                        self._wait_for(ring.bring())
                        self._calls.shut()
                        shut_s = time.monotonic()
                        self._calls.ended(seen)
                        self._loop.ask(seen.close(_left()))
                        self._wait_for(ring.start())
                        self._calls.to(ring)
                    waited_s = _since(shut_s)
                finally:
                    # What is not in use any more, or never came into use.
                    for one in (seen, ring):
                        if one is not self._calls.ring or self._calls.closed:
                            self._loop.ask(one.close(_left()))
                    self._loop.ask(ring.settled())
            except PipeloadError as error:
                if not self._calls.closed:
                    self._history.add(seen.placement, None, f"{why} That failed: {error}", _since(shut_s))
                return False
            finally:
                self._calls.rest()
            self._history.add(seen.placement, ring.placement, why, waited_s)
            return True

    def close(self) -> Future[None] | None:
        """End all calls and moves with ClosedError, and begin to close the stages; None where the connection is closed.

        May be called again.
        """
        self._calls.close()
        if (opening := self._opening) is not None:
            opening.cancel()
        with self._placing:
            return self.drop()

    def drop(self) -> Future[None] | None:
        """The same, of a model that nothing refers to any more: a move that goes on ends by itself."""
        self._calls.close()
        try:
            return self._loop.begin(self.present.close())
        except ClosedError:
            return None

    async def _bring_texts(self, seen: Ring, ring: Ring) -> None:
        """Copy the caches of the texts that have had no step since the move."""
        with self._keeping:
            texts = [*self._texts]
        for text in texts:
            if text.ring is seen:
                await text.bring(ring)

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for a part of a move; ends when the model is closed meanwhile."""
        self._opening = self._loop.begin(work)
        try:
            if self._calls.closed:
                self._opening.cancel()
            self._loop.result(self._opening)
        finally:
            self._opening = None

    def _replace(self, lost: Ring, error: NodeLostError) -> None:
        """Place the model anew, where no other thread has done so; a late caller leaves that to the next one."""
        with deadlines.held(self._placing, _MOVING):
            if self._calls.closed:
                raise ClosedError("The model was closed during the call. Load it again.")
            if self._calls.ring is not lost:
                return
            begin_s = time.monotonic()
            self.lost |= lost.processes_at(error.address)
            with suppress(PipeloadError, TimeoutError, CancelledError):
                left_s = deadlines.left_s()
                self._loop.begin(lost.close(error)).result(FAREWELL_S if left_s is None else min(left_s, FAREWELL_S))
            try:
                self._calls.to(self._open_ring(self.lost))
            except DeadlineError:
                raise
            except PipeloadError as refusal:
                raise ClusterError(f"{error} The model cannot be placed anew: {refusal}") from refusal
            self.replaced += 1
            self._history.add(lost.placement, self.present.placement, str(error), time.monotonic() - begin_s)


def _ran(ring: Ring) -> str:
    """When a pass on these stages is late; see `deadlines.check`."""
    return f"while a pass ran on {', '.join(segment.node for segment in ring.placement.segments)}"


def _is_short(ring: Ring, error: BudgetError) -> bool:
    """Whether a node has refused a call within less memory than any had when the model was placed on them."""
    return not any(
        member.offer.budget_bytes * _SHORT_SHARE <= error.budget_bytes <= member.offer.budget_bytes
        for member in ring.members
    )


def _since(begin_s: float | None) -> float:
    return 0.0 if begin_s is None else time.monotonic() - begin_s


def _left() -> NodeLostError:
    """The error of calls that find a ring that was left; where there is no other one, they place the model anew."""
    return NodeLostError("The model has left its stages.", "")


def _leave(calls: Calls, ring: Ring, _: object) -> None:
    calls.leave(ring)
