"""Tasks are drawn round and round in plan order, consumed in ticket order, and every wait can be ended."""

from __future__ import annotations

from typing import Any

import pytest
from tests.engine.harness import PATIENCE_S, Background

from pipeload.errors import ClosedError
from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.messages import Failed, Loaded, LoadedShard, Task
from pipeload.pipeline.requests import Request

LOADERS = 4


def _nothing() -> None:
    pass


def _request(work: Any = None) -> Request:
    return Request(work=work)


def _shard(index: int) -> LoadedShard:
    return LoadedShard(index=index, session=None, buffer=None, reserved_bytes=1, pooled=True)


def _draw(exchange: Exchange) -> Task:
    task = exchange.next_task()
    assert task is not None
    return task


def _tell(exchange: Exchange, message: Loaded | Failed) -> None:
    exchange.deliver(message.task, message)


def _load(exchange: Exchange) -> Task:
    """Draw and deliver one shard."""
    task = _draw(exchange)
    _tell(exchange, Loaded(task=task, shard=_shard(task.index)))
    return task


def _started(*resident: bool) -> Exchange:
    exchange = Exchange()
    exchange.start(resident, LOADERS)
    return exchange


def _run_one(exchange: Exchange, index: int) -> None:
    """Load, take and give back the next shard, as a resident one when it is planned to be."""
    task = _load(exchange)
    assert task.index == index
    taken, shard = exchange.take(index, _request())
    exchange.give_back(index, shard, resident=taken.resident)


def _holds_back(exchange: Exchange) -> bool:
    """A Loading Agent that asks for a task would wait."""
    with exchange._changed:
        return not exchange._may_draw() and not exchange._may_pack()


def _retired(exchange: Exchange) -> list[int]:
    """What the Daemon would get, by closing the exchange."""
    exchange.close()
    found = []
    while (shard := exchange.next_retired()) is not None:
        found.append(shard.index)
    return found


def test_shards_are_drawn_in_order_and_round_and_round() -> None:
    exchange = _started(False, False, False)
    tasks = [_load(exchange) for _ in range(8)]
    assert [task.index for task in tasks] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [task.ticket for task in tasks] == list(range(8))


def test_resident_shards_are_drawn_once() -> None:
    exchange = _started(False, True, False, True)
    assert [(task.index, task.resident) for task in (_load(exchange) for _ in range(8))] == [
        (0, False), (1, True), (2, False), (3, True), (0, False), (2, False), (0, False), (2, False),
    ]  # fmt: skip


def test_when_everything_is_resident_the_drawing_ends() -> None:
    exchange = _started(True, True)
    assert [_load(exchange).index for _ in range(2)] == [0, 1]
    waiting = Background(exchange.next_task)
    assert _holds_back(exchange)
    exchange.close()
    assert waiting.end() is None


def test_what_is_held_already_is_not_drawn() -> None:
    exchange = _started(True, True, False)
    _run_one(exchange, 0)
    exchange.reset(_nothing)
    exchange.start((True, True, False), LOADERS)
    assert [_load(exchange).index for _ in range(4)] == [1, 2, 2, 2]


def test_inference_takes_shards_in_ticket_order_however_they_come() -> None:
    exchange = _started(False, False, False)
    tasks = [_draw(exchange) for _ in range(3)]
    first = Background(exchange.take, 0, _request())
    for task in reversed(tasks[1:]):
        _tell(exchange, Loaded(task=task, shard=_shard(task.index)))
    assert first.is_alive()
    _tell(exchange, Loaded(task=tasks[0], shard=_shard(0)))
    assert first.end()[1].index == 0
    assert [exchange.take(k, _request())[1].index for k in (1, 2)] == [1, 2]


def test_a_pass_begins_where_the_one_before_prefetched() -> None:
    exchange = _started(False, False)
    for _ in range(4):
        _load(exchange)
    taken = [exchange.take(index, _request())[0].ticket for index in (0, 1, 0, 1)]
    assert taken == [0, 1, 2, 3]


def test_each_task_says_which_pass_it_is_for() -> None:
    exchange = _started(False, True, False)
    assert [(task.index, task.pass_number) for task in (_load(exchange) for _ in range(6))] == [
        (0, 1), (1, 1), (2, 1), (0, 2), (2, 2), (0, 3),
    ]  # fmt: skip


