"""Figures of one pass, from spans made by hand."""

from __future__ import annotations

from typing import Any

import pytest
from tests.engine.plans import manifest_of

from pipeload.planner import Plan, make_plan
from pipeload.profile import Profile, ShardTimes
from pipeload.stats import PassStats, pass_stats
from pipeload.trace import Kind, Span

MB = 1_000_000
MANIFEST = manifest_of([10 * MB], [20 * MB])
PROFILE = Profile(
    process_bytes=MB,
    cores=1,
    read_bytes_per_s={1: 10e6},
    times={
        1: {
            name: ShardTimes(session_s=0, run_s=0.25, loading_run_s=0.3, pack_s=1, packed_run_s=0.2)
            for name in ("s0", "s1")
        }
    },
)


def _plan(budget: int = 10**9) -> Plan:
    return make_plan(MANIFEST, PROFILE, budget_bytes=budget, pass_bytes=0)


def _span(kind: Kind, begin_s: float, end_s: float, nbytes: int = 0, agent: str = "loader-0") -> Span:
    return Span(agent=agent, kind=kind, shard="s0", begin_s=begin_s, end_s=end_s, nbytes=nbytes)


def _stats(spans: list[Span], **options: Any) -> PassStats:
    return pass_stats(MANIFEST, options.get("profile", PROFILE), options.get("plan", _plan()), spans, 10.0, 14.0)


def test_reads_count_as_far_as_they_lie_in_the_pass() -> None:
    spans = [
        _span("read", 8.0, 12.0, 8 * MB),
        _span("read", 11.0, 13.0, 2 * MB, "loader-1"),
        _span("read", 13.5, 15.5, 4 * MB),
        _span("read", 1.0, 2.0, 100 * MB),
        _span("read", 14.0, 15.0, 100 * MB),
        _span("session", 13.0, 13.5),
    ]
    stats = _stats(spans)
    assert stats.seconds == 4.0
    # Half of the first, all of the second, a quarter of the third.
    assert stats.read_bytes == 4 * MB + 2 * MB + MB
    assert stats.read_s == pytest.approx(3.5)
    assert stats.read_bytes_per_s == pytest.approx(2 * MB)
    assert stats.agents["loader-0"].busy_s == pytest.approx(3.0)


def test_a_pass_that_read_nothing_has_no_bandwidth() -> None:
    stats = _stats([_span("run", 10.0, 14.0, agent="inference")])
    assert (stats.read_bytes, stats.read_s, stats.read_bytes_per_s) == (0, 0.0, 0.0)


def test_efficiency_is_the_least_possible_time_by_the_measured_one() -> None:
    resident = _stats([])
    # All is in memory: 2 x 0.2 s of computing.
    assert resident.bound_s == pytest.approx(0.4)
    assert resident.efficiency == pytest.approx(0.1)
    streamed = _stats([], plan=_plan(46 * MB))
    assert streamed.bound_s == pytest.approx((30 * MB - _plan(46 * MB).resident_bytes) / 10e6)
    assert streamed.bound_s > 0.4


def test_without_a_profile_there_is_no_bound() -> None:
    stats = _stats([], profile=Profile(process_bytes=MB, cores=1))
    assert stats.bound_s is None
    assert stats.efficiency is None
