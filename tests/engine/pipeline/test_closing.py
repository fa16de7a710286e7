"""A pipeline may be closed at any moment and from any thread: calls end, threads end, nothing stays reserved."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import (
    PATIENCE_S,
    Background,
    Gate,
    agents,
)
from tests.engine.pipeline.rig import (
    NAMES,
    gated_packing,
    rigged,
)

from pipeload.errors import ClosedError, LoadError
from pipeload.pipeline import loader as loaders
from pipeload.pipeline.session import ShardSession
from pipeload.tracing.trace import Progress


def test_closing_while_a_shard_is_packed_ends_all_threads(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr(loaders, "ShardSession", gated_packing(gate, "block.002"))
    with rigged(toy, resident=NAMES, packed=True) as rig:
        rig.check()
        gate.wait_reached()
        closing = Background(rig.pipeline.close)
        rig.wait(lambda: rig.exchange.closed)
        assert closing.is_alive(), "a thread still packs"
        gate.open()
        closing.end()
        assert agents() == []


def test_closing_without_a_call_ends_all_threads(toy: Path) -> None:
    with rigged(toy) as rig:
        rig.pipeline.close()
        assert agents() == []
        rig.pipeline.close()
        with pytest.raises(ClosedError):
            rig.run()


def test_closing_while_a_shard_is_read_ends_the_call(toy: Path) -> None:
    gate = Gate()
    with rigged(toy) as rig:
        rig.storage.before_read = lambda shard: gate.stop_here() if shard.name == "block.003" else None
        calls = [Background(rig.check, 5) for _ in range(3)]
        gate.wait_reached()
        closing = Background(rig.pipeline.close)
        with pytest.raises(ClosedError):
            calls[0].end()
        assert all(isinstance(call.wait(), ClosedError) for call in calls)
        assert closing.is_alive(), "a thread still reads"
        gate.open()
        closing.end()
        assert agents() == []


def test_closing_while_a_shard_runs_ends_the_call(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    class Gated(ShardSession):
        def run(self, *arguments: Any) -> Any:
            gate.stop_here()
            return super().run(*arguments)

    monkeypatch.setattr(loaders, "ShardSession", Gated)
    with rigged(toy) as rig:
        calls = [Background(rig.check) for _ in range(3)]
        gate.wait_reached()
        closing = Background(rig.pipeline.close)
        while not rig.pipeline._exchange.closed:
            rig.pipeline._exchange.notify()
        gate.open()
        closing.end()
        assert all(isinstance(call.wait(), ClosedError) for call in calls)


def test_closing_while_all_wait_for_budget_ends_all_threads(toy: Path) -> None:
    with rigged(toy, buffers=1, loaders=4) as rig:
        rig.check()


@pytest.mark.parametrize("seed", range(8))
def test_closing_at_any_moment_leaves_nothing(toy: Path, seed: int) -> None:
    """The n-th time that anything is read, the pipeline is closed from another thread."""
    moment = Gate()
    reads = iter(range(1000))
    with rigged(toy, buffers=1 + seed % 3) as rig:
        rig.storage.before_read = lambda _: moment.stop_here() if next(reads) == 3 * seed else None
        calls = [Background(rig.check, 10) for _ in range(2)]
        moment.wait_reached()
        closing = Background(rig.pipeline.close)
        moment.open()
        closing.end()
        assert all(isinstance(call.wait(), ClosedError) for call in calls)
    assert rig.pipeline._memory.reservations.reserved_bytes == 0


def test_several_may_close_at_once(toy: Path) -> None:
    with rigged(toy) as rig:
        rig.check()
        barrier = threading.Barrier(4)

        def close() -> list[str]:
            barrier.wait(PATIENCE_S)
            rig.pipeline.close()
            return agents()

        for call in [Background(close) for _ in range(4)]:
            assert call.end() == [], "close returned before the threads had ended"


def test_closing_during_set_budget_ends_it(toy: Path) -> None:
    gate = Gate()
    with rigged(toy) as rig:
        rig.storage.before_read = lambda shard: gate.stop_here() if shard.name == "block.003" else None
        call = Background(rig.check)
        gate.wait_reached()
        setting = Background(rig.pipeline.set_budget, 10**11)
        closing = Background(rig.pipeline.close)
        assert isinstance(setting.wait(), ClosedError)
        gate.open()
        closing.end()
        assert isinstance(call.wait(), ClosedError)
        with pytest.raises(ClosedError):
            rig.pipeline.set_budget(10**11)


def test_the_progress_callback_may_close_the_pipeline(toy: Path) -> None:
    closed: list[bool] = []

    def close(_: Progress) -> None:
        rig.pipeline.close()
        closed.append(True)

    with rigged(toy, progress=close) as rig:
        with pytest.raises(ClosedError):
            rig.run()
        assert closed == [True]
        for thread in threading.enumerate():
            if thread.name == "pipeload-closer":
                thread.join(PATIENCE_S)


def test_a_callback_that_closes_is_told_where_no_thread_can_do_the_rest(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, told = threading.Thread.start, []

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "pipeload-closer":
            raise RuntimeError("can't start new thread")
        start(thread)

    def close(_: Progress) -> None:
        with pytest.raises(LoadError, match="no thread can be started") as caught:
            rig.pipeline.close()
        told.append(caught.value)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with rigged(toy, progress=close) as rig:
        with pytest.raises(ClosedError):
            rig.run()
    assert told
