"""Big and little cores: the recurrence for agents with cores of their own, and the partition that the planner takes."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from tests.engine.plans import manifest_of

from pipeload.machine.cores import computing_cores, reading_cores
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan, forecast, make_plan, rested_pass_s
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.rates import Rates
from pipeload.planning.schedule import ShardWork, least_steady_s, simulate

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

MB = 1_000_000
MANIFEST = manifest_of(*[[20 * MB]] * 6)
NEEDS = Needs(pass_bytes=MB)
PROFILE = Profile(process_bytes=50 * MB, cores=4, core_capacities={0: 400, 1: 400, 2: 1024, 3: 1024})
FEWER_THREADS, CLOSE = 1.1, 1.005
"""Fewer threads must be faster by the first factor, and plans that differ by less than the second are equal."""


def _widened(run_s: float, session_s: float) -> ShardWork:
    return ShardWork(cold_bytes=0, steady_bytes=0, streamed=True, session_s=session_s, run_s=run_s, loading_run_s=run_s)


@pytest.mark.parametrize(
    ("threads", "loading_cores", "steady_s"),
    [
        # All four cores do both: (2 x 12 + 40) / 4.
        (2, 0, 16.0),
        # The two that read have 40 seconds of sessions between them.
        (2, 2, 20.0),
        # One of them has all.
        (3, 1, 40.0),
        (1, 3, 40 / 3),
    ],
)
def test_agents_with_cores_of_their_own_take_none_from_computing_and_get_none(
    threads: int, loading_cores: int, steady_s: float
) -> None:
    work = [_widened(3.0, 10.0)] * 4
    assert least_steady_s(work, threads, 4, loading_cores) == pytest.approx(steady_s)
    room: dict[str, Any] = {"loaders": 4, "buffers": 5, "read_bytes_per_s": 1.0}
    found = simulate(work, threads=threads, cores=4, loading_cores=loading_cores, **room)
    assert found.steady_s == pytest.approx(steady_s)


def test_computing_on_its_own_cores_hides_all_sessions_that_are_quicker() -> None:
    # On two shared cores this takes (2 x 12 + 8) / 2.
    work = [_widened(3.0, 2.0)] * 4
    room: dict[str, Any] = {"loaders": 1, "buffers": 2, "read_bytes_per_s": 1.0}
    assert simulate(work, threads=2, cores=2, **room).steady_s == pytest.approx(16)
    assert simulate(work, threads=1, cores=2, loading_cores=1, **room).steady_s == pytest.approx(12)


def test_a_quota_bounds_the_work_of_all_cores_together() -> None:
    # Four cores of which two may run at the same time: two threads compute all the time, and nothing is left.
    work = [_widened(3.0, 2.0)] * 4
    assert least_steady_s(work, 2, 2, 2) == pytest.approx((2 * 12 + 8) / 2)


def _times(run_s: float, session_s: float) -> dict[str, ShardTimes]:
    one = ShardTimes(session_s=session_s, run_s=run_s, loading_run_s=run_s, pack_s=1.0, packed_run_s=run_s)
    return {shard.name: one for shard in MANIFEST.shards}


def _run_s(capacities: dict[int, int], cores: Any, work_s: float) -> float:
    """Work is split evenly, and all wait for the smallest core."""
    return work_s * 1024 / (len(cores) * min(capacities[core] for core in cores))


def _session_s(capacities: dict[int, int], cores: Any, work_s: float) -> float:
    return work_s * 1024 / max(capacities[core] for core in cores)


@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
@given(
    capacities=st.lists(st.sampled_from([250, 400, 512, 800, 1024]), min_size=1, max_size=5),
    run_s=st.sampled_from([0.002, 0.01, 0.05]),
    session_s=st.sampled_from([0.0, 0.002, 0.02]),
    bandwidth=st.sampled_from([{1: 4e8}, {1: 1e9, 2: 2e9}, {1: 1e10, 2: 1e10}]),
    budget_bytes=st.sampled_from([100 * MB, 130 * MB, 400 * MB]),
)
def test_the_planner_takes_the_best_of_all_partitions(
    capacities: list[int], run_s: float, session_s: float, bandwidth: dict[int, float], budget_bytes: int
) -> None:
    cores = dict(enumerate(capacities))
    differ = bool(computing_cores(cores, 1))
    profile = replace(
        PROFILE,
        cores=len(cores),
        read_bytes_per_s=bandwidth,
        core_capacities=cores if differ else {},
        times={
            threads: _times(
                _run_s(cores, computing_cores(cores, threads) or list(cores)[:threads], run_s),
                _session_s(cores, reading_cores(cores, threads) or cores, session_s),
            )
            for threads in range(1, len(cores) + 1)
        },
    )
    found = make_plan(MANIFEST, profile, budget_bytes=budget_bytes, needs=NEEDS)
    assert found.steady_pass_s is not None
    best_s = min(
        _partitioned(cores, set(computing), set(reading), run_s, session_s, bandwidth, budget_bytes)
        for count in range(1, len(cores) + 1)
        for computing in combinations(cores, count)
        for reading in _others(cores, computing, apart=differ)
    )
    assert best_s <= found.steady_pass_s * (1 + 1e-9)
    assert found.steady_pass_s <= best_s * FEWER_THREADS * CLOSE


def _others(cores: dict[int, int], computing: Any, *, apart: bool) -> list[Any]:
    """Cores that may read beside these: any of the others; all where none is left, or where threads are not pinned."""
    others = [core for core in cores if core not in computing]
    if not apart or not others:
        return [list(cores)]
    return [reading for count in range(1, len(others) + 1) for reading in combinations(others, count)]


def _partitioned(
    cores: dict[int, int],
    computing: set[int],
    reading: set[int],
    run_s: float,
    session_s: float,
    bandwidth: dict[int, float],
    budget_bytes: int,
) -> float:
    """Steady seconds of the best layout on these cores: a machine of which the planner sees no more than them."""
    threads = len(computing)
    own = reading - computing
    # Capacities that make exactly this partition.
    pretended = {core: 1024 if core in computing else 1 for core in computing | reading} if own and threads else {}
    profile = replace(
        PROFILE,
        cores=len(computing | reading),
        read_bytes_per_s=bandwidth,
        core_capacities=pretended if reading.isdisjoint(computing) else {},
        times={threads: _times(_run_s(cores, computing, run_s), _session_s(cores, reading, session_s))},
    )
    plan = make_plan(MANIFEST, profile, budget_bytes=budget_bytes, needs=NEEDS, threads=threads)
    assert plan.steady_pass_s is not None
    return plan.steady_pass_s


def test_predictions_know_the_partition() -> None:
    profile = replace(PROFILE, read_bytes_per_s={1: 1e9}, times={2: _times(0.01, 0.04), 4: _times(0.02, 0.01)})

    def plan(one: Profile) -> Plan:
        return make_plan(MANIFEST, one, budget_bytes=100 * MB, needs=NEEDS, threads=2, loaders=2)

    apart, shared = plan(profile), plan(replace(profile, core_capacities={}))
    assert forecast(MANIFEST, profile, apart).steady_s == apart.steady_pass_s
    assert apart.steady_pass_s is not None
    assert shared.steady_pass_s is not None
    # 6 x 0.04 s of sessions on two cores, or with the 6 x 0.01 s of two threads on four.
    assert apart.steady_pass_s >= 0.12
    assert rested_pass_s(MANIFEST, profile, apart) <= apart.steady_pass_s * 1.5


def test_without_a_profile_threads_on_big_cores_do_not_wait_for_little_ones() -> None:
    assert list(Rates.of(MANIFEST, PROFILE, None).times) == [2]
    assert list(Rates.of(MANIFEST, PROFILE, 4).times) == [4]
    assert list(Rates.of(MANIFEST, replace(PROFILE, cores=1), None).times) == [1]
    assert list(Rates.of(MANIFEST, replace(PROFILE, core_capacities={}), None).times) == [4]
