"""The planner's choices and sums, each by figures that can be worked out by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from tests.engine.plans import manifest_of, with_common

from pipeload.errors import BudgetError
from pipeload.format.manifest import Manifest
from pipeload.planning import planner
from pipeload.planning.footprint import least_bytes, session_bytes, whole_bytes
from pipeload.planning.layouts import Layout, layouts
from pipeload.planning.needs import Needs
from pipeload.planning.planner import (
    LEAST_RUNTIME_BYTES,
    MOST_RUNTIME_BYTES,
    Plan,
    budget_for_latency,
    forecast,
    least_budget_bytes,
    make_plan,
    predict,
    process_bytes,
    rested_pass_s,
    runtime_bytes,
    with_needs,
)
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.rates import Rates
from pipeload.planning.schedule import Schedule, ShardWork, simulate

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

MB = 1_000_000
PROFILE = Profile(process_bytes=50 * MB, cores=4)


def _times(number: int = 1) -> ShardTimes:
    return ShardTimes(
        session_s=1.0 * number,
        run_s=10.0 * number,
        loading_run_s=15.0 * number,
        pack_s=3.0 * number,
        packed_run_s=4.0 * number,
    )


def _layout(**fields: Any) -> Layout:
    least: dict[str, Any] = {
        "loaders": 1,
        "buffers": 2,
        "buffer_bytes": MB,
        "sessions": None,
        "sessions_bytes": 0,
        "resident": frozenset(),
        "partly_resident": {},
        "packed": False,
        "packed_streamed": False,
        "packing_bytes": 0,
        "used_bytes": 0,
        "resident_bytes": 0,
        "streamed_bytes": 10 * MB,
        "threads": 1,
    }
    return Layout(**(least | fields))


def _plan(**fields: Any) -> Plan:
    least: dict[str, Any] = {
        "budget_bytes": 100,
        "loaders": 1,
        "buffers": 1,
        "buffer_bytes": 1,
        "resident": frozenset(),
        "packed": False,
        "threads": 1,
        "process_bytes": 10,
        "pass_bytes": 2,
        "cache_bytes": 3,
        "resident_bytes": 0,
        "streamed_bytes": 1,
        "peak_bytes": 50,
    }
    return Plan(**(least | fields))


# The process


def test_the_runtime_is_assumed_until_it_is_measured_to_be_no_leftover_of_another_run() -> None:
    assert runtime_bytes(PROFILE) == 18_000_000
    assert (LEAST_RUNTIME_BYTES, MOST_RUNTIME_BYTES) == (6_000_000, 36_000_000)
    assert runtime_bytes(replace(PROFILE, runtime_bytes=LEAST_RUNTIME_BYTES - 1)) == 18_000_000
    for measured in (LEAST_RUNTIME_BYTES, LEAST_RUNTIME_BYTES + 1, 2 * MOST_RUNTIME_BYTES):
        profile = replace(PROFILE, runtime_bytes=measured)
        assert runtime_bytes(profile) == measured
        assert process_bytes(profile) == 50 * MB + measured


# Plans


def test_a_plan_is_direct_and_packs_nothing_unless_it_says_so() -> None:
    plan = _plan()
    assert (plan.sessions, plan.sessions_bytes, plan.partly_resident, plan.packing_bytes) == (None, 0, {}, 0)
    assert (plan.packed_streamed, plan.direct, plan.first_pass_s, plan.steady_pass_s) == (False, True, None, None)


def test_weights_are_what_is_left_of_the_peak() -> None:
    assert _plan(packing_bytes=5).weights_bytes == 50 - 10 - 2 - 3 - 5


@pytest.mark.parametrize(
    "change",
    [
        {"loaders": 2}, {"buffers": 2}, {"buffer_bytes": 2}, {"sessions": 1}, {"packed_streamed": True},
        {"direct": False}, {"resident": frozenset("a")}, {"partly_resident": {"a": (0, 1)}}, {"packed": True},
        {"threads": 2},
    ],
)  # fmt: skip
def test_what_cannot_change_while_shards_are_loaded_is_the_layout(change: dict[str, Any]) -> None:
    assert _plan(**change).layout != _plan().layout
    assert _plan(peak_bytes=60, pass_bytes=7, steady_pass_s=1.0).layout == _plan().layout


def test_other_needs_move_the_peak_and_nothing_else() -> None:
    plan = _plan(packing_bytes=5)
    profile = Profile(process_bytes=100, cores=1, runtime_bytes=LEAST_RUNTIME_BYTES)
    other = with_needs(plan, profile, Needs(pass_bytes=1000, cache_bytes=20_000), 7)
    process = 100 + LEAST_RUNTIME_BYTES
    assert (other.budget_bytes, other.process_bytes, other.pass_bytes, other.cache_bytes) == (7, process, 1000, 20_000)
    assert other.peak_bytes == process + 1000 + 20_000 + 5 + 30
    assert (other.weights_bytes, other.layout) == (plan.weights_bytes, plan.layout)


def test_a_plan_is_a_value_whose_fields_have_names() -> None:
    plan = _plan()
    with pytest.raises(FrozenInstanceError):
        plan.loaders = 2  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Plan(*(getattr(plan, field.name) for field in fields(plan)))  # type: ignore[misc]
    assert not hasattr(plan, "__dict__")


# The work of a layout


def _work(layout: Layout, *, times: dict[str, ShardTimes] | None = None) -> list[ShardWork]:
    manifest = with_common(manifest_of([100, 200], [1000], [1000], [50]), (1, 2))
    firsts = (0, 1, 1, 3)
    return planner._work(manifest, firsts, layout, times or {f"s{k}": _times(k + 1) for k in range(4)})


def test_a_streamed_shard_is_read_for_each_pass_and_its_session_is_made() -> None:
    work = _work(_layout(partly_resident={"s0": (100, 300)}))
    assert work[0] == ShardWork(
        cold_bytes=300, steady_bytes=200, streamed=True, session_s=1.0, run_s=10.0, loading_run_s=15.0
    )
    assert (work[3].cold_bytes, work[3].steady_bytes, work[3].run_s) == (50, 50, 40.0)
    # Streamed, weights in common are read for each of their shards.
    assert [one.cold_bytes for one in work[1:3]] == [1000, 1000]


def test_a_resident_shard_is_read_once_and_weights_in_common_with_the_first_shard_of_them() -> None:
    work = _work(_layout(resident=frozenset({"s0", "s1", "s2"})))
    assert [one.cold_bytes for one in work] == [300, 1000, 0, 50]
    assert [one.steady_bytes for one in work] == [0, 0, 0, 50]
    assert [one.streamed for one in work] == [False, False, False, True]


def test_resident_shards_are_packed_behind_the_passes_and_streamed_ones_by_their_loaders() -> None:
    resident = frozenset({"s0"})
    for packed in (False, True):
        for packed_streamed in (False, True):
            work = _work(_layout(resident=resident, packed=packed, packed_streamed=packed_streamed))
            first, last = work[0], work[3]
            assert (first.session_s, first.run_s) == (1.0, 4.0 if packed else 10.0)
            assert (last.session_s, last.run_s) == ((12.0, 16.0) if packed_streamed else (4.0, 40.0))
            # Reading slows both down in the same proportion.
            assert (first.loading_run_s, last.loading_run_s) == (1.5 * first.run_s, 1.5 * last.run_s)


def test_a_shard_that_is_always_packed_is_packed_whether_it_streams_or_stays() -> None:
    manifest = manifest_of([100], [200])
    manifest = replace(manifest, shards=tuple(replace(shard, packed=True) for shard in manifest.shards))
    times = {"s0": _times(1), "s1": _times(2)}
    stays, streams = planner._work(manifest, (0, 1), _layout(resident=frozenset({"s0"})), times)
    # A resident one has a session that needs no more packing.
    assert (stays.session_s, stays.run_s, stays.loading_run_s) == (1.0, 4.0, 6.0)
    assert (streams.session_s, streams.run_s, streams.loading_run_s) == (6.0, 8.0, 12.0)


def test_reading_never_makes_computing_faster_and_a_shard_that_takes_no_time_is_not_slowed_down() -> None:
    faster = replace(_times(), loading_run_s=5.0)
    nothing = replace(_times(), run_s=0.0)
    work = _work(_layout(), times={"s0": faster, "s1": nothing, "s2": _times(), "s3": _times()})
    assert work[0].loading_run_s == 10.0
    assert (work[1].run_s, work[1].loading_run_s) == (0.0, 0.0)
    # Whose packed form was measured to take some.
    work = _work(_layout(packed_streamed=True), times={"s0": faster, "s1": nothing, "s2": _times(), "s3": _times()})
    assert (work[1].run_s, work[1].loading_run_s) == (4.0, 4.0)


# The choice


def _preferred(*pairs: tuple[dict[str, Any], float]) -> int:
    """Which of these layouts is taken; all have the same steady pass, and these first ones."""
    equal = [(_layout(**fields), Schedule(first_s=first_s, steady_s=1.0)) for fields, first_s in pairs]
    return equal.index(planner._preferred(equal))


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (({"packed": True, "buffers": 2}, 1.0), ({"buffers": 3}, 1.5)),
        (({"sessions": None}, 1.03), ({"sessions": 1}, 1.0)),
        (({"sessions": 1, "buffers": 2}, 1.0), ({"buffers": 3}, 1.0)),
        (({"buffers": 1, "streamed_bytes": 5}, 1.0), ({"buffers": 2, "streamed_bytes": 9}, 1.0)),
        (({"buffers": 3, "streamed_bytes": 5}, 1.0), ({"buffers": 2, "streamed_bytes": 9}, 1.0)),
        (({"buffers": 2, "loaders": 2, "streamed_bytes": 5}, 1.0), ({"buffers": 3, "loaders": 2}, 1.0)),
        (({"loaders": 4, "streamed_bytes": 5}, 1.0), ({"loaders": 4, "buffers": 3}, 1.0)),
        (({"buffers": 1, "streamed_bytes": 0}, 1.0), ({"buffers": 0, "loaders": 2, "streamed_bytes": 1}, 1.0)),
        (({"streamed_bytes": 9, "loaders": 1}, 1.0), ({"streamed_bytes": 5, "loaders": 2, "buffers": 3}, 1.0)),
        (({"loaders": 2, "buffers": 3, "threads": 1}, 1.0), ({"loaders": 1, "threads": 2}, 1.0)),
        (({"threads": 2}, 1.0), ({"threads": 1}, 1.0)),
        (({"loaders": 2, "buffers": 0}, 1.0), ({"loaders": 1, "buffers": 2}, 1.0)),
    ],
    ids=[
        "not packed", "early", "a session for each buffer", "not fewer buffers", "not more buffers",
        "a buffer to spare beside each loader", "more where loaders have none",
        "nothing to spare where nothing is streamed", "little to read",
        "few loaders", "few threads", "few loaders, as nothing is to spare in both",
    ],
)  # fmt: skip
def test_among_equally_fast_layouts_the_one_is_taken_that_is(
    worse: tuple[dict[str, Any], float], better: tuple[dict[str, Any], float]
) -> None:
    assert _preferred(worse, better) == 1
    assert _preferred(better, worse) == 0


def test_a_first_pass_that_is_longer_by_two_percent_is_not_late() -> None:
    later, earlier = {"streamed_bytes": 5}, {"streamed_bytes": 9}
    assert _preferred((later, 1.02), (earlier, 1.0)) == 0
    assert _preferred((later, 1.021), (earlier, 1.0)) == 1


class _Chosen:
    """A choice among given layouts, whose steady passes the test tells: which one is taken, and which are simulated.

    Half a percent and a tenth become a quarter, so that products with them are exact.
    """

    def __init__(self, patch: pytest.MonkeyPatch, run_s: float = 0.0, most_threads: int = 1) -> None:
        self._patch = patch
        self._manifest = manifest_of([1])
        one = ShardTimes(session_s=0.0, run_s=run_s, loading_run_s=run_s, pack_s=0.0, packed_run_s=run_s)
        times = {threads: {"s0": one} for threads in range(1, most_threads + 1)}
        self._profile = replace(PROFILE, read_bytes_per_s={1: 2.0, 2: 4.0}, times=times)
        patch.setattr(planner, "_CLOSE", 0.25)
        patch.setattr(planner, "_FEWER_THREADS", 1.25)

    def __call__(self, *pairs: tuple[dict[str, Any], float]) -> tuple[int, list[int]]:
        """Of (fields of a layout, its steady pass) in the order in which they are looked at: their places."""
        made = [_layout(**fields) for fields, _ in pairs]
        looked_at: list[int] = []

        def simulated(_: Any, layout: Layout, *__: Any) -> Schedule:
            looked_at.append(next(place for place, one in enumerate(made) if one is layout))
            return Schedule(first_s=1.0, steady_s=pairs[looked_at[-1]][1])

        self._patch.setattr(planner, "layouts", lambda *_: iter(made))
        self._patch.setattr(planner, "_simulate", simulated)
        plan = make_plan(self._manifest, self._profile, budget_bytes=10**9, needs=Needs())
        taken = [place for place, one in enumerate(made) if one.buffer_bytes == plan.buffer_bytes]
        assert len(taken) == 1, "the test tells layouts by their buffers"
        return taken[0], looked_at


def _reads(seconds: float, number: int, **fields: Any) -> dict[str, Any]:
    """A layout that reads for so long in each pass, by one Loading Agent."""
    return {"streamed_bytes": 2 * seconds, "buffer_bytes": number, **fields}


def test_a_layout_is_simulated_unless_reading_alone_takes_longer_than_the_fastest_and_half_a_percent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose = _Chosen(monkeypatch)
    bounds = (0.0, 125.0, 125.5, 124.0, 0.0)
    pairs = [(_reads(bound, number), max(100.0, bound)) for number, bound in enumerate(bounds)]
    assert choose(*pairs)[1] == [0, 1, 3, 4]
    # By the agents that it has: two read twice as fast.
    pairs = [(_reads(0.0, 0), 100.0), (_reads(250.0, 1, loaders=2), 200.0), (_reads(251.0, 2, loaders=2), 200.0)]
    assert choose(*pairs)[1] == [0, 1]
    # Another one may be the fastest later: what was simulated before it stays for the choice.
    pairs = [(_reads(0.0, 0), 100.0), (_reads(0.0, 1), 40.0), (_reads(60.0, 2), 60.0), (_reads(50.0, 3), 50.0)]
    assert choose(*pairs)[1] == [0, 1, 3]


@pytest.mark.parametrize(("run_s", "looked_at"), [(125.0, [0, 1, 2]), (125.5, [0])])
def test_nor_where_computing_alone_takes_longer(
    monkeypatch: pytest.MonkeyPatch, run_s: float, looked_at: list[int]
) -> None:
    choose = _Chosen(monkeypatch, run_s=run_s)
    assert choose((_reads(0.0, 0), 100.0), (_reads(0.0, 1), 125.0), (_reads(1.0, 2), 125.0))[1] == looked_at


def test_of_layouts_within_half_a_percent_of_the_fastest_the_best_is_taken_and_of_slower_ones_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose = _Chosen(monkeypatch)
    fastest, close, slow = (_reads(9.0, 0), 100.0), (_reads(5.0, 1), 125.0), (_reads(1.0, 2), 125.5)
    for pairs in ((fastest, close, slow), (slow, close, fastest), (close, fastest, slow)):
        assert pairs[choose(*pairs)[0]] == close
    assert choose(fastest, slow)[0] == choose(fastest)[0] == 0
    # The one that was the fastest for a while is far from it at the end.
    assert choose((_reads(1.0, 0), 100.0), (_reads(9.0, 1), 40.0))[0] == 1


@pytest.mark.parametrize(("steady_s", "taken"), [(1.0049, 1), (1.0051, 0)])
def test_times_that_differ_by_less_than_half_a_percent_are_equal(
    monkeypatch: pytest.MonkeyPatch, steady_s: float, taken: int
) -> None:
    choose = _Chosen(monkeypatch)
    monkeypatch.undo()
    assert choose((_reads(0.5, 0), 1.0), (_reads(0.4, 1), steady_s))[0] == taken


def test_a_layout_with_fewer_threads_counts_where_it_is_faster_by_the_factor_and_one_with_all_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose = _Chosen(monkeypatch, most_threads=2)
    every = (_reads(9.0, 0, threads=2), 100.0)
    # 80 s are, by the factor of five quarters, as long as 100 s.
    assert choose(every, (_reads(1.0, 1, threads=1), 80.0))[0] == 1
    assert choose(every, (_reads(1.0, 1, threads=1), 80.5))[0] == 0
    # It would be preferred, where it read less and counted.
    assert choose(every, (_reads(1.0, 1, threads=1), 100.0))[0] == 0
    assert choose(every, (_reads(5.0, 1, threads=2), 110.0))[0] == 1
    # Others come after one that does not count.
    assert choose(every, (_reads(1.0, 1, threads=1), 90.0), (_reads(1.0, 2, threads=1), 50.0))[0] == 2


def _measured(threads: dict[int, float], share: float = 1.0) -> Profile:
    """Times of four shards of 10 MB: seconds to run each, by number of threads."""
    times = {
        count: {
            f"s{k}": ShardTimes(
                session_s=1e-3,
                run_s=seconds,
                loading_run_s=seconds,
                pack_s=1e-3,
                packed_run_s=seconds * share,
            )
            for k in range(4)
        }
        for count, seconds in threads.items()
    }
    return replace(PROFILE, read_bytes_per_s={1: 1e9}, times=times)


@pytest.mark.parametrize(("one_thread_s", "threads"), [(0.0910, 2), (0.0905, 1), (0.05, 1), (0.2, 2)])
def test_fewer_threads_are_taken_only_where_they_are_faster_by_a_tenth(one_thread_s: float, threads: int) -> None:
    manifest = manifest_of(*[[10 * MB]] * 4)
    profile = _measured({1: one_thread_s, 2: 0.1})
    plan = make_plan(manifest, profile, budget_bytes=10**9, needs=Needs())
    assert plan.threads == threads


def test_the_prediction_is_a_measured_profiles_forecast() -> None:
    manifest = manifest_of(*[[10 * MB]] * 4)
    profile = _measured({2: 0.1})
    plan = make_plan(manifest, profile, budget_bytes=10**9, needs=Needs(pass_bytes=MB), loaders=1)
    assert predict(manifest, profile, plan) == forecast(manifest, profile, plan)
    assert (plan.first_pass_s, plan.steady_pass_s) == (
        forecast(manifest, profile, plan).first_s,
        forecast(manifest, profile, plan).steady_s,
    )
    # All is read once: 10 ms each and a session; only the first is waited for.
    assert plan.first_pass_s == pytest.approx(0.011 + 4 * 0.1)
    assert plan.steady_pass_s == pytest.approx(4 * 0.1)
    assert predict(manifest, PROFILE, plan) is None
    assert forecast(manifest, PROFILE, plan).steady_s > 0


def test_a_pass_after_a_rest_reads_what_the_buffers_do_not_hold() -> None:
    manifest = manifest_of(*[[100 * MB]] * 4)
    profile = replace(_measured({1: 0.5}), read_bytes_per_s={1: 100 * MB})
    plan = _plan(buffers=2, streamed_bytes=400 * MB)
    # Two wait in buffers. The third is read once the first has run, for 0.5 s, and the fourth after it.
    session_s = profile.times[1]["s0"].session_s
    assert rested_pass_s(manifest, profile, plan) == pytest.approx(0.5 + 2 * (1 + session_s) + 0.5)
    # In a row, a pass takes the reading of all of them.
    assert forecast(manifest, profile, plan).steady_s == pytest.approx(4 * (1 + session_s))
    # What stays, or fits the buffers, is not read, whatever the disk.
    for waiting in (_plan(buffers=4, streamed_bytes=400 * MB), _plan(resident=frozenset({"s0", "s1", "s2", "s3"}))):
        assert rested_pass_s(manifest, profile, waiting) == pytest.approx(4 * 0.5)


def test_the_peak_is_the_sum_of_its_parts_and_half_a_percent_of_the_memory_for_weights_stays_free() -> None:
    manifest = manifest_of(*[[10 * MB]] * 4)
    needs = Needs(pass_bytes=3 * MB, cache_bytes=5 * MB)
    fixed = 50 * MB + 18 * MB + 8 * MB
    one = whole_bytes(manifest.shards[0]) + session_bytes(manifest.shards[0], 4)
    # Four shards that are not packed, and no buffer.
    for free, fits in ((4 * one, False), (int(4 * one / 0.995) + 2, True)):
        plan = make_plan(manifest, PROFILE, budget_bytes=fixed + free, needs=needs, threads=4)
        assert (len(plan.resident) == 4) is fits
        assert plan.process_bytes == 68 * MB
        assert plan.peak_bytes == fixed + plan.weights_bytes
        assert plan.peak_bytes <= fixed + int(free * 0.995) + 1


@pytest.mark.parametrize("blocks", [4, 40])
def test_all_of_a_model_stays_from_the_byte_on_from_which_it_fits_and_not_one_byte_below(blocks: int) -> None:
    manifest = manifest_of(*[[10 * MB]] * blocks)
    times = ShardTimes(session_s=1e-3, run_s=1e-3, loading_run_s=1e-3, pack_s=1e-3, packed_run_s=1e-3)
    profile = replace(PROFILE, read_bytes_per_s={1: 1e8}, times={4: {shard.name: times for shard in manifest.shards}})
    needs = Needs(pass_bytes=3 * MB, cache_bytes=5 * MB)
    fixed = 50 * MB + 18 * MB + 3 * MB + 5 * MB
    wanted = blocks * (whole_bytes(manifest.shards[0]) + session_bytes(manifest.shards[0], 4))
    free = next(free for free in itertools.count(int(wanted / 0.995) - 2) if free - int(free * 0.005) >= wanted)
    less, fits = (make_plan(manifest, profile, budget_bytes=fixed + nbytes, needs=needs) for nbytes in (free - 1, free))
    assert (len(fits.resident), fits.streamed_bytes, fits.buffers) == (blocks, 0, 0)
    assert less.streamed_bytes > 0
    assert fits.peak_bytes == fixed + wanted
    assert fits.weights_bytes == wanted
    assert (fits.process_bytes, fits.pass_bytes, fits.cache_bytes) == (68 * MB, 3 * MB, 5 * MB)


_SIZES = st.lists(st.lists(st.sampled_from([MB, 3 * MB, 10 * MB]), min_size=1, max_size=3), min_size=1, max_size=4)


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(
    _SIZES,
    st.floats(0, 2.5),
    st.sampled_from([1e8, 1e9, 1e10]),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([None, 1, 3]),
)
def test_no_layout_that_fits_is_better_than_the_plan(
    sizes: list[list[int]], share: float, read_bytes_per_s: float, packed_share: float, loaders: int | None
) -> None:
    """By the schedule's own figures, and in the order of preference where they are equal."""
    manifest = manifest_of(*sizes)
    times = {
        shard.name: ShardTimes(
            session_s=1e-3,
            run_s=shard.nbytes / 4e9,
            loading_run_s=shard.nbytes / 3e9,
            pack_s=shard.nbytes / 1e9,
            packed_run_s=packed_share * shard.nbytes / 4e9,
        )
        for shard in manifest.shards
    }
    profile = replace(PROFILE, read_bytes_per_s={1: read_bytes_per_s, 2: 1.5 * read_bytes_per_s}, times={2: times})
    needs = Needs(pass_bytes=MB)
    budget = least_budget_bytes(manifest, profile, needs) + int(share * manifest.weight_bytes)
    plan = make_plan(manifest, profile, budget_bytes=budget, needs=needs, loaders=loaders)
    weights = budget - 69 * MB
    weights -= int(weights * 0.005)
    rates = Rates.of(manifest, profile, None)
    every = [(one, _schedule(manifest, profile, one)) for one in layouts(manifest.shards, weights, rates, loaders)]
    fastest_s = min(schedule.steady_s for _, schedule in every)
    close = [(one, schedule) for one, schedule in every if schedule.steady_s <= fastest_s * 1.005]
    first_s = min(schedule.first_s for _, schedule in close)

    def order(pair: tuple[Layout, Schedule]) -> tuple[Any, ...]:
        layout, schedule = pair
        spare = abs(layout.buffers - layout.loaders - 1) if layout.buffers else 0
        return layout.packed, schedule.first_s > 1.02 * first_s, spare, layout.streamed_bytes, layout.loaders

    best, schedule = min(close, key=order)
    assert (plan.packed, plan.buffers, plan.loaders) == (best.packed, best.buffers, best.loaders)
    assert (plan.streamed_bytes, plan.resident, plan.peak_bytes) == (
        best.streamed_bytes,
        best.resident,
        69 * MB + best.used_bytes,
    )
    assert (plan.first_pass_s, plan.steady_pass_s) == (schedule.first_s, schedule.steady_s)


