"""Figures of one pass, from spans made by hand."""

from __future__ import annotations

import pytest

from pipeload.tracing.stats import PassStats, pass_stats
from pipeload.tracing.trace import Kind, Span

MB = 1_000_000


def _span(kind: Kind, begin_s: float, end_s: float, nbytes: int = 0, agent: str = "loader-0") -> Span:
    return Span(agent=agent, kind=kind, shard="s0", begin_s=begin_s, end_s=end_s, nbytes=nbytes)


def _stats(spans: list[Span], bound_s: float | None = None) -> PassStats:
    return pass_stats(spans, 10.0, 14.0, bound_s)


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
    assert _stats([], 3.0).bound_s == 3.0
    assert _stats([], 3.0).efficiency == pytest.approx(0.75)


def test_without_a_bound_there_is_no_efficiency() -> None:
    assert _stats([]).bound_s is None
    assert _stats([]).efficiency is None
