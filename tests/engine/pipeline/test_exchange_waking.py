"""All agents wait for one condition: each change wakes the one that it concerns, however long others have waited."""

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
    run_one,
    shard_at,
    started,
    swap,
    tell,
    wait_waiting,
)

from pipeload.errors import ClosedError
from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.messages import Failed, Loaded


def _held_back() -> tuple[Exchange, Background]:
    """A stopped exchange, where a Loading Agent waits before all others."""
    exchange = started(False, False, False)
    exchange.reset(nothing)
    waiting = Background(exchange.next_task)
    wait_waiting(exchange, 1)
    return exchange, waiting


def _end(exchange: Exchange, *waiting: Background) -> None:
    exchange.close()
    for one in waiting:
        assert one.end() is None


def test_a_retired_shard_wakes_the_daemon() -> None:
    exchange, loader = _held_back()
    daemon = Background(exchange.next_retired)
    wait_waiting(exchange, 2)
    shard = shard_at(0)
    exchange.retire(shard)
    assert daemon.end() is shard
    _end(exchange, loader)


def test_retired_shards_are_destroyed_in_the_order_in_which_they_ran() -> None:
    exchange = started(False, False, False)
    for index in range(3):
        run_one(exchange, index)
    assert retired(exchange) == [0, 1, 2]


def test_a_reset_wakes_the_daemon_for_what_was_ready() -> None:
    exchange = started(True, False)
    run_one(exchange, 0)
    load_one(exchange)
    exchange.signal_memory(short=True)
    loader = Background(exchange.next_task)
    wait_waiting(exchange, 1)
    daemon = Background(exchange.next_retired)
    wait_waiting(exchange, 2)
    # Both have looked, and wait again, before what is ready is handed over.
    exchange.reset(lambda: wait_waiting(exchange, 2))
    assert daemon.end().index == 1
    _end(exchange, loader)


def test_a_reset_wakes_a_packed_copy_that_waits() -> None:
    exchange = started(True, True)
    for index in range(2):
        run_one(exchange, index)
    exchange.residents.pack([0])
    task = draw(exchange)
    running = exchange.residents.borrow(0)
    loader = Background(exchange.next_task)
    wait_waiting(exchange, 1)
    swapping = Background(swap, exchange, task, shard_at(0))
    wait_waiting(exchange, 2)
    resetting = Background(exchange.reset, nothing)
    assert swapping.end() is False
    exchange.deliver(task, None)
    resetting.end()
    assert exchange.residents.shards[0] is running
    _end(exchange, loader)


def test_a_start_wakes_all_loading_agents() -> None:
    exchange, first = _held_back()
    second = Background(exchange.next_task)
    wait_waiting(exchange, 2)
    exchange.start((False, False, False), LOADERS)
    assert sorted(one.end().index for one in (first, second)) == [0, 1]


def test_memory_that_suffices_again_wakes_all_loading_agents() -> None:
    exchange = started(False, False, False)
    load_one(exchange)
    exchange.signal_memory(short=True)
    waiting = [Background(exchange.next_task) for _ in range(2)]
    wait_waiting(exchange, 2)
    exchange.signal_memory(short=False)
    assert sorted(one.end().index for one in waiting) == [1, 2]


def test_a_shard_wakes_inference_also_where_a_loading_agent_has_waited_longer() -> None:
    exchange = Exchange()
    exchange.start((False, False), 1)
    task = draw(exchange)
    # The plan has one Loading Agent, and memory is short: this one goes on waiting.
    exchange.signal_memory(short=True)
    loader = Background(exchange.next_task)
    wait_waiting(exchange, 1)
    taking = Background(exchange.take, 0, call_of())
    wait_waiting(exchange, 2)
    tell(exchange, Loaded(task=task, shard=shard_at(0)))
    assert taking.end()[0] is task
    exchange.notify()
    assert loader.end().index == 1


def test_a_notice_wakes_all() -> None:
    exchange, loader = _held_back()
    freed = []
    freeing = Background(exchange.wait_freed, lambda: bool(freed))
    wait_waiting(exchange, 2)
    freed.append(True)
    exchange.notify()
    assert freeing.end() is None
    _end(exchange, loader)


def test_memory_is_freed_when_the_daemon_has_had_all_shards_and_the_reservations_are_given_back() -> None:
    exchange = started(False)
    run_one(exchange, 0)
    freed = [True]
    freeing = Background(exchange.wait_freed, lambda: bool(freed))
    wait_waiting(exchange, 1)
    assert exchange.next_retired() is not None
    freed.clear()
    exchange.notify()
    wait_waiting(exchange, 1)
    assert freeing.is_alive()
    freed.append(True)
    exchange.notify()
    assert freeing.end() is None


