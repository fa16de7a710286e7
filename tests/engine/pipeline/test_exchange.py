"""Tasks are drawn round and round in plan order, and consumed in ticket order."""

from __future__ import annotations

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
    tell,
    wait_waiting,
)

from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.messages import Loaded


def test_shards_are_drawn_in_order_and_round_and_round() -> None:
    exchange = started(False, False, False)
    tasks = [load_one(exchange) for _ in range(8)]
    assert [task.index for task in tasks] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [task.ticket for task in tasks] == list(range(8))


def test_resident_shards_are_drawn_once() -> None:
    exchange = started(False, True, False, True)
    assert [(task.index, task.resident) for task in (load_one(exchange) for _ in range(8))] == [
        (0, False), (1, True), (2, False), (3, True), (0, False), (2, False), (0, False), (2, False),
    ]  # fmt: skip


def test_when_everything_is_resident_the_drawing_ends() -> None:
    exchange = started(True, True)
    assert [load_one(exchange).index for _ in range(2)] == [0, 1]
    waiting = Background(exchange.next_task)
    assert holds_back(exchange)
    exchange.close()
    assert waiting.end() is None


def test_what_is_held_already_is_not_drawn() -> None:
    exchange = started(True, True, False)
    run_one(exchange, 0)
    exchange.reset(nothing)
    exchange.start((True, True, False), LOADERS)
    assert [load_one(exchange).index for _ in range(4)] == [1, 2, 2, 2]


def test_inference_takes_shards_in_ticket_order_however_they_come() -> None:
    exchange = started(False, False, False)
    tasks = [draw(exchange) for _ in range(3)]
    first = Background(exchange.take, 0, call_of())
    for task in reversed(tasks[1:]):
        tell(exchange, Loaded(task=task, shard=shard_at(task.index)))
    assert first.is_alive()
    tell(exchange, Loaded(task=tasks[0], shard=shard_at(0)))
    assert first.end()[1].index == 0
    assert [exchange.take(k, call_of())[1].index for k in (1, 2)] == [1, 2]


def test_a_pass_begins_where_the_one_before_prefetched() -> None:
    exchange = started(False, False)
    for _ in range(4):
        load_one(exchange)
    taken = [exchange.take(index, call_of())[0].ticket for index in (0, 1, 0, 1)]
    assert taken == [0, 1, 2, 3]


def test_each_task_says_which_pass_it_is_for() -> None:
    exchange = started(False, True, False)
    assert [(task.index, task.pass_number) for task in (load_one(exchange) for _ in range(6))] == [
        (0, 1), (1, 1), (2, 1), (0, 2), (2, 2), (0, 3),
    ]  # fmt: skip


def test_no_more_loaders_work_than_were_asked_for() -> None:
    exchange = Exchange()
    exchange.start((False, False, False), 2)
    first, second = draw(exchange), draw(exchange)
    # Looked at before another agent asks: it would draw the last shard, and none would be left.
    assert holds_back(exchange)
    waiting = Background(exchange.next_task)
    wait_waiting(exchange, 1)
    tell(exchange, Loaded(task=second, shard=shard_at(second.index)))
    assert waiting.end().index == 2
    tell(exchange, Loaded(task=first, shard=shard_at(first.index)))


def test_a_resident_shard_is_borrowed_again_and_again() -> None:
    exchange = started(True, False)
    assert exchange.residents.borrow(0) is None
    run_one(exchange, 0)
    assert list(exchange.residents.shards) == [0]
    for _ in range(3):
        shard = exchange.residents.borrow(0)
        assert shard is not None
        exchange.residents.give_back(0, shard)
    assert exchange.residents.borrow(1) is None
    assert retired(exchange) == []


def test_a_shard_that_is_not_resident_is_retired_when_it_ran() -> None:
    exchange = started(False, False)
    run_one(exchange, 0)
    assert exchange.residents.shards == {}
    assert retired(exchange) == [0]


def test_a_dropped_resident_is_retired_and_drawn_again() -> None:
    exchange = started(True, False)
    run_one(exchange, 0)
    exchange.reset(nothing)
    exchange.residents.drop(0)
    exchange.start((True, False), LOADERS)
    assert load_one(exchange).index == 0
    assert exchange.residents.shards == {}
    assert retired(exchange) == [0]


def test_stop_holds_the_loaders_back_and_resume_lets_them_go_on() -> None:
    exchange = started(False, False, False)
    load_one(exchange)
    exchange.signal_memory(short=True)
    waiting = Background(exchange.next_task)
    assert holds_back(exchange)
    exchange.signal_memory(short=False)
    assert waiting.end().index == 1


def test_when_nothing_is_ahead_one_shard_may_come_even_when_memory_is_short() -> None:
    exchange = started(False, False, False)
    exchange.signal_memory(short=True)
    load_one(exchange)
    waiting = Background(exchange.next_task)
    assert holds_back(exchange)
    exchange.take(0, call_of())
    exchange.notify()
    assert waiting.end().index == 1
