"""What a client knows of the nodes: another version ends nothing; a lost scheduler is told, and so is its return."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engine.cluster.test_placing import MB, member
from tests.engine.harness import PATIENCE_S

import pipeload
from pipeload.cluster import watch as watches
from pipeload.cluster.offer import BUDGET, OFFER, Offer
from pipeload.cluster.watch import Watch

_WORKERS = {
    "tcp://good": {OFFER: member("good", MB).offer.told(), "metrics": {OFFER: [{"model": "bert"}]}},
    "tcp://strange": {OFFER: {"name": "strange", "of": "version 9"}, "metrics": {}},
    "tcp://of-dask": {"metrics": {}},
}


class _Scheduler:
    """Answers with the next of these; the last one stays."""

    def __init__(self, *answers: dict[str, Any] | Exception) -> None:
        self._answers = [*answers]

    async def identity(self, n_workers: int) -> dict[str, Any]:
        assert n_workers == -1, "else Dask tells of five workers"
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return {"workers": answer}


def test_a_node_of_another_version_is_left_out() -> None:
    watch = Watch(_Scheduler(_WORKERS))
    asyncio.run(watch.look())
    assert [offer.name for offer in watch.offers.values()] == ["good"]
    assert watch.facts["tcp://good"] == [{"model": "bert"}]
    assert "one version of pipeload" in str(watch.strangers["tcp://strange"])
    assert "tcp://of-dask" not in watch.strangers


def test_a_node_that_has_not_told_yet_may_use_its_budget() -> None:
    told = {
        address: {OFFER: member(address, MB).offer.told(), "metrics": {}} for address in ("tcp://new", "tcp://short")
    }
    told["tcp://short"]["metrics"] = {OFFER: [], BUDGET: MB // 2}
    watch = Watch(_Scheduler(told))
    asyncio.run(watch.look())
    assert watch.budgets == {"tcp://new": MB, "tcp://short": MB // 2}


def _told(scheduler: _Scheduler, enough: Callable[[list[Any]], bool]) -> list[Any]:
    """What a listener hears until it is enough."""

    async def main() -> list[Any]:
        watch, heard, done = Watch(scheduler), [], asyncio.Event()

        def listen(told: dict[str, Offer] | pipeload.ClusterError) -> None:
            heard.append(told)
            if enough(heard):
                done.set()

        watch.listeners.add(listen)
        running = asyncio.ensure_future(watch.run())
        try:
            await asyncio.wait_for(done.wait(), PATIENCE_S)
        finally:
            running.cancel()
        return heard

    return asyncio.run(main())


def test_a_scheduler_that_misses_one_look_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "_INTERVAL_S", 0.0)
    heard = _told(_Scheduler(_WORKERS, OSError("cut off"), _WORKERS), lambda told: len(told) >= 3)
    assert all([*offers] == ["tcp://good"] for offers in heard)


def test_a_lost_scheduler_is_told_and_so_is_its_return(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "_INTERVAL_S", 0.0)
    # Longer than it may be silent, from each look to the next.
    clock = count(0.0, 2 * watches._SILENT_S)
    monkeypatch.setattr(watches, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    scheduler = _Scheduler(OSError("cut off"), _WORKERS)
    heard = _told(scheduler, lambda told: isinstance(told[-1], dict))
    assert isinstance(heard[0], pipeload.ClusterError)
    assert "does not answer: cut off" in str(heard[0])
