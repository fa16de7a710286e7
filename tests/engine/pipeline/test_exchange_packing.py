"""Residents are packed one after another, and a packed shard takes the other's place when that one rests."""

from __future__ import annotations

import threading

import pytest
from tests.engine.harness import PATIENCE_S, Background
from tests.engine.pipeline.exchanges import (
    LOADERS,
    draw,
    holds_back,
    nothing,
    retired,
    run_one,
    shard_at,
    started,
    swap,
    tell,
)

from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.messages import Failed, Loaded


def _packing(*indices: int) -> Exchange:
    """Three residents that ran, of which some are to be packed."""
    exchange = started(True, True, True)
    for index in range(3):
        run_one(exchange, index)
    exchange.residents.pack(indices)
    return exchange


def test_residents_are_packed_one_after_another() -> None:
    exchange = _packing(2, 0)
    task = draw(exchange)
    assert (task.index, task.packing) == (2, True)
    assert exchange.residents.packing
    waiting = Background(exchange.next_task)
    assert holds_back(exchange)
    assert exchange.residents.shards[2] is exchange.residents.shards[2]
    old, packed = exchange.residents.shards[2], shard_at(2)
    packed.reserved_bytes, old.reserved_bytes = 0, 7
    swap(exchange, task, packed)
    assert exchange.residents.shards[2] is packed
    # The packed one stands for the bytes; the retired one gives none back.
    assert (packed.reserved_bytes, old.reserved_bytes) == (7, 0)
    assert holds_back(exchange), "one at a time: the packed copy takes memory until the old one is gone"
    exchange.deliver(task, None)
    second = waiting.end()
    assert (second.index, second.packing) == (0, True)
    swap(exchange, second, shard_at(0))
    exchange.deliver(second, None)
    assert not exchange.residents.packing
    assert sorted(retired(exchange)) == [0, 2]


def test_a_resident_shard_that_ran_wakes_only_a_packed_copy_that_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = _packing(0)
    task = draw(exchange)
    woken: list[int] = []
    monkeypatch.setattr(exchange._changed, "notify_all", lambda: woken.append(1))
    for index in (0, 1):
        shard = exchange.residents.borrow(index)
        assert shard is not None
        exchange.residents.give_back(index, shard)
    assert not woken
    monkeypatch.undo()
    shard = exchange.residents.borrow(0)
    assert shard is not None
    asked = threading.Event()

    def stale() -> bool:
        asked.set()
        return False

    swapping = Background(exchange.residents.swap, 0, shard_at(0), stale)
    # It holds the lock until it waits.
    assert asked.wait(PATIENCE_S)
    exchange.residents.give_back(0, shard)
    assert swapping.end()
    exchange.deliver(task, None)


@pytest.mark.parametrize("resident", [True, False], ids=["all resident", "one streamed"])
def test_a_single_loader_packs_too(resident: bool) -> None:
    exchange = Exchange()
    exchange.start((True, resident), 1)
    run_one(exchange, 0)
    run_one(exchange, 1)
    exchange.residents.pack([0])
    task = draw(exchange)
    assert (task.index, task.packing) == (0, True)
    # One more than the plan has may pack, so whatever is streamed goes on.
    assert holds_back(exchange) is resident


def test_a_shard_is_not_begun_while_it_is_loaded_for_the_pass_before() -> None:
    exchange = Exchange()
    exchange.start((False, False), 4)
    first, second = draw(exchange), draw(exchange)
    waiting = Background(exchange.next_task)
    assert holds_back(exchange)
    tell(exchange, Loaded(task=second, shard=shard_at(1)))
    assert holds_back(exchange)
    tell(exchange, Loaded(task=first, shard=shard_at(0)))
    third = waiting.end()
    assert (third.index, third.pass_number) == (0, 2)


def test_a_packed_shard_is_not_swapped_in_while_the_old_one_runs() -> None:
    exchange = _packing(1)
    task = draw(exchange)
    running = exchange.residents.borrow(1)
    assert running is not None
    packed = shard_at(1)
    swapping = Background(swap, exchange, task, packed)
    other = Background(exchange.notify)
    other.end()
    assert swapping.is_alive()
    assert exchange.residents.shards[1] is running
    exchange.residents.give_back(1, running)
    swapping.end()
    assert exchange.residents.shards[1] is packed


def test_giving_back_does_not_undo_a_swap() -> None:
    exchange = _packing(1)
    task = draw(exchange)
    packed = shard_at(1)
    swap(exchange, task, packed)
    borrowed = exchange.residents.borrow(1)
    assert borrowed is packed
    exchange.residents.give_back(1, packed)
    assert exchange.residents.shards[1] is packed


def test_a_packing_that_failed_is_raised_at_the_next_shard_once() -> None:
    exchange = _packing(1)
    tell(exchange, Failed(task=draw(exchange), error=OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        exchange.residents.borrow(0)
    assert exchange.residents.borrow(0) is not None


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_packed_shard_that_comes_too_late_is_retired(how: str) -> None:
    exchange = _packing(1)
    task, packed, old = draw(exchange), shard_at(1), exchange.residents.shards[1]
    running = exchange.residents.borrow(1)
    assert running is old
    swapping = Background(swap, exchange, task, packed)
    ending = Background(exchange.reset, nothing) if how == "reset" else Background(exchange.close)
    swapping.end()
    exchange.deliver(task, None)
    ending.end()
    assert exchange.residents.shards[1] is old
    assert exchange.next_retired() is packed


def test_a_reset_forgets_what_is_to_be_packed() -> None:
    exchange = _packing(0, 1, 2)
    exchange.reset(nothing)
    assert not exchange.residents.packing
    exchange.start((True, True, True), LOADERS)
    waiting = Background(exchange.next_task)
    assert holds_back(exchange)
    exchange.close()
    assert waiting.end() is None
