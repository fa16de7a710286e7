"""The memory that the process occupies, and that the cgroup and the machine leave free."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeload.machine import memory
from pipeload.planning import replanner


def test_rss_follows_what_the_process_touches() -> None:
    before = memory.rss_bytes()
    ballast = np.ones(64 << 20, np.uint8)
    assert 60 << 20 <= memory.rss_bytes() - before <= 80 << 20
    assert memory.peak_rss_bytes() >= before + ballast.nbytes - (4 << 20)


def test_auto_takes_less_than_the_smallest_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    rss = 100_000_000
    monkeypatch.setattr(memory, "rss_bytes", lambda: rss)
    # Of a limit of 400 MB others use 150 MB: 250 MB are left to this process, its own use included.
    monkeypatch.setattr(memory, "memory_limits", lambda *_: iter([(400_000_000, rss + 150_000_000), (10**12, 10**9)]))
    assert 225_000_000 <= memory.auto_budget_bytes() < 250_000_000


def test_auto_takes_less_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limits", lambda *_: iter([]))
    assert 0 < memory.auto_budget_bytes() < psutil.virtual_memory().total


def test_auto_is_never_zero_even_in_a_full_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limits", lambda *_: iter([(10, 10**12)]))
    assert memory.auto_budget_bytes() >= 0


def test_free_memory_is_looked_up_no_more_often_than_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looked = [1000.0], []
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(memory, "auto_budget_bytes", lambda: looked.append(now[0]) or len(looked))
    free = memory.FreeMemory()
    assert [free(), free(), free()] == [1, 1, 1]
    now[0] += 60
    assert [free(), free()] == [2, 2]


def test_a_peak_is_what_the_system_saw_where_it_is_a_new_one_and_else_lies_between_what_was_noted_and_that() -> None:
    watch = memory.PeakWatch(100)
    watch.note(90)
    watch.note(80)
    assert watch.take(150, unseen_bytes=5) == memory.Peak(150, 150)
    watch.note(120)
    assert watch.take(150, unseen_bytes=5) == memory.Peak(120, 125)
    watch.note(148)
    assert watch.take(150, unseen_bytes=5) == memory.Peak(148, 150)


def test_a_process_with_few_pages_of_its_libraries_is_counted_with_those_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = memory._PAGE_BYTES
    few, many = 5_000_000 // page, 60_000_000 // page
    for of_files in (few, many):
        (tmp_path / "statm").write_text(f"99999 {of_files + 1000} {of_files} 1 0 1 0\n")
        monkeypatch.setattr(memory, "_STATM", tmp_path / "statm")
        assert memory.warm_rss_bytes() == max(of_files * page, memory._LIBRARY_BYTES) + 1000 * page
    monkeypatch.setattr(memory, "_STATM", tmp_path / "none")
    assert memory.warm_rss_bytes() >= memory.rss_bytes() - (8 << 20)


@pytest.mark.skipif(not memory.reset_peak_rss(), reason="the system does not let a process forget its peak")
def test_a_peak_that_was_reset_begins_with_what_is_occupied_now() -> None:
    # No array: the heap may keep what is freed.
    held = mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.write(b"1" * 50_000_000)
    with_map = memory.peak_rss_bytes()
    held.close()
    assert memory.reset_peak_rss()
    assert memory.peak_rss_bytes() < with_map - 25_000_000


def test_a_peak_that_cannot_be_reset_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert memory.reset_peak_rss() is False


def test_auto_leaves_more_than_the_swing_that_plans_outlast_and_no_more_than_2_percent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight callers under "auto" were killed by the kernel: free memory had fallen by less than makes a new plan."""
    limit, used = 500_000_000, 100_000_000
    monkeypatch.setattr(memory, "rss_bytes", lambda: used)
    monkeypatch.setattr(memory, "memory_limits", lambda: [(limit, used)])
    left = limit - memory.auto_budget_bytes()
    assert limit * replanner._FREE_SWING_SHARE < left <= 0.02 * limit
