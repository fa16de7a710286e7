"""Streamed passes equal sequential ones; the order of reads, and the bytes in memory at a time."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import (
    Gate,
    agents,
)
from tests.engine.pipeline.rig import (
    NAMES,
    NotingStorage,
    rigged,
)
from tests.marks import slow

from pipeload.pipeline import loader as loaders
from pipeload.pipeline.session import ShardSession
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan


@pytest.mark.parametrize("buffers", [1, 2, slow(3), slow(8)])
@pytest.mark.parametrize("loaders", [1, slow(2), 4])
@pytest.mark.parametrize("resident", [(), ("block.001", "block.004"), ("prologue", "epilogue"), tuple(NAMES)])
def test_streamed_passes_equal_sequential_ones_bit_for_bit(
    toy: Path, buffers: int, loaders: int, resident: tuple[str, ...]
) -> None:
    with rigged(toy, buffers=buffers, loaders=loaders, resident=resident) as rig:
        rig.check(passes=4)
        counts = Counter(rig.storage.read)
        # A pass more may have been begun ahead.
        assert {counts[name] for name in NAMES if name in resident} <= {1}
        assert {counts[name] for name in NAMES if name not in resident} <= {4, 5}
        assert rig.pipeline.stats.passes == 4


def test_one_loader_reads_in_plan_order_round_and_round(toy: Path) -> None:
    with rigged(toy, loaders=1, resident=("block.002",)) as rig:
        rig.check(passes=3)
        again = [name for name in NAMES if name != "block.002"]
        order = NAMES + again + again + again
        assert rig.storage.read == order[: len(rig.storage.read)]


def test_the_next_pass_is_read_before_anybody_calls(toy: Path) -> None:
    second = Gate(opened=True)
    with rigged(toy, loaders=1, buffers=2) as rig:
        rig.storage.before_read = lambda _: second.stop_here() if len(rig.storage.read) > len(NAMES) else None
        rig.check()
        second.wait_reached()
        assert rig.storage.read[len(NAMES)] == "prologue"


def test_outputs_are_counted_as_long_as_somebody_keeps_them(toy: Path) -> None:
    with rigged(toy) as rig:
        asked: list[int] = []
        before_pass = rig.replanner.before_pass

        def noting(current: Plan, needs: Needs, *others: int, **options: bool) -> Plan:
            asked.append(needs.pass_bytes)
            return before_pass(current, needs, *others, **options)

        rig.replanner.before_pass = noting
        outputs = rig.run()
        rig.run()
        part = next(iter(outputs.values()))[:1]
        del outputs
        rig.run()
        del part
        rig.run()
        nbytes = sum(array.nbytes for array in rig.expected.values())
        assert asked == [0, nbytes, asked[2], 0]
        assert 0 < asked[2] <= nbytes


def test_reading_begins_before_the_first_call(toy: Path) -> None:
    gate = Gate()
    original = NotingStorage.read_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            NotingStorage, "read_weights", lambda *args, **options: (gate.stop_here(), original(*args, **options))[1]
        )
        with rigged(toy) as rig:
            gate.wait_reached()
            gate.open()
            rig.check()


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_no_more_sessions_live_than_planned(toy: Path, monkeypatch: pytest.MonkeyPatch, buffers: int) -> None:
    lock, alive, most = threading.Lock(), [0], [0]

    class Counted(ShardSession):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            with lock:
                alive[0] += 1
                most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            with lock:
                alive[0] -= 1

    monkeypatch.setattr(loaders, "ShardSession", Counted)
    with rigged(toy, loaders=3, buffers=buffers, resident=("block.001",)) as rig:
        rig.check(passes=5)
        assert 2 <= most[0] <= buffers + 1
    assert alive[0] == 0


def test_the_weights_never_exceed_what_the_plan_gives_them(toy: Path) -> None:
    with rigged(toy, loaders=4, buffers=3, resident=("block.003",)) as rig:
        budget = rig.pipeline._memory.reservations
        seen: list[int] = []
        rig.storage.before_read = lambda _: seen.append(budget.reserved_bytes)
        rig.check(passes=5)
        assert max(seen) <= budget._limit_bytes
    assert budget.reserved_bytes == 0


def test_threads_have_names(toy: Path) -> None:
    with rigged(toy, loaders=2):
        assert sorted(agents()) == ["pipeload-daemon", "pipeload-inference", "pipeload-loader-0", "pipeload-loader-1"]
