"""Requests are served in the order in which they came, unless they are withdrawn."""

from __future__ import annotations

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
