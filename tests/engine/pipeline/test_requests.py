"""The queue of calls by itself: what it hands out, what it waits for, and whom it wakes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.engine.harness import PATIENCE_S, Background
from tests.engine.pipeline.exchanges import call_of, nothing, waiting_for

from pipeload.errors import ClosedError
from pipeload.pipeline.callers import Caller
from pipeload.pipeline.requests import Call, Calls
from pipeload.pipeline.sweep import Feed
from pipeload.planning.needs import Needs


def _sweep() -> Call[Any]:
    return Call(lambda _: None, Feed())


class _Told(threading.Condition):
    """Waits for nothing: keeps how long each wait would take at most and whether it would take no time, and then acts.

    Args:
        acts: one for each wait, in order; none for those behind the last.
    """

    def __init__(self, *acts: Callable[[], object]) -> None:
        super().__init__()
        self.acts = list(acts)
        self.waits: list[tuple[float | None, bool]] = []

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> bool:
        self.waits.append((timeout, bool(predicate())))
        if self.acts:
            self.acts.pop(0)()
        return bool(predicate())


# A call


def test_a_call_is_what_it_was_made_of() -> None:
    feed, needs, rows = Feed(), Needs(pass_bytes=3), object()
    call = Call[Any](nothing, feed, needs, kind="k", rows=rows, passes=2)  # type: ignore[arg-type]
    assert (call.work, call.feed, call.needs, call.kind, call.rows) == (nothing, feed, needs, "k", rows)
    assert (call.runs_sweep, call.passes) == (True, 2)
    plain = call_of(nothing)
    assert (plain.needs, plain.kind, plain.rows, plain.runs_sweep, plain.passes) == (Needs(), None, None, False, 0)


def test_a_caller_who_leaves_withdraws_the_call_whether_it_waits_or_runs() -> None:
    calls = Calls(threading.Condition())
    runs, waits = (calls.submit(_sweep()) for _ in range(2))
    assert calls.next() is runs
    for call in (runs, waits):
        with Caller() as caller:
            caller.leave()
            with pytest.raises(ClosedError, match="its caller has left"):
                call.result()
        assert call.feed.stopper.stopped
    assert calls.join() == []


# Waiting for calls


def test_without_a_call_the_queue_waits_for_ever_and_with_one_it_waits_no_more() -> None:
    changed = _Told()
    calls = Calls(changed)
    call = _sweep()
    changed.acts = [lambda: calls.submit(call)]
    assert calls.next() is call
    assert changed.waits[0] == (None, False)
    assert changed.waits[1][1]


def test_patience_is_for_one_sweep_and_ends_with_the_calls_that_were_expected_or_more() -> None:
    changed = _Told()
    calls = Calls(changed)
    first = calls.submit(_sweep())
    calls.expect(2, 9.0)
    changed.acts = [nothing, nothing]
    assert calls.next() is first
    assert changed.waits[1] == (9.0, False)
    # Not for the next one.
    second = calls.submit(_sweep())
    assert calls.next() is second
    assert all(satisfied or not patience_s for patience_s, satisfied in changed.waits[2:])
    # Of more calls than were expected, each counts.
    calls.expect(1, 9.0)
    for _ in range(2):
        calls.submit(_sweep())
    changed.waits.clear()
    calls.next()
    assert changed.waits[1] == (9.0, True)


@pytest.mark.parametrize("expected", [1, 2])
def test_patience_ends_with_the_close_or_with_the_calls_that_come(expected: int) -> None:
    changed = threading.Condition()
    calls = Calls(changed)
    calls.expect(2, 100 * PATIENCE_S)
    first, second = _sweep(), _sweep()
    calls.submit(first)
    waiting = Background(calls.next)
    waiting_for(changed, 1)
    if expected == 2:
        calls.submit(second)
        assert waiting.end() is first
    else:
        calls.close()
        assert waiting.end() is None


def test_calls_that_are_withdrawn_while_the_queue_is_patient_are_not_served() -> None:
    changed = _Told()
    calls = Calls(changed)
    withdrawn, later = calls.submit(_sweep()), _sweep()
    calls.expect(1, 9.0)
    changed.acts = [nothing, lambda: calls.forget(withdrawn), lambda: calls.submit(later)]
    assert calls.next() is later


# Calls that are served together


def test_calls_that_joined_end_with_the_close_and_those_that_parted_do_not_run() -> None:
    calls = Calls(threading.Condition())
    served, stays, parts = (calls.submit(_sweep()) for _ in range(3))
    assert calls.next() is served
    assert calls.join() == [stays, parts]
    calls.part([parts])
    calls.close()
    assert [call.feed.stopper.stopped for call in (served, stays, parts)] == [True, True, False]
    assert isinstance(parts.outcome.exception(0), ClosedError)
    assert not stays.outcome.done()


def test_calls_that_part_are_the_next_ones_in_their_order() -> None:
    calls = Calls(threading.Condition())
    served, *joined = (calls.submit(_sweep()) for _ in range(3))
    assert calls.next() is served
    assert calls.join() == joined
    behind = calls.submit(_sweep())
    calls.part(joined)
    assert [calls.next() for _ in range(3)] == [*joined, behind]
    assert not any(call.outcome.done() for call in joined)


# The end


def test_the_first_cause_of_a_close_is_told_to_those_who_come_later() -> None:
    calls, first = Calls(threading.Condition()), OSError("disk")
    calls.close(first)
    calls.close(OSError("later"))
    calls.close()
    with pytest.raises(ClosedError, match="Load it again") as caught:
        calls.submit(_sweep())
    assert caught.value.__cause__ is first
    assert calls.next() is None


@pytest.mark.parametrize("change", ["submit", "close", "forget"])
def test_each_change_wakes_all_who_wait(change: str) -> None:
    """The condition is the exchange's, on which agents wait for other things too."""
    changed = threading.Condition()
    calls = Calls(changed)
    call = calls.submit(_sweep())

    def wait() -> bool:
        with changed:
            return changed.wait(PATIENCE_S)

    waiting = [Background(wait) for _ in range(2)]
    waiting_for(changed, 2)
    {"submit": lambda: calls.submit(_sweep()), "close": calls.close, "forget": lambda: calls.forget(call)}[change]()
    assert [one.end() for one in waiting] == [True, True]
