"""Shards that are to share the memory of their weights are drawn one after another."""

from __future__ import annotations

from tests.engine.harness import Background
from tests.engine.pipeline.exchanges import LOADERS, call_of, draw, holds_back, nothing, retired, shard_at, tell

from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.messages import Failed, Loaded

COMMON = (0, 1, 1, 1, 4)
"""The three in the middle have the same weights."""


def _started() -> Exchange:
    exchange = Exchange()
    exchange.start((True,) * len(COMMON), LOADERS, weights=COMMON)
    return exchange


def test_the_next_is_drawn_when_the_weights_are_in_memory() -> None:
    exchange = _started()
    alone, first = draw(exchange), draw(exchange)
    assert (alone.index, first.index) == (0, 1)
    waiting = Background(exchange.next_task)
    assert holds_back(exchange)
    tell(exchange, Loaded(task=alone, shard=shard_at(0)))
    assert holds_back(exchange), "others' weights do not matter"
    tell(exchange, Loaded(task=first, shard=shard_at(1)))
    second = waiting.end()
    assert second.index == 2
    assert holds_back(exchange)
    tell(exchange, Loaded(task=second, shard=shard_at(2)))
    assert [draw(exchange).index, draw(exchange).index] == [3, 4]


def test_a_packing_of_one_lets_no_other_be_loaded_before_its_turn() -> None:
    exchange = _started()
    for index in (0, 1):
        task = draw(exchange)
        tell(exchange, Loaded(task=task, shard=shard_at(index)))
        _, shard = exchange.take(index, call_of())
        exchange.residents.give_back(index, shard)
    loading = draw(exchange)
    exchange.residents.pack([1])
    packing = draw(exchange)
    assert (loading.index, packing.packing) == (2, True)
    exchange.deliver(packing, None)
    assert holds_back(exchange)


def test_a_failure_is_begun_anew_by_the_first_of_them() -> None:
    exchange = _started()
    alone, first = draw(exchange), draw(exchange)
    waiting = Background(exchange.next_task)
    tell(exchange, Failed(task=first, error=OSError("disk")))
    assert holds_back(exchange)
    exchange.deliver(alone, None)
    exchange.reset(nothing)
    exchange.start((True,) * len(COMMON), LOADERS, weights=COMMON)
    assert waiting.end().index == 0
    assert draw(exchange).index == 1
    assert holds_back(exchange)


def test_closing_ends_the_wait() -> None:
    exchange = _started()
    draw(exchange)
    draw(exchange)
    waiting = Background(exchange.next_task)
    assert holds_back(exchange)
    assert retired(exchange) == []
    assert waiting.end() is None