def test_a_sweep_goes_on_until_the_last_of_its_callers_has_left() -> None:
    exchange = started(False)
    calls = [call_of(), call_of()]
    for call in calls:
        exchange.calls.submit(call)
    exchange.next_call()
    taking = Background(exchange.take, 0, *calls)
    wait_waiting(exchange, 1)
    exchange.calls.forget(calls[0])
    wait_waiting(exchange, 1)
    assert taking.is_alive()
    exchange.calls.forget(calls[1])
    assert isinstance(taking.wait(), ClosedError)


def test_the_loaded_shards_are_of_no_use_to_the_next_sweep_once_one_of_them_is_taken() -> None:
    exchange = started(False, False)
    assert exchange.broken is False
    load_one(exchange)
    assert exchange.broken is False
    exchange.take(0, call_of())
    assert exchange.broken is True
    exchange.calls.submit(call_of())
    exchange.next_call()
    assert exchange.broken is False


@pytest.mark.parametrize("also", [False, True], ids=["failed", "another one succeeds"])
def test_the_loaded_shards_are_of_no_use_to_the_next_sweep_once_one_has_failed(also: bool) -> None:
    exchange = started(False, False)
    failing, other = draw(exchange), draw(exchange)
    tell(exchange, Failed(task=failing, error=OSError("disk")))
    if also:
        tell(exchange, Loaded(task=other, shard=shard_at(1)))
    assert exchange.broken is True
    assert holds_back(exchange)
    if not also:
        exchange.deliver(other, None)
    exchange.reset(nothing)
    assert exchange.broken is False


def test_what_is_ready_is_thrown_away_once() -> None:
    exchange = started(False, False)
    load_one(exchange)
    for _ in range(2):
        exchange.reset(nothing)
    assert retired(exchange) == [0]


def test_one_shard_that_is_being_loaded_is_enough_while_memory_is_short() -> None:
    exchange = started(False, False)
    exchange.signal_memory(short=True)
    assert not holds_back(exchange)
    draw(exchange)
    assert holds_back(exchange)


def test_a_start_says_which_pass_comes() -> None:
    exchange = started(False, False)
    load_one(exchange)
    exchange.reset(nothing)
    exchange.start((False, False), LOADERS, 5)
    assert [(task.index, task.pass_number) for task in (load_one(exchange) for _ in range(3))] == [
        (0, 5), (1, 5), (0, 6),
    ]  # fmt: skip


def test_agents_that_work_must_have_ended_before_the_next_start() -> None:
    exchange = started(False)
    draw(exchange)
    with pytest.raises(AssertionError, match="reset before start"):
        exchange.start((False,), LOADERS)


def test_inference_that_takes_another_shard_than_the_next_is_a_fault() -> None:
    exchange = started(False, False)
    load_one(exchange)
    with pytest.raises(AssertionError, match="the same order"):
        exchange.take(1, call_of())
    exchange.take(0, call_of())
    load_one(exchange)
    with pytest.raises(AssertionError, match="the same order"):
        exchange.take(0, call_of())


def test_one_agent_more_than_the_plan_has_may_work_while_one_packs() -> None:
    exchange = Exchange()
    exchange.start((True, False, False), 2)
    for index in range(3):
        run_one(exchange, index)
    exchange.residents.pack([0])
    assert draw(exchange).packing
    assert [draw(exchange).index, holds_back(exchange)] == [1, False]
    draw(exchange)
    assert holds_back(exchange)


def test_packing_waits_for_a_start_and_has_no_ticket() -> None:
    exchange = started(True, True)
    for index in range(2):
        run_one(exchange, index)
    exchange.reset(nothing)
    exchange.residents.pack([1])
    assert holds_back(exchange)
    exchange.start((True, True), LOADERS)
    task = draw(exchange)
    assert (task.ticket, task.index, task.resident, task.packing) == (-1, 1, True, True)


def test_an_exchange_says_whether_it_is_stopped_and_closed_and_why() -> None:
    exchange = Exchange()
    assert (exchange.stopped, exchange.closed, exchange.cause) == (True, False, None)
    exchange.start((False,), LOADERS)
    assert exchange.stopped is False
    cause = OSError("the Daemon")
    exchange.close(cause)
    assert (exchange.closed, exchange.cause) == (True, cause)
