"""Failures, resets and closing end every wait, and sessions that come too late are thrown away."""

from __future__ import annotations

import pytest
from tests.engine.harness import Background
from tests.engine.pipeline.exchanges import (
    LOADERS,
    call_of,
    draw,
    holds_back,
    load_one,
    nothing,
    retired,
    shard_at,
    started,
    tell,
)

from pipeload.errors import ClosedError
from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.messages import Failed, Loaded


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError(), SystemExit(3), KeyboardInterrupt()])
def test_a_failed_load_is_raised_where_it_was_awaited(error: BaseException) -> None:
    exchange = started(False, False)
    waiting = Background(exchange.take, 0, call_of())
    tell(exchange, Failed(task=draw(exchange), error=error))
    assert waiting.wait() is error


def test_shards_before_a_failed_one_can_still_be_taken() -> None:
    exchange = started(False, False)
    first, second = draw(exchange), draw(exchange)
    tell(exchange, Failed(task=second, error=OSError("disk")))
    tell(exchange, Loaded(task=first, shard=shard_at(0)))
    assert exchange.take(0, call_of())[0] is first
    with pytest.raises(OSError, match="disk"):
        exchange.take(1, call_of())


def test_after_a_failure_nothing_more_is_drawn_until_the_reset() -> None:
    # Otherwise Loading Agents would fail again and again without a caller.
    exchange = started(False, False)
    tell(exchange, Failed(task=draw(exchange), error=OSError("disk")))
    waiting = Background(exchange.next_task)
    assert holds_back(exchange)
    exchange.reset(nothing)
    exchange.start((False, False), LOADERS)
    assert waiting.end().index == 0


def test_a_reset_waits_for_work_and_throws_away_what_is_ready() -> None:
    exchange = started(False, False, False)
    load_one(exchange)
    working = draw(exchange)
    woken: list[bool] = []
    resetting = Background(exchange.reset, lambda: woken.append(exchange.is_stale(working)))
    while not woken:
        exchange.notify()
    assert woken == [True], "whoever is woken must see that the task is stale"
    assert resetting.is_alive()
    tell(exchange, Loaded(task=working, shard=shard_at(1)))
    resetting.end()
    assert exchange.stopped
    assert sorted(retired(exchange)) == [0, 1]


@pytest.mark.parametrize("message", ["cancelled", "failed"])
def test_stale_work_may_also_end_without_a_shard(message: str) -> None:
    exchange = started(False, False)
    working = draw(exchange)
    resetting = Background(exchange.reset, nothing)
    exchange.deliver(working, None if message == "cancelled" else Failed(task=working, error=OSError()))
    resetting.end()
    exchange.start((False, False), LOADERS)
    assert load_one(exchange).index == 0
    assert exchange.take(0, call_of())[1].index == 0


def test_after_a_reset_a_pass_begins_with_its_first_shard() -> None:
    exchange = started(False, False, False)
    before = [load_one(exchange) for _ in range(2)]
    exchange.take(0, call_of())
    exchange.reset(nothing)
    exchange.start((False, True, False), LOADERS)
    after = load_one(exchange)
    assert (after.index, after.ticket, after.pass_number) == (0, 2, 1)
    assert exchange.is_stale(before[0])
    assert not exchange.is_stale(after)
    assert exchange.take(0, call_of())[0] is after
    assert load_one(exchange).index == 1


def test_nothing_is_drawn_between_reset_and_start() -> None:
    exchange = started(False)
    exchange.reset(nothing)
    waiting = Background(exchange.next_task)
    assert holds_back(exchange)
    exchange.start((False,), LOADERS)
    assert waiting.end().index == 0


def test_closing_ends_every_wait() -> None:
    exchange = started(True)
    request = call_of()
    exchange.calls.submit(request)
    assert exchange.next_call() is request
    draw(exchange)
    taking = Background(exchange.take, 0, request)
    drawing = Background(exchange.next_task)
    retiring = Background(exchange.next_retired)
    resetting = Background(exchange.reset, nothing)
    freeing = Background(exchange.wait_freed, lambda: False)
    exchange.close()
    assert isinstance(taking.wait(), ClosedError)
    assert (drawing.end(), retiring.end(), resetting.end(), freeing.end()) == (None,) * 4
    assert request.feed.stopper.stopped
    assert exchange.next_call() is None
    assert exchange.next_task() is None


def test_closing_ends_requests_that_wait_with_the_cause() -> None:
    exchange, cause = Exchange(), OSError("daemon died")
    request = call_of()
    exchange.calls.submit(request)
    exchange.close(cause)
    error = request.outcome.exception(0)
    assert isinstance(error, ClosedError)
    assert error.__cause__ is cause
    with pytest.raises(ClosedError) as caught:
        exchange.calls.submit(call_of())
    assert caught.value.__cause__ is cause


def test_the_first_cause_stays() -> None:
    exchange, cause = Exchange(), OSError("daemon died")
    exchange.close(cause)
    exchange.close()
    with pytest.raises(ClosedError) as caught:
        exchange.take(0, call_of())
    assert caught.value.__cause__ is cause


def test_what_comes_after_closing_goes_to_the_daemon() -> None:
    exchange = started(False, False)
    working = draw(exchange)
    exchange.close()
    tell(exchange, Loaded(task=working, shard=shard_at(0)))
    assert retired(exchange) == [0]


def test_a_failure_after_closing_is_dropped() -> None:
    exchange = started(False)
    working = draw(exchange)
    exchange.close()
    tell(exchange, Failed(task=working, error=OSError()))
    assert retired(exchange) == []


def test_a_closed_exchange_does_not_start_again() -> None:
    # Closing ends the wait of a reset: Loading Agents may still be at work.
    exchange = started(False, False)
    draw(exchange)
    exchange.close()
    exchange.reset(nothing)
    with pytest.raises(ClosedError, match="during the call"):
        exchange.start((False, False), LOADERS)