def test_no_more_loaders_work_than_were_asked_for() -> None:
    exchange = Exchange()
    exchange.start((False, False, False), 2)
    first, second = _draw(exchange), _draw(exchange)
    waiting = Background(exchange.next_task)
    assert _holds_back(exchange)
    _tell(exchange, Loaded(task=second, shard=_shard(second.index)))
    assert waiting.end().index == 2
    _tell(exchange, Loaded(task=first, shard=_shard(first.index)))


# Residents


def test_a_resident_shard_is_borrowed_again_and_again() -> None:
    exchange = _started(True, False)
    assert exchange.borrow_resident(0) is None
    _run_one(exchange, 0)
    assert list(exchange.residents) == [0]
    for _ in range(3):
        shard = exchange.borrow_resident(0)
        assert shard is not None
        exchange.give_back(0, shard, resident=True)
    assert exchange.borrow_resident(1) is None
    assert _retired(exchange) == []


def test_a_shard_that_is_not_resident_is_retired_when_it_ran() -> None:
    exchange = _started(False, False)
    _run_one(exchange, 0)
    assert exchange.residents == {}
    assert _retired(exchange) == [0]


def test_a_dropped_resident_is_retired_and_drawn_again() -> None:
    exchange = _started(True, False)
    _run_one(exchange, 0)
    exchange.reset(_nothing)
    exchange.drop(0)
    exchange.start((True, False), LOADERS)
    assert _load(exchange).index == 0
    assert exchange.residents == {}
    assert _retired(exchange) == [0]


# Packing


def _packing(*indices: int) -> Exchange:
    """Three residents that ran, of which some are to be packed."""
    exchange = _started(True, True, True)
    for index in range(3):
        _run_one(exchange, index)
    exchange.pack(indices)
    return exchange


def test_residents_are_packed_one_after_another() -> None:
    exchange = _packing(2, 0)
    task = _draw(exchange)
    assert (task.index, task.packing) == (2, True)
    assert exchange.packing
    waiting = Background(exchange.next_task)
    assert _holds_back(exchange)
    assert exchange.resident(2) is exchange.residents[2]
    old, packed = exchange.resident(2), _shard(2)
    packed.reserved_bytes, old.reserved_bytes = 0, 7
    exchange.swap(task, packed)
    assert exchange.residents[2] is packed
    # The packed one stands for the bytes; what is retired gives none back.
    assert (packed.reserved_bytes, old.reserved_bytes) == (7, 0)
    assert _holds_back(exchange), "one at a time: the packed copy takes memory until the old one is gone"
    exchange.packed()
    exchange.deliver(task, None)
    second = waiting.end()
    assert (second.index, second.packing) == (0, True)
    exchange.swap(second, _shard(0))
    exchange.packed()
    exchange.deliver(second, None)
    assert not exchange.packing
    assert sorted(_retired(exchange)) == [0, 2]


@pytest.mark.parametrize("resident", [True, False], ids=["all resident", "one streamed"])
def test_a_single_loader_packs_too(resident: bool) -> None:
    exchange = Exchange()
    exchange.start((True, resident), 1)
    _run_one(exchange, 0)
    _run_one(exchange, 1)
    exchange.pack([0])
    task = _draw(exchange)
    assert (task.index, task.packing) == (0, True)
    # One more than the plan has may pack, so whatever is streamed goes on.
    assert _holds_back(exchange) is resident


def test_a_shard_is_not_begun_while_it_is_loaded_for_the_pass_before() -> None:
    exchange = Exchange()
    exchange.start((False, False), 4)
    first, second = _draw(exchange), _draw(exchange)
    waiting = Background(exchange.next_task)
    assert _holds_back(exchange)
    _tell(exchange, Loaded(task=second, shard=_shard(1)))
    assert _holds_back(exchange)
    _tell(exchange, Loaded(task=first, shard=_shard(0)))
    third = waiting.end()
    assert (third.index, third.pass_number) == (0, 2)


def test_a_packed_shard_is_not_swapped_in_while_the_old_one_runs() -> None:
    exchange = _packing(1)
    task = _draw(exchange)
    running = exchange.borrow_resident(1)
    assert running is not None
    packed = _shard(1)
    swapping = Background(exchange.swap, task, packed)
    other = Background(exchange.notify)
    other.end()
    assert swapping.is_alive()
    assert exchange.residents[1] is running
    exchange.give_back(1, running, resident=True)
    swapping.end()
    assert exchange.residents[1] is packed


