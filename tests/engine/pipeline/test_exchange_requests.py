"""Requests are served in the order in which they came, unless they are withdrawn, or others have had fewer passes."""

from __future__ import annotations

from typing import Any

import pytest
from tests.engine.harness import PATIENCE_S, Background
from tests.engine.pipeline.exchanges import (
    call_of,
    started,
)

from pipeload.errors import ClosedError
from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.requests import Call
from pipeload.pipeline.sweep import Feed


def test_requests_are_served_in_the_order_in_which_they_came() -> None:
    exchange = Exchange()
    requests = [call_of() for _ in range(3)]
    for request in requests:
        exchange.calls.submit(request)
    assert [exchange.next_call() for _ in range(3)] == requests


def test_who_has_waited_waits_with_those_who_come_back() -> None:
    exchange = Exchange()
    served, waiting, back = (Call(lambda _: None, Feed()) for _ in range(3))
    exchange.calls.submit(served)
    exchange.next_call()
    exchange.calls.submit(waiting)
    exchange.calls.expect(1, PATIENCE_S)
    sweep = Background(lambda: [exchange.next_call(), *exchange.calls.join()])
    while sweep.is_alive() and not exchange._changed._waiters:  # type: ignore[attr-defined]
        pass
    exchange.calls.submit(back)
    assert sweep.end() == [waiting, back]


def test_a_withdrawn_request_is_never_served() -> None:
    exchange = Exchange()
    first, second = call_of(), call_of()
    exchange.calls.submit(first)
    exchange.calls.submit(second)
    exchange.calls.forget(first)
    assert exchange.next_call() is second


def test_a_withdrawn_request_that_runs_stops_waiting() -> None:
    exchange = started(False)
    request = call_of()
    exchange.calls.submit(request)
    assert exchange.next_call() is request
    waiting = Background(exchange.take, 0, request)
    exchange.calls.forget(request)
    assert isinstance(waiting.wait(), ClosedError)
    assert request.feed.stopper.stopped


def test_idle_means_that_no_call_runs_or_waits() -> None:
    exchange = started(False)
    assert exchange.calls.idle
    exchange.calls.submit(call_of())
    assert not exchange.calls.idle
    exchange.next_call()
    assert not exchange.calls.idle
    waiting = Background(exchange.next_call)
    while not exchange.calls.idle:
        exchange.notify()
    exchange.close()
    assert waiting.end() is None


def test_the_daemon_gets_nothing_when_its_patience_ends() -> None:
    exchange = started(False)
    assert exchange.next_retired(0.001) is None
    assert not exchange.closed


def test_calls_that_part_from_a_sweep_after_the_close_are_ended() -> None:
    exchange = started(False)
    served, joined = Call(lambda _: None, Feed()), Call(lambda _: None, Feed())
    exchange.calls.submit(served)
    exchange.calls.submit(joined)
    assert exchange.next_call() is served
    assert exchange.calls.join() == [joined]
    exchange.close(OSError("the Daemon"))
    exchange.calls.part([joined])
    assert isinstance(joined.outcome.exception(PATIENCE_S), ClosedError)


def test_who_has_had_fewer_passes_goes_first_but_not_twice_in_a_row() -> None:
    exchange = Exchange()
    long = [Call(lambda _: None, Feed(), passes=9 + place) for place in range(3)]
    short = [Call(lambda _: None, Feed(), passes=place) for place in (0, 2, 1)]
    for call in [*long, *short]:
        exchange.calls.submit(call)
    assert [exchange.next_call() for _ in range(6)] == [short[0], long[0], short[2], long[1], short[1], long[2]]


@pytest.mark.parametrize("many", [1, 4, 16])
def test_a_short_call_waits_for_two_passes_however_many_go_on_and_these_do_not_starve(many: int) -> None:
    """A caller comes back after each pass; a new short one comes after each of its passes, for ever."""
    exchange, passes = Exchange(), dict.fromkeys(range(many), 100)
    calls: dict[Call[Any], int] = {}

    def submit(caller: int) -> None:
        call = Call[Any](lambda _: None, Feed(), passes=passes.get(caller, 0))
        calls[exchange.calls.submit(call)] = caller

    for caller in range(many):
        submit(caller)
    waited = dict.fromkeys(range(many), 0)
    short = many
    for _ in range(10 * many):
        running = exchange.next_call()
        assert running is not None
        # The short one comes while a pass runs, and this pass counts.
        submit(short)
        for place in range(2):
            if calls[running] < many:
                passes[calls[running]] += 1
                waited[calls[running]] = 0
                submit(calls[running])
            for other in waited:
                waited[other] += 1
            assert max(waited.values()) <= 2 * many + 1
            running = exchange.next_call()
            assert running is not None
            if calls[running] == short:
                break
            assert place == 0, "it waits for a third pass"
        assert calls[running] == short
        short += 1


def test_calls_without_a_sweep_are_not_overtaken() -> None:
    exchange = Exchange()
    first, budget, new = Call[Any](lambda _: None, Feed(), passes=5), call_of(), Call[Any](lambda _: None, Feed())
    for call in (first, budget, new):
        exchange.calls.submit(call)
    assert [exchange.next_call() for _ in range(3)] == [first, budget, new]


def test_an_exchange_that_closes_ends_the_calls_that_wait_and_leaves_those_whose_callers_have_left() -> None:
    exchange, cause = Exchange(), OSError("disk")
    left, waiting = call_of(), call_of()
    for call in (left, waiting):
        exchange.calls.submit(call)
    assert left.outcome.cancel()
    exchange.calls.close(cause)
    with pytest.raises(ClosedError, match="closed before the call began") as caught:
        waiting.result()
    assert caught.value.__cause__ is cause
    assert left.outcome.cancelled()
