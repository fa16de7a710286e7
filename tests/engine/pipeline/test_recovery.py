"""After a failed call nothing hangs, nothing leaks, and no prefetch is thrown away without need."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import PATIENCE_S, Background, Gate, agents
from tests.engine.pipeline.rig import NAMES, plan_by_hand, rigged

from pipeload.errors import BudgetError, ClosedError, LoadError, RunError
from pipeload.format import manifest as manifests
from pipeload.pipeline import weights_memory
from pipeload.pipeline.agents import inference_agent
from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.messages import Loaded, LoadedShard, Task
from pipeload.pipeline.requests import Call
from pipeload.planning.planner import Plan


def _take_one(exchange: Exchange, request: Call[Any], error: BaseException) -> None:
    exchange.take(0, request)
    raise error


@pytest.mark.parametrize("kind", [ClosedError, RunError, OSError])
def test_a_recovery_that_fails_ends_the_call_with_every_kind_of_error(kind: type[Exception]) -> None:
    """The call's error is the context of the failed recovery, which is its cause: a circle, once walked for ever."""
    exchange = Exchange()
    exchange.start((False,), loaders=1)
    task = exchange.next_task()
    assert task is not None
    shard = LoadedShard(index=0, session=None, buffer=None, reserved_bytes=0, pooled=False)
    exchange.deliver(task, Loaded(task=task, shard=shard))
    error, failure = kind("the call"), OSError("the recovery")

    def recover() -> None:
        raise failure

    agent = Background(inference_agent, exchange, recover, lambda: None)
    request = Call(lambda request: _take_one(exchange, request, error))
    exchange.calls.submit(request)
    assert request.outcome.exception(PATIENCE_S) is error
    assert exchange.cause is failure
    agent.end()
    if kind is ClosedError:
        assert error.__cause__ is failure
    links, seen = [error], []
    while links:
        link = links.pop()
        assert not any(link is known for known in seen), "the chain of causes is a circle"
        seen.append(link)
        links += [one for one in (link.__cause__, link.__context__) if one is not None and one is not link.__cause__]


def test_a_refused_call_leaves_what_was_read_ahead(toy: Path) -> None:
    manifest = manifests.read(toy)
    plan = plan_by_hand(manifest, buffers=2, loaders=1)

    def replan(pass_bytes: int, _: int) -> Plan:
        if pass_bytes:
            raise BudgetError("too large", needed_bytes=2, budget_bytes=1)
        return plan

    with rigged(toy, replan=replan, buffers=2, loaders=1) as rig:
        rig.check()
        # The first shards of the second pass are there: two buffers are full.
        rig.wait(lambda: len(rig.exchange._ready) == 2)
        for _ in range(3):
            with pytest.raises(BudgetError, match="too large"):
                rig.run(pass_bytes=5)
        assert not rig.exchange.stopped
        rig.check()
        rig.wait(lambda: len(rig.exchange._ready) == 2)
        assert Counter(rig.storage.read) == {name: 2 + (name in NAMES[:2]) for name in NAMES}


@pytest.mark.parametrize("where", ["loader", "daemon", "inference"])
@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()], ids=["nofile", "memory"])
def test_figures_of_memory_that_cannot_be_read_once_hang_nothing_and_leak_nothing(
    toy: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    """The reservation of the shard that was loaded meanwhile is given back, whichever agent wanted the figure."""
    real, armed = weights_memory.rss_bytes, threading.Event()

    def rss_bytes() -> int:
        if armed.is_set() and threading.current_thread().name.startswith(f"pipeload-{where}"):
            armed.clear()
            raise error
        return real()

    monkeypatch.setattr(weights_memory, "rss_bytes", rss_bytes)
    with rigged(toy, buffers=1, loaders=1) as rig:
        rig.check()
        armed.set()
        caught = []
        for _ in range(4):
            call = Background(rig.run)
            if raised := call.wait():
                caught.append(raised)
        assert not armed.is_set(), "the figure was never wanted"
        for raised in caught:
            assert isinstance(raised, LoadError | RunError | ClosedError), raised
        if where != "daemon":
            rig.check(passes=2)
    assert agents() == []


@pytest.mark.parametrize("at", ["give_back", "give", "close"])
def test_a_failure_while_a_shard_is_freed_gives_its_reservation_back(
    toy: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no")

    with rigged(toy, buffers=1, loaders=1) as rig:
        rig.check()
        rig.wait(lambda: bool(rig.exchange._ready))
        task = Task(ticket=-1, index=2, resident=False, epoch=rig.exchange._epoch)
        reserved = rig.pipeline._memory.reservations.reserved_bytes
        rig.pipeline._memory.reservations._reserved_bytes += 1000
        shard = LoadedShard(
            index=task.index,
            session=None,
            buffer=rig.pipeline._memory._pool.take(),
            reserved_bytes=1000,
            pooled=at == "give",
        )
        with monkeypatch.context() as patch:
            if at == "give_back":
                patch.setattr(weights_memory, "rss_bytes", lambda: 10**15)
                patch.setattr(rig.pipeline._memory, "give_back", fail)
            elif at == "give":
                patch.setattr(rig.pipeline._memory._pool, "give", fail)
            else:
                patch.setattr(type(shard.buffer), "close", fail)
            with pytest.raises(OSError, match="no"):
                rig.pipeline._loader.free(shard)
        assert rig.pipeline._memory.reservations.reserved_bytes == reserved
        assert not rig.exchange._short


def test_parts_that_stay_are_counted_while_loaders_add_more(toy_uneven: Path) -> None:
    """The recovery after a close sums them up while Loading Agents still keep new ones."""
    exchange = Exchange()
    adding = threading.Event()

    def add() -> None:
        for index in range(20_000):
            exchange.residents.keep(index, ())
            adding.set()

    adder = Background(add)
    adding.wait(PATIENCE_S)
    while adder.is_alive():
        sum(len(parts) for parts in exchange.residents.parts.values())
    adder.end()
    assert len(exchange.residents.parts) == 20_000


def test_a_failure_behind_a_shared_sweep_reaches_all_of_its_callers(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined calls must not wait for ever when counting or joining the outputs fails."""
    gate = Gate()
    with rigged(toy) as rig:
        rig.pipeline._progress = lambda _: gate.stop_here()
        running = rig.submit()
        gate.wait_reached()
        rig.pipeline._progress = None
        calls = [rig.submit() for _ in range(3)]
        monkeypatch.setattr(rig.pipeline._lent, "add", lambda _: (_ for _ in ()).throw(MemoryError()))
        gate.open()
        for call in [running, *calls]:
            assert call.outcome.exception(PATIENCE_S) is not None


def test_a_load_that_fails_before_it_reserves_keeps_no_later_one_waiting(toy: Path) -> None:
    with rigged(toy, loaders=1) as rig:
        rig.check()
        reservations = rig.pipeline._memory.reservations
        turn = reservations._turn
        reservations.skip(turn + 1)
        reservations.skip(turn)
        reservations.skip(turn)
        assert reservations._turn == turn + 2