def test_giving_back_does_not_undo_a_swap() -> None:
    exchange = _packing(1)
    task = _draw(exchange)
    packed = _shard(1)
    exchange.swap(task, packed)
    borrowed = exchange.borrow_resident(1)
    assert borrowed is packed
    exchange.give_back(1, packed, resident=True)
    assert exchange.residents[1] is packed


def test_a_packing_that_failed_is_raised_at_the_next_shard_once() -> None:
    exchange = _packing(1)
    exchange.packed()
    _tell(exchange, Failed(task=_draw(exchange), error=OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        exchange.borrow_resident(0)
    assert exchange.borrow_resident(0) is not None


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_packed_shard_that_comes_too_late_is_retired(how: str) -> None:
    exchange = _packing(1)
    task, packed, old = _draw(exchange), _shard(1), exchange.resident(1)
    running = exchange.borrow_resident(1)
    assert running is old
    swapping = Background(exchange.swap, task, packed)
    ending = Background(exchange.reset, _nothing) if how == "reset" else Background(exchange.close)
    swapping.end()
    exchange.packed()
    exchange.deliver(task, None)
    ending.end()
    assert exchange.residents[1] is old
    assert exchange.next_retired() is packed


def test_a_reset_forgets_what_is_to_be_packed() -> None:
    exchange = _packing(0, 1, 2)
    exchange.reset(_nothing)
    assert not exchange.packing
    exchange.start((True, True, True), LOADERS)
    waiting = Background(exchange.next_task)
    assert _holds_back(exchange)
    exchange.close()
    assert waiting.end() is None


# Failures


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError(), SystemExit(3), KeyboardInterrupt()])
def test_a_failed_load_is_raised_where_it_was_awaited(error: BaseException) -> None:
    exchange = _started(False, False)
    waiting = Background(exchange.take, 0, _request())
    _tell(exchange, Failed(task=_draw(exchange), error=error))
    assert waiting.wait() is error


def test_shards_before_a_failed_one_can_still_be_taken() -> None:
    exchange = _started(False, False)
    first, second = _draw(exchange), _draw(exchange)
    _tell(exchange, Failed(task=second, error=OSError("disk")))
    _tell(exchange, Loaded(task=first, shard=_shard(0)))
    assert exchange.take(0, _request())[0] is first
    with pytest.raises(OSError, match="disk"):
        exchange.take(1, _request())


def test_after_a_failure_nothing_more_is_drawn_until_the_reset() -> None:
    # Otherwise Loading Agents would fail again and again while nobody calls.
    exchange = _started(False, False)
    _tell(exchange, Failed(task=_draw(exchange), error=OSError("disk")))
    waiting = Background(exchange.next_task)
    assert _holds_back(exchange)
    exchange.reset(_nothing)
    exchange.start((False, False), LOADERS)
    assert waiting.end().index == 0


# Reset


def test_a_reset_waits_for_work_and_throws_away_what_is_ready() -> None:
    exchange = _started(False, False, False)
    _load(exchange)
    working = _draw(exchange)
    woken: list[bool] = []
    resetting = Background(exchange.reset, lambda: woken.append(exchange.is_stale(working)))
    while not woken:
        exchange.notify()
    assert woken == [True], "whoever is woken must see that the task is stale"
    assert resetting.is_alive()
    _tell(exchange, Loaded(task=working, shard=_shard(1)))
    resetting.end()
    assert exchange.stopped
    assert sorted(_retired(exchange)) == [0, 1]


@pytest.mark.parametrize("message", ["cancelled", "failed"])
def test_stale_work_may_also_end_without_a_shard(message: str) -> None:
    exchange = _started(False, False)
    working = _draw(exchange)
    resetting = Background(exchange.reset, _nothing)
    exchange.deliver(working, None if message == "cancelled" else Failed(task=working, error=OSError()))
    resetting.end()
    exchange.start((False, False), LOADERS)
    assert _load(exchange).index == 0
    assert exchange.take(0, _request())[1].index == 0


def test_after_a_reset_a_pass_begins_with_its_first_shard() -> None:
    exchange = _started(False, False, False)
    before = [_load(exchange) for _ in range(2)]
    exchange.take(0, _request())
    exchange.reset(_nothing)
    exchange.start((False, True, False), LOADERS)
    after = _load(exchange)
    assert (after.index, after.ticket, after.pass_number) == (0, 2, 1)
    assert exchange.is_stale(before[0])
    assert not exchange.is_stale(after)
    assert exchange.take(0, _request())[0] is after
    assert _load(exchange).index == 1


