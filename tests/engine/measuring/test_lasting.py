"""Short work is timed as it would last within a quota of processor time, and as it was where there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeload.measuring import lasting, profile_store
from pipeload.measuring.lasting import LastingClock
from pipeload.planning.profile import Profile


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """What the two clocks show, one pair after another."""
    shown: list[tuple[float, float]] = []

    def walls() -> Iterator[float]:
        while True:
            yield shown[0][0]

    wall = walls()
    monkeypatch.setattr(lasting.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(lasting.time, "process_time", lambda: shown.pop(0)[1])
    return shown


@pytest.mark.parametrize(
    ("quota", "wall_s", "processor_s", "lasts_s"),
    [
        (math.inf, 0.005, 0.010, 0.005),
        # A burst of one thread within half a processor, and one that has waited for its quota already.
        (0.5, 0.005, 0.005, 0.010),
        (0.5, 0.055, 0.005, 0.055),
        # Two threads within one and a half.
        (1.5, 0.006, 0.012, 0.008),
        # What does not compute does not wait.
        (0.5, 0.020, 0.001, 0.020),
    ],
)
def test_work_lasts_as_long_as_its_quota_takes(
    moments: list[tuple[float, float]],
    monkeypatch: pytest.MonkeyPatch,
    quota: float,
    wall_s: float,
    processor_s: float,
    lasts_s: float,
) -> None:
    monkeypatch.setattr(lasting, "cpu_quota", lambda: quota)
    moments += [(100.0, 7.0), (100.0 + wall_s, 7.0 + processor_s)]
    clock = LastingClock()
    assert clock.since(clock.now()) == pytest.approx(lasts_s)


def test_a_part_of_the_time_counts_where_it_is_told(
    moments: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lasting, "cpu_quota", lambda: 0.5)
    moments += [(0.0, 0.0), (9.0, 0.1), (0.0, 0.0), (9.0, 0.1)]
    clock = LastingClock()
    assert clock.since(clock.now(), 0.3) == pytest.approx(0.3)
    assert clock.since(clock.now(), 0.1) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("quota", "whole", "kept"), [(math.inf, 2, None), (0.5, 1, 0.5), (1.5, 2, 1.5), (1.0, 1, None), (8.5, 2, None)]
)
def test_a_kept_profile_belongs_to_its_quota(
    toy: Path, monkeypatch: pytest.MonkeyPatch, quota: float, whole: int, kept: float | None
) -> None:
    """Where that is no whole number of processors: else it is that of a machine with so few."""
    monkeypatch.setattr(profile_store, "cpu_quota", lambda: quota)
    monkeypatch.setattr(profile_store, "cores", lambda: whole)
    dims = {"batch": 1}
    assert profile_store.identify(toy, dims).cpu_quota == kept
    assert profile_store.keep(toy, Profile(process_bytes=1, cores=whole, dims=dims)) is not None
    assert profile_store.find(toy, dims) is not None
    monkeypatch.setattr(profile_store, "cpu_quota", lambda: 0.25)
    assert profile_store.find(toy, dims) is None
