"""A node is slow beside itself: noise and other sizes of passes are no slowness, and other ranges of shards compare."""

from __future__ import annotations

import random

from pipeload.cluster.pace import Pace, Series
from pipeload.tracing.stats import PassStats
from pipeload.tracing.trace import AgentTimes

MB = 1_000_000


def _pass(run_s: float, *, calls: int = 1, read_bytes: int = 0, read_s: float = 0.0) -> PassStats:
    agents = {"inference": AgentTimes(kinds={"run": run_s}, busy_s=run_s, wait_s=0.0)}
    return PassStats(seconds=run_s, read_bytes=read_bytes, read_s=read_s, bound_s=None, agents=agents, calls=calls)


def _series(*values: tuple[object, float]) -> Series:
    made = Series()
    for kind, seconds in values:
        made.note(kind, seconds)
    return made


def test_slowness_is_the_time_now_over_the_best_one() -> None:
    assert _series(*[("a", 1.0)] * 10).slowness == 1.0
    assert _series(*[("a", 1.0)] * 10, *[("a", 3.0)] * 5).slowness == 3.0
    assert _series(*[("a", 1.0)] * 10, *[("a", 3.0)] * 5, *[("a", 1.0)] * 5).slowness == 1.0


def test_a_node_that_becomes_faster_is_not_slow() -> None:
    assert _series(*[("a", 3.0)] * 10, *[("a", 1.0)] * 20).slowness == 1.0


def test_one_slow_pass_in_five_is_chance() -> None:
    assert _series(*([("a", 1.0)] * 4 + [("a", 50.0)]) * 10).slowness == 1.0


def test_noise_is_not_much_slowness() -> None:
    for seed in range(50):
        noise = random.Random(seed)
        assert _series(*(("a", noise.uniform(0.95, 1.05)) for _ in range(300))).slowness < 1.1


def test_longer_texts_are_no_slowness() -> None:
    assert (
        _series(*(("long" if number % 3 else "short", 9.0 if number % 3 else 1.0) for number in range(60))).slowness
        == 1
    )


def test_a_kind_that_is_new_on_a_slow_node_is_slow() -> None:
    """Else a text that has grown would seem to run on a node that is as fast as before."""
    slow = _series(*[("a", 1.0)] * 10, *[("a", 3.0)] * 10, *[("b", 30.0)] * 10)
    assert slow.slowness == 3.0
    for _ in range(5):
        slow.note("b", 10.0)
    assert slow.slowness == 1.0


def test_few_kinds_are_kept() -> None:
    made = Series()
    for number in range(10_000):
        made.note(number, 1.0)
    assert len(made._kinds) <= 64
    assert made.slowness == 1.0


def test_stages_of_other_ranges_compare_by_the_time_that_the_profile_expects() -> None:
    pace = Pace()
    for _ in range(10):
        pace.note("token", _pass(0.4), expected_s=0.2)
    # Half of the shards, as slow as before; then three times as slow.
    for _ in range(10):
        pace.note("token", _pass(0.2), expected_s=0.1)
    assert pace.slowness == (1.0, 1.0)
    for _ in range(5):
        pace.note("token", _pass(0.6), expected_s=0.1)
    assert pace.slowness[0] > 2.9
    assert pace.run_s == 0.6


def test_calls_of_one_sweep_count_each() -> None:
    pace = Pace()
    for _ in range(10):
        pace.note("token", _pass(0.8, calls=4), expected_s=0.2)
    assert pace.run_s == 0.2
    assert pace.slowness == (1.0, 1.0)


def test_storage_that_slows_down_is_seen_whatever_is_read() -> None:
    pace = Pace()
    for _ in range(10):
        pace.note("token", _pass(0.0, read_bytes=100 * MB, read_s=0.1), expected_s=0.2)
        # Too little to tell anything.
        pace.note("token", _pass(0.0, read_bytes=1000, read_s=0.1), expected_s=0.2)
    assert pace.slowness == (1.0, 1.0)
    for _ in range(5):
        pace.note("token", _pass(0.0, read_bytes=50 * MB, read_s=0.2), expected_s=0.2)
    assert pace.slowness == (1.0, 4.0)