def test_nothing_is_drawn_between_reset_and_start() -> None:
    exchange = _started(False)
    exchange.reset(_nothing)
    waiting = Background(exchange.next_task)
    assert _holds_back(exchange)
    exchange.start((False,), LOADERS)
    assert waiting.end().index == 0


# Stop and resume


def test_stop_holds_the_loaders_back_and_resume_lets_them_go_on() -> None:
    exchange = _started(False, False, False)
    _load(exchange)
    exchange.signal_memory(short=True)
    waiting = Background(exchange.next_task)
    assert _holds_back(exchange)
    exchange.signal_memory(short=False)
    assert waiting.end().index == 1


def test_when_nothing_is_ahead_one_shard_may_come_even_when_memory_is_short() -> None:
    exchange = _started(False, False, False)
    exchange.signal_memory(short=True)
    _load(exchange)
    waiting = Background(exchange.next_task)
    assert _holds_back(exchange)
    exchange.take(0, _request())
    exchange.notify()
    assert waiting.end().index == 1


# Requests


def test_requests_are_served_in_the_order_in_which_they_came() -> None:
    exchange = Exchange()
    requests = [_request() for _ in range(3)]
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
    first, second = _request(), _request()
    exchange.submit(first)
    exchange.submit(second)
    exchange.withdraw(first)
    assert exchange.next_request() is second


def test_a_withdrawn_request_that_runs_stops_waiting() -> None:
    exchange = _started(False)
    request = _request()
    exchange.submit(request)
    assert exchange.next_request() is request
    waiting = Background(exchange.take, 0, request)
    exchange.withdraw(request)
    assert isinstance(waiting.wait(), ClosedError)
    assert request.stopper.stopped


def test_idle_means_that_no_call_runs_or_waits() -> None:
    exchange = _started(False)
    assert exchange.idle
    exchange.submit(_request())
    assert not exchange.idle
    exchange.next_request()
    assert not exchange.idle
    waiting = Background(exchange.next_request)
    while not exchange.idle:
        exchange.notify()
    exchange.close()
    assert waiting.end() is None


def test_the_daemon_gets_nothing_when_its_patience_ends() -> None:
    exchange = _started(False)
    assert exchange.next_retired(0.001) is None
    assert not exchange.closed


# Close


def test_closing_ends_every_wait() -> None:
    exchange = _started(True)
    request = _request()
    exchange.submit(request)
    assert exchange.next_request() is request
    _draw(exchange)
    taking = Background(exchange.take, 0, request)
    drawing = Background(exchange.next_task)
    retiring = Background(exchange.next_retired)
    resetting = Background(exchange.reset, _nothing)
    freeing = Background(exchange.wait_freed, lambda: False)
    exchange.close()
    assert isinstance(taking.wait(), ClosedError)
    assert (drawing.end(), retiring.end(), resetting.end(), freeing.end()) == (None,) * 4
    assert request.stopper.stopped
    assert exchange.next_request() is None
    assert exchange.next_task() is None


def test_closing_ends_requests_that_wait_with_the_cause() -> None:
    exchange, cause = Exchange(), OSError("daemon died")
    request = _request()
    exchange.submit(request)
    exchange.close(cause)
    error = request.result.exception(0)
    assert isinstance(error, ClosedError)
    assert error.__cause__ is cause
    with pytest.raises(ClosedError) as caught:
        exchange.submit(_request())
    assert caught.value.__cause__ is cause


def test_the_first_cause_stays() -> None:
    exchange, cause = Exchange(), OSError("daemon died")
    exchange.close(cause)
    exchange.close()
    with pytest.raises(ClosedError) as caught:
        exchange.take(0, _request())
    assert caught.value.__cause__ is cause


def test_what_comes_after_closing_goes_to_the_daemon() -> None:
    exchange = _started(False, False)
    working = _draw(exchange)
    exchange.close()
    _tell(exchange, Loaded(task=working, shard=_shard(0)))
    assert _retired(exchange) == [0]


def test_a_failure_after_closing_is_dropped() -> None:
    exchange = _started(False)
    working = _draw(exchange)
    exchange.close()
    _tell(exchange, Failed(task=working, error=OSError()))
    assert _retired(exchange) == []
