"""Which cores are big, which compute and which read, on machines that a folder stands for."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pipeload.machine import cores
from pipeload.machine.cores import (
    affinity,
    big_cores,
    computing_cores,
    core_capacities,
    pin,
    reading_cores,
    spelled,
)

FOUR_AND_FOUR = {0: 512, 1: 512, 2: 512, 3: 512, 4: 1024, 5: 1024, 6: 1024, 7: 1024}


def _system(folder: Path, capacities: Mapping[int, int | str], name: str = "cpu_capacity") -> Path:
    for core, capacity in capacities.items():
        path = folder / f"cpu{core}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{capacity}\n")
    for other in ("cpufreq", "cpuidle"):
        (folder / other).mkdir(exist_ok=True)
    return folder


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    return lambda found: monkeypatch.setattr(os, "sched_getaffinity", lambda _: found)


def test_capacities_are_those_of_linux_for_the_cores_that_the_process_may_use(
    tmp_path: Path, usable: Callable[[set[int]], None]
) -> None:
    system = _system(tmp_path, FOUR_AND_FOUR)
    usable(set(range(8)))
    assert core_capacities(system) == FOUR_AND_FOUR
    usable({3, 4, 5})
    assert core_capacities(system) == {3: 512, 4: 1024, 5: 1024}


def test_frequencies_stand_for_capacities_that_linux_does_not_have(
    tmp_path: Path, usable: Callable[[set[int]], None]
) -> None:
    usable({0, 1, 2})
    system = _system(tmp_path, {0: 1_800_000, 1: 2_400_000, 2: 2_400_000}, "cpufreq/cpuinfo_max_freq")
    assert core_capacities(system) == {0: 768, 1: 1024, 2: 1024}
    # One capacity of three tells nothing.
    assert core_capacities(_system(tmp_path, {0: 1024})) == {0: 768, 1: 1024, 2: 1024}


@pytest.mark.parametrize(
    "capacities",
    [
        {0: 1024, 1: 1024},
        # Desktop processors let their best cores run a little faster.
        {0: 1024, 1: 980},
        {0: 1024},
        {0: 1024, 1: "<unknown>"},
        {0: 1024, 1: 0},
        {},
    ],
)
def test_where_no_core_is_little_or_the_system_does_not_tell_there_are_none(
    tmp_path: Path, usable: Callable[[set[int]], None], capacities: dict[int, int | str]
) -> None:
    usable({0, 1})
    assert core_capacities(_system(tmp_path, capacities)) == {}
    assert computing_cores({}, 1) == reading_cores({}, 1) == frozenset()


def test_without_affinities_nothing_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert core_capacities(_system(tmp_path, FOUR_AND_FOUR)) == {}


def test_little_cores_alone_are_told_apart_from_big_ones_but_are_equal(
    tmp_path: Path, usable: Callable[[set[int]], None]
) -> None:
    system = _system(tmp_path, FOUR_AND_FOUR)
    usable({4, 5, 6, 7})
    assert core_capacities(system) == {}
    usable({0, 1, 2, 3})
    little = core_capacities(system)
    assert little == dict.fromkeys(range(4), 512)
    assert computing_cores(little, 2) == reading_cores(little, 2) == frozenset()
    assert spelled(little, 2) == ""


@pytest.mark.parametrize(
    ("capacities", "big"),
    [
        ((1024, 512), 1),
        ((512, 512, 1024, 1024), 2),
        # One prime, three gold, four silver: the widest gap is before the silver ones.
        ((325, 325, 325, 325, 800, 800, 800, 1024), 4),
        ((1024, 1000, 980), 3),
        ((1024,), 1),
        ((), 0),
    ],
)
def test_cores_before_the_widest_gap_are_big(capacities: tuple[int, ...], big: int) -> None:
    assert big_cores(dict(enumerate(capacities))) == big


def test_computing_has_the_largest_cores_and_loading_agents_have_the_others() -> None:
    assert computing_cores(FOUR_AND_FOUR, 4) == {4, 5, 6, 7}
    assert reading_cores(FOUR_AND_FOUR, 4) == {0, 1, 2, 3}
    assert computing_cores(FOUR_AND_FOUR, 2) == {4, 5}
    assert reading_cores(FOUR_AND_FOUR, 2) == {0, 1, 2, 3, 6, 7}
    assert computing_cores(FOUR_AND_FOUR, 7) == {4, 5, 6, 7, 0, 1, 2}
    assert reading_cores(FOUR_AND_FOUR, 7) == {3}
    for threads in (8, 9):
        assert computing_cores(FOUR_AND_FOUR, threads) == reading_cores(FOUR_AND_FOUR, threads) == set(range(8))
    assert spelled(FOUR_AND_FOUR, 2) == "computing on 4-5, reading on 0-3, 6-7"
    assert spelled(FOUR_AND_FOUR, 7) == "computing on 0-2, 4-7, reading on 3"


def _in_a_thread(job: Callable[[], object]) -> None:
    thread = threading.Thread(target=job)
    thread.start()
    thread.join()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_a_pinned_thread_runs_there_and_no_other_thread_does() -> None:
    before, seen = os.sched_getaffinity(0), []
    core = min(before)

    def job() -> None:
        seen.append((pin(0, {core}), affinity(0), pin(0, ()), affinity(0)))

    _in_a_thread(job)
    assert seen == [(True, {core}, True, {core})]
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_what_the_kernel_refuses_is_told_once_and_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    cores._tell.cache_clear()
    with caplog.at_level(logging.INFO, "pipeload"):
        assert not pin(0, {1000, 1001})
        assert not pin(0, {1000, 1001})
    assert [record.getMessage() for record in caplog.records] == [
        f"threads are not pinned to the cores 1000-1001, the kernel refuses: {os.strerror(errno.EINVAL)}"
    ]


def test_a_thread_that_has_ended_has_no_affinity_and_is_no_refusal() -> None:
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    assert ended.native_id is not None
    # Its number may be free for a moment longer than the thread itself.
    while Path(f"/proc/self/task/{ended.native_id}").exists():
        pass
    assert affinity(ended.native_id) == frozenset()
    assert pin(ended.native_id, {0})
