"""Requests are served in the order in which they came, unless they are withdrawn."""

from __future__ import annotations

from tests.engine.harness import PATIENCE_S, Background
from tests.engine.pipeline.exchanges import (
    request_of,
    started,
)

from pipeload.errors import ClosedError
from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.requests import Request


def test_requests_are_served_in_the_order_in_which_they_came() -> None:
    exchange = Exchange()
    requests = [request_of() for _ in range(3)]
    for request in requests:
        exchange.submit(request)
    assert [exchange.next_request() for _ in range(3)] == requests


def test_who_has_waited_waits_with_those_who_come_back() -> None:
    exchange = Exchange()
    served, waiting, back = (Request(work=lambda _: None, served=object()) for _ in range(3))
    exchange.submit(served)
    exchange.next_request()
    exchange.submit(waiting)
    exchange.expect(1, PATIENCE_S)
    sweep = Background(lambda: [exchange.next_request(), *exchange.join()])
    while sweep.is_alive() and not exchange._changed._waiters:  # type: ignore[attr-defined]
        pass
    exchange.submit(back)
    assert sweep.end() == [waiting, back]


def test_a_withdrawn_request_is_never_served() -> None:
    exchange = Exchange()
    first, second = request_of(), request_of()
    exchange.submit(first)
    exchange.submit(second)
    exchange.withdraw(first)
    assert exchange.next_request() is second


def test_a_withdrawn_request_that_runs_stops_waiting() -> None:
    exchange = started(False)
    request = request_of()
    exchange.submit(request)
    assert exchange.next_request() is request
    waiting = Background(exchange.take, 0, request)
    exchange.withdraw(request)
    assert isinstance(waiting.wait(), ClosedError)
    assert request.stopper.stopped


def test_idle_means_that_no_call_runs_or_waits() -> None:
    exchange = started(False)
    assert exchange.idle
    exchange.submit(request_of())
    assert not exchange.idle
    exchange.next_request()
    assert not exchange.idle
    waiting = Background(exchange.next_request)
    while not exchange.idle:
        exchange.notify()
    exchange.close()
    assert waiting.end() is None


def test_the_daemon_gets_nothing_when_its_patience_ends() -> None:
    exchange = started(False)
    assert exchange.next_retired(0.001) is None
    assert not exchange.closed