def _schedule(manifest: Manifest, profile: Profile, layout: Layout) -> Schedule:
    rates = Rates.of(manifest, profile, layout.threads)
    work = planner._work(manifest, range(len(manifest.shards)), layout, rates.times[layout.threads])
    return simulate(
        work,
        loaders=layout.loaders,
        buffers=layout.buffers,
        sessions=layout.sessions,
        read_bytes_per_s=rates.bandwidth(layout.loaders),
        threads=layout.threads,
        cores=profile.cores,
    )


# Too small a budget


def test_the_smallest_budget_is_rounded_up_to_the_next_megabyte_and_one_more() -> None:
    manifest = manifest_of([MB], [80 * MB], [3 * MB])
    needs = Needs(pass_bytes=7 * MB, cache_bytes=9 * MB)
    with pytest.raises(BudgetError) as caught:
        make_plan(manifest, PROFILE, budget_bytes=85 * MB, needs=needs)
    exact = 68 * MB + 16 * MB + int(least_bytes(manifest.shards, 4) / 0.995)
    assert caught.value.needed_bytes == (exact // MB + 2) * MB
    assert caught.value.budget_bytes == 85 * MB
    assert "the largest shard 's1' with 80.0 MB (1.0 MB were left for it)" in str(caught.value)
    assert "68.0 MB process and runtime + 7.0 MB activations + 9.0 MB caches" in str(caught.value)
    with pytest.raises(BudgetError, match=r"\(0 B were left for it\)"):
        make_plan(manifest, PROFILE, budget_bytes=10 * MB, needs=needs)


def test_the_smallest_budget_holds_the_largest_shard_and_half_a_percent() -> None:
    """Of gigabytes, which is more than the rounding hides."""
    manifest = manifest_of([MB], [2000 * MB])
    needs = Needs(pass_bytes=7 * MB, cache_bytes=9 * MB)
    exact = 68 * MB + 16 * MB + int(least_bytes(manifest.shards, 4) / 0.995)
    needed = least_budget_bytes(manifest, PROFILE, needs)
    assert needed == (exact // MB + 2) * MB
    plan = make_plan(manifest, PROFILE, budget_bytes=needed, needs=needs)
    assert (plan.buffers, plan.budget_bytes) == (1, needed)
    # Two megabytes are spare, and it is a whole number of them.
    with pytest.raises(BudgetError) as caught:
        make_plan(manifest, PROFILE, budget_bytes=exact - MB, needs=needs)
    assert caught.value.needed_bytes == needed
    assert "with 2.00 GB (2.01 GB were left for it)" in str(caught.value)


def test_the_smallest_budget_is_that_of_the_fewest_threads() -> None:
    manifest = manifest_of(*[[10 * MB]] * 4)
    profile = _measured({1: 0.1, 100: 0.1})
    with pytest.raises(BudgetError) as caught:
        make_plan(manifest, profile, budget_bytes=1, needs=Needs())
    exact = 68 * MB + int(least_bytes(manifest.shards, 1) / 0.995)
    assert caught.value.needed_bytes == (exact // MB + 2) * MB
    assert least_budget_bytes(manifest, profile, Needs()) == caught.value.needed_bytes
    # Or of those that were asked for.
    more = session_bytes(manifest.shards[0], 100) - session_bytes(manifest.shards[0], 1)
    asked = least_budget_bytes(manifest, profile, Needs(), threads=100)
    assert asked - caught.value.needed_bytes == pytest.approx(more / 0.995, abs=MB)


# The smallest budget for a latency


def _reading(read_bytes_per_s: float) -> Profile:
    """Four shards of 10 MB run for 40 ms together."""
    return replace(_measured({2: 0.01}), read_bytes_per_s={1: read_bytes_per_s})


def test_the_smallest_budget_for_a_latency_is_found_to_a_megabyte() -> None:
    manifest, profile, needs = manifest_of(*[[10 * MB]] * 4), _reading(1e8), Needs(pass_bytes=2 * MB, cache_bytes=MB)
    for latency_s in (0.401, 0.301, 0.201, 0.101, 0.041):
        plan = budget_for_latency(manifest, profile, latency_s, needs=needs, loaders=1)
        assert plan is not None
        assert (plan.steady_pass_s or 1.0) <= latency_s
        assert (plan.loaders, plan.pass_bytes, plan.cache_bytes) == (1, 2 * MB, MB)
        less = plan.budget_bytes - MB
        try:
            slower = make_plan(manifest, profile, budget_bytes=less, needs=needs, loaders=1)
        except BudgetError as error:
            assert less < error.needed_bytes  # noqa: PT017 - no plan has less
        else:
            assert (slower.steady_pass_s or 0.0) > latency_s


@pytest.mark.parametrize("times_most", [4, 7])
def test_the_search_for_a_latency_ends_at_a_megabyte_and_asks_for_whole_bytes(
    monkeypatch: pytest.MonkeyPatch, times_most: int
) -> None:
    manifest, profile = manifest_of(*[[10 * MB]] * 4), _reading(1e8)
    least = least_budget_bytes(manifest, profile, Needs())
    asked: list[int] = []

    def planned(*_: Any, budget_bytes: int, **__: Any) -> Plan:
        asked.append(budget_bytes)
        return _plan(budget_bytes=budget_bytes, steady_pass_s=1.0 if budget_bytes < least + 400_000 else 0.5)

    monkeypatch.setattr(planner, "make_plan", planned)
    monkeypatch.setattr(planner, "AMPLE_BYTES", least + 2 * MB)
    plan = budget_for_latency(manifest, profile, 0.5, needs=Needs())
    assert plan is not None
    assert asked == [least, least + 2 * MB, least + MB, plan.budget_bytes]
    assert plan.budget_bytes == least + MB
    # It goes on to a megabyte wherever it begins, by halves.
    asked.clear()
    monkeypatch.setattr(planner, "AMPLE_BYTES", times_most * least)
    plan = budget_for_latency(manifest, profile, 0.5, needs=Needs())
    assert plan is not None
    assert least + 400_000 <= plan.budget_bytes <= least + 400_000 + MB
    assert len(asked) <= 3 + math.ceil(math.log2((times_most - 1) * least / MB))
    assert all(isinstance(budget_bytes, int) for budget_bytes in asked)


def test_a_latency_that_every_budget_meets_takes_the_smallest_and_one_that_none_meets_has_none() -> None:
    manifest, profile = manifest_of(*[[10 * MB]] * 4), _reading(1e8)
    with pytest.raises(BudgetError) as caught:
        make_plan(manifest, profile, budget_bytes=1, needs=Needs())
    plan = budget_for_latency(manifest, profile, 10.0, needs=Needs())
    assert plan is not None
    assert plan.budget_bytes == caught.value.needed_bytes
    fastest_s = make_plan(manifest, profile, budget_bytes=10**9, needs=Needs()).steady_pass_s or 0.0
    assert fastest_s == pytest.approx(0.04)
    assert budget_for_latency(manifest, profile, 0.999 * fastest_s, needs=Needs()) is None
    exact = budget_for_latency(manifest, profile, fastest_s, needs=Needs())
    assert exact is not None
    assert exact.streamed_bytes == 0
