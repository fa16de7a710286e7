"""Steps that the tests of the exchange take in the place of agents."""

from __future__ import annotations

import threading
from typing import Any

from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.messages import Failed, Loaded, LoadedShard, Task
from pipeload.pipeline.requests import Call

LOADERS = 4


def nothing() -> None:
    pass


def call_of(work: Any = None) -> Call[Any]:
    return Call(work)


def shard_at(index: int) -> LoadedShard:
    return LoadedShard(index=index, session=None, buffer=None, reserved_bytes=1, pooled=True)


def draw(exchange: Exchange) -> Task:
    task = exchange.next_task()
    assert task is not None
    return task


def tell(exchange: Exchange, message: Loaded | Failed) -> None:
    exchange.deliver(message.task, message)


def load_one(exchange: Exchange) -> Task:
    """Draw and deliver one shard."""
    task = draw(exchange)
    tell(exchange, Loaded(task=task, shard=shard_at(task.index)))
    return task


def started(*resident: bool) -> Exchange:
    exchange = Exchange()
    exchange.start(resident, LOADERS)
    return exchange


def run_one(exchange: Exchange, index: int) -> None:
    """Load, take and give back the next shard, as a resident one when it is planned to be."""
    task = load_one(exchange)
    assert task.index == index
    taken, shard = exchange.take(index, call_of())
    give_back(exchange, index, shard, resident=taken.resident)


def give_back(exchange: Exchange, index: int, shard: LoadedShard, *, resident: bool) -> None:
    """The shard ran: it stays, or goes to the Daemon."""
    if resident:
        exchange.residents.give_back(index, shard)
    else:
        exchange.retire(shard)


def swap(exchange: Exchange, task: Task, packed: LoadedShard) -> bool:
    return exchange.residents.swap(task.index, packed, lambda: exchange.is_stale(task))


def holds_back(exchange: Exchange) -> bool:
    """A Loading Agent that asks for a task would wait."""
    with exchange._changed:
        return not exchange._may_draw() and not exchange._may_pack()


def wait_waiting(exchange: Exchange, count: int) -> None:
    """Until this many agents wait for a change."""
    waiting_for(exchange._changed, count)


def waiting_for(changed: threading.Condition, count: int) -> None:
    """Until this many threads wait for a condition."""
    while len(changed._waiters) < count:  # type: ignore[attr-defined]
        pass


def retired(exchange: Exchange) -> list[int]:
    """The shards that the Daemon would get, by closing the exchange."""
    exchange.close()
    found = []
    while (shard := exchange.next_retired()) is not None:
        found.append(shard.index)
    return found
