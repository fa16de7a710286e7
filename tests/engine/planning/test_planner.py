"""For any model, machine and budget: a plan that keeps to the budget, or an error that names a budget that works."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from tests.engine.plans import manifest_of, slots_bytes

from pipeload.errors import BudgetError, ConfigError
from pipeload.format.manifest import Manifest
from pipeload.format.pages import room_bytes
from pipeload.format.placement import place
from pipeload.planning import planner
from pipeload.planning.footprint import session_bytes, whole_bytes
from pipeload.planning.layouts import layouts, staying
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan, budget_for_latency, make_plan, predict, process_bytes, with_needs
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.rates import Rates

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

MB = 1_000_000
PROFILE = Profile(process_bytes=50 * MB, cores=4)
"""Not measured."""


def _measured(
    manifest: Manifest,
    *,
    read_bytes_per_s: dict[int, float] | None = None,
    cached_read_bytes_per_s: dict[int, float] | None = None,
    run_bytes_per_s: float = 10e9,
    pack_bytes_per_s: float = 1e9,
    packed_share: float = 0.9,
    loading_share: float = 1.1,
    session_s: float = 1e-3,
    threads: tuple[int, ...] = (4,),
) -> Profile:
    times = {}
    for count in threads:
        runs = {s.name: 1e-4 + s.nbytes / run_bytes_per_s * max(threads) / count for s in manifest.shards}
        times[count] = {
            shard.name: ShardTimes(
                session_s=session_s,
                run_s=runs[shard.name],
                loading_run_s=runs[shard.name] * loading_share,
                pack_s=1e-3 + shard.nbytes / pack_bytes_per_s,
                packed_run_s=runs[shard.name] * packed_share,
            )
            for shard in manifest.shards
        }
    return replace(
        PROFILE,
        read_bytes_per_s=read_bytes_per_s or {1: 1e9, 2: 1.4e9},
        cached_read_bytes_per_s=cached_read_bytes_per_s or {},
        times=times,
    )


def _plan(manifest: Manifest, budget_bytes: int, profile: Profile = PROFILE, **options: Any) -> Plan:
    return make_plan(manifest, profile, budget_bytes=budget_bytes, **{"needs": Needs(pass_bytes=MB), **options})


def _needed(manifest: Manifest, profile: Profile = PROFILE, **options: Any) -> int:
    with pytest.raises(BudgetError) as caught:
        _plan(manifest, 1, profile, **options)
    return caught.value.needed_bytes


_TENSOR = st.one_of(st.integers(1, 40 * MB), st.sampled_from([1, 4096, 65_536, MB, 10 * MB]))
_SHARD = st.one_of(st.lists(_TENSOR, min_size=0, max_size=6), st.just([4 * MB] * 5))
_SHARDS = st.one_of(
    st.lists(_SHARD, min_size=1, max_size=14),
    # Models as they are: equal blocks between smaller ends.
    st.builds(
        lambda first, block, count, last: [first, *[block] * count, last], _SHARD, _SHARD, st.integers(1, 20), _SHARD
    ),
)
_OPTIONS = st.fixed_dictionaries(
    {
        "needs": st.builds(Needs, pass_bytes=st.integers(0, 100 * MB), cache_bytes=st.integers(0, 100 * MB)),
        "loaders": st.sampled_from([None, 1, 2, 3, 8]),
        "threads": st.sampled_from([None, 1, 3]),
    }
)
_NARROW = st.sampled_from([False, False, True])
"""Whether weights are stored in 16 bits."""
_PROFILES = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {
            "read_bytes_per_s": st.sampled_from([{1: 1e9, 2: 1.4e9}, {1: 3e8}, {1: 2e9, 2: 2e9, 4: 3e9}]),
            "cached_read_bytes_per_s": st.sampled_from([{}, {1: 5e9, 2: 6e9}, {1: 1e8}]),
            "run_bytes_per_s": st.sampled_from([1e9, 4e9, 20e9]),
            "pack_bytes_per_s": st.sampled_from([5e8, 1e11]),
            "packed_share": st.sampled_from([0.3, 0.9, 1.1]),
            "loading_share": st.sampled_from([1.0, 1.5]),
            "threads": st.sampled_from([(4,), (1, 2)]),
        }
    ),
)
_SHARES = st.floats(0, 2.5)
"""Of the weights, beside the smallest budget that works."""
_settings = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def _case(
    shards: list[list[int]], measured: dict[str, Any] | None, *, narrow: bool = False
) -> tuple[Manifest, Profile]:
    manifest = manifest_of(*shards, narrow=narrow)
    return manifest, PROFILE if measured is None else _measured(manifest, **measured)


# Weights of 16 bits


def test_weights_that_fit_in_16_bits_are_not_read_and_those_that_fit_in_32_not_widened() -> None:
    blocks = [[6 * MB, MB, MB]] * 12
    manifest = manifest_of(*blocks, narrow=True)
    profile = replace(_measured(manifest, read_bytes_per_s={1: 2e8}), runtime_bytes=18 * MB)
    buffers = 3 * 16 * MB
    reads = []
    for share in (0, 0.3, 0.6, 0.9):
        plan = _plan(manifest, 100 * MB + buffers + int(share * manifest.weight_bytes), profile)
        reads.append(plan.streamed_bytes)
    assert reads == sorted(reads, reverse=True)
    stored = _plan(manifest, 100 * MB + buffers + manifest.weight_bytes, profile)
    assert stored.streamed_bytes == 0
    assert set(stored.partly_resident.values()) == {(0, 0)}
    wide = _plan(manifest, 100 * MB + 2 * manifest.weight_bytes + 40 * MB, profile)
    assert (wide.streamed_bytes, wide.buffers, len(wide.resident)) == (0, 0, 12)


def test_where_reading_costs_nothing_shards_are_resident_rather_than_widened() -> None:
    manifest = manifest_of(*[[8 * MB]] * 12, narrow=True)
    budget = 100 * MB + 6 * 17 * MB
    fast = _measured(manifest, read_bytes_per_s={1: 1e12}, session_s=0.05)
    slow = _measured(manifest, read_bytes_per_s={1: 1e8}, session_s=1e-4)
    assert len(_plan(manifest, budget, fast).resident) > len(_plan(manifest, budget, slow).resident)


def test_widening_that_computing_has_no_processors_for_is_left_out_of_a_plan() -> None:
    # One agent could widen all shards while they run, if it had a processor of its own.
    manifest = manifest_of(*[[8 * MB]] * 12, narrow=True)
    budget = 100 * MB + 9 * 17 * MB
    rates: dict[str, Any] = {"read_bytes_per_s": {1: 3e8}, "session_s": 6e-3, "run_bytes_per_s": 1e9}
    shared = replace(_measured(manifest, **rates), cores=4)
    apart = replace(shared, cores=8)
    few, many = (_plan(manifest, budget, profile, loaders=1) for profile in (apart, shared))
    assert few.streamed_bytes == 0
    assert len(many.resident) > len(few.resident)


# For anything


@_settings
@given(_SHARDS, _PROFILES, _OPTIONS, st.integers(1, 2000 * MB), _NARROW)
def test_the_predicted_peak_keeps_to_the_budget_or_the_named_budget_works(
    shards: list[list[int]], measured: dict[str, Any] | None, options: dict[str, Any], budget: int, narrow: bool
) -> None:
    manifest, profile = _case(shards, measured, narrow=narrow)
    try:
        plan = _plan(manifest, budget, profile, **options)
    except BudgetError as error:
        plan = _plan(manifest, error.needed_bytes, profile, **options)
        assert plan.budget_bytes > budget
    assert plan.peak_bytes <= plan.budget_bytes


@_settings
@given(_SHARDS, _PROFILES, _OPTIONS, _SHARES, _NARROW)
def test_a_plan_adds_up(
    shards: list[list[int]], measured: dict[str, Any] | None, options: dict[str, Any], share: float, narrow: bool
) -> None:
    manifest, profile = _case(shards, measured, narrow=narrow)
    budget = _needed(manifest, profile, **options) + int(share * manifest.weight_bytes)
    plan = _plan(manifest, budget, profile, **options)
    streamed = [shard for shard in manifest.shards if shard.name not in plan.resident]
    resident = [shard for shard in manifest.shards if shard.name in plan.resident]
    assert len(resident) == len(plan.resident)
    # Memory.
    sessions = {shard.name: session_bytes(shard, plan.threads) for shard in manifest.shards}
    weights = slots_bytes(plan, manifest.shards) + sum(whole_bytes(s) + sessions[s.name] for s in resident)
    ranges = {shard.name: plan.partly_resident.get(shard.name, (0, shard.nbytes)) for shard in streamed}
    weights += sum(room_bytes(*part) for shard in streamed for part in staying(shard, ranges[shard.name]))
    assert plan.weights_bytes == weights
    assert plan.process_bytes == process_bytes(profile)
    needs = options["needs"]
    beside = plan.process_bytes + needs.pass_bytes + needs.cache_bytes
    assert plan.peak_bytes == beside + plan.packing_bytes + weights
    assert (plan.packing_bytes > 0) == plan.packed
    # Weights.
    assert plan.streamed_bytes == sum(end - begin for begin, end in ranges.values())
    assert plan.resident_bytes + plan.streamed_bytes == manifest.weight_bytes
    # Buffers.
    assert plan.buffer_bytes % 4096 == 0
    for shard in streamed:
        assert place(shard, ranges[shard.name]).nbytes <= plan.buffer_bytes
    assert (plan.buffers == 0) == (not streamed)
    assert plan.buffers <= min(len(streamed), plan.loaders + 1)
    # The streamed range of a shard begins and ends where a tensor does, and neither it nor the rest is empty.
    assert set(plan.partly_resident) <= {shard.name for shard in streamed}
    for shard in streamed:
        if shard.name in plan.partly_resident:
            begin, end = plan.partly_resident[shard.name]
            assert shard.weights is not None
            places = {spec.offset - shard.weights.offset for spec in shard.tensors} | {shard.nbytes}
            assert {begin, end} <= places
            assert 0 < end - begin < shard.nbytes or (narrow and begin == end)
            assert not plan.packed_streamed, "a packed copy takes memory for all of the shard"
    # Numbers.
    assert plan.loaders == (options["loaders"] or plan.loaders)
    assert plan.loaders >= 1
    assert plan.threads in ([options["threads"]] if options["threads"] else profile.times or [profile.cores])
    assert (plan.steady_pass_s is not None) == (plan.first_pass_s is not None) == profile.measured


@_settings
@given(_SHARDS, _PROFILES, _OPTIONS, st.lists(_SHARES, min_size=2, max_size=5))
def test_more_budget_never_promises_a_slower_pass(
    shards: list[list[int]], measured: dict[str, Any] | None, options: dict[str, Any], shares: list[float]
) -> None:
    manifest, profile = _case(shards, measured or {})
    needed = _needed(manifest, profile, **options)
    budgets = [needed + int(share * manifest.weight_bytes) for share in sorted(shares)]
    seconds = [_plan(manifest, budget, profile, **options).steady_pass_s or 0.0 for budget in budgets]
    # A shard that becomes resident needs a session, whose memory might have kept a beginning of another shard.
    sessions_s = sum(session_bytes(shard, 4) for shard in manifest.shards) / profile.read_bytes_per_s[1]
    for less, more in pairwise(seconds):
        # Plans that are equally fast may differ by half a percent.
        assert more <= less * 1.0051 + sessions_s


@pytest.mark.slow
@_settings
@given(_SHARDS, _PROFILES, _OPTIONS, _SHARES)
def test_a_plan_is_a_pure_function(
    shards: list[list[int]], measured: dict[str, Any] | None, options: dict[str, Any], share: float
) -> None:
    def outcome() -> Any:
        manifest, profile = _case(shards, measured)
        try:
            return _plan(manifest, int(share * (100 * MB + manifest.weight_bytes)) + 1, profile, **options)
        except BudgetError as error:
            return str(error)

    assert outcome() == outcome()


@_settings
@given(_SHARDS, _PROFILES, _OPTIONS, _SHARES)
def test_a_prediction_made_later_is_the_plans_own(
    shards: list[list[int]], measured: dict[str, Any] | None, options: dict[str, Any], share: float
) -> None:
    manifest, profile = _case(shards, measured)
    budget = _needed(manifest, profile, **options) + int(share * manifest.weight_bytes)
    plan = _plan(manifest, budget, profile, **options)
    predicted = predict(manifest, profile, plan)
    if measured is None:
        assert predicted is None
    else:
        assert predicted is not None
        assert (predicted.first_s, predicted.steady_s) == (plan.first_pass_s, plan.steady_pass_s)


@pytest.mark.slow
@_settings
@given(_SHARDS, _PROFILES, _OPTIONS, _SHARES, st.integers(0, 10**9), st.integers(0, 10**9), st.integers(1, 10**10))
def test_other_needs_keep_the_layout(
    shards: list[list[int]],
    measured: dict[str, Any] | None,
    options: dict[str, Any],
    share: float,
    pass_bytes: int,
    cache_bytes: int,
    budget: int,
) -> None:
    manifest, profile = _case(shards, measured)
    needed = _needed(manifest, profile, **options)
    plan = _plan(manifest, needed + int(share * manifest.weight_bytes), profile, **options)
    grown = replace(profile, process_bytes=profile.process_bytes + 7)
    other = with_needs(plan, grown, Needs(pass_bytes=pass_bytes, cache_bytes=cache_bytes), budget)
    assert other.layout == plan.layout
    assert other.weights_bytes == plan.weights_bytes
    assert (other.pass_bytes, other.cache_bytes, other.budget_bytes) == (pass_bytes, cache_bytes, budget)
    before = plan.process_bytes + plan.pass_bytes + plan.cache_bytes
    assert other.peak_bytes - plan.peak_bytes == process_bytes(grown) + pass_bytes + cache_bytes - before


# Budgets, in particular

BLOCKS = [[4 * MB, 4 * MB, 4 * MB, 4 * MB, 17 * MB, 17 * MB]] * 12
"""As a transformer's: four matrices of attention, two of the feed-forward part."""


def test_every_byte_of_budget_saves_reading_until_nothing_is_read() -> None:
    manifest = manifest_of([2 * MB], *BLOCKS, [3 * MB])
    profile = _measured(manifest)
    plans = [_plan(manifest, budget, profile) for budget in range(_needed(manifest, profile), 900 * MB, 5 * MB)]
    seconds = [plan.steady_pass_s or 0.0 for plan in plans]
    for less, more in pairwise(seconds):
        assert more <= less * 1.0051
    assert {plan.buffers for plan in plans} >= {0, 1, 2}
    assert any(plan.partly_resident for plan in plans)
    assert not plans[-1].streamed_bytes
    # No cliff: between two budgets a pass never gets faster by more than twice the time of reading their difference.
    reading = [seconds[k] - seconds[k + 1] for k in range(len(seconds) - 1) if plans[k + 1].streamed_bytes]
    assert max(reading[3:]) <= 0.15 * seconds[0]


def test_when_everything_fits_nothing_is_streamed() -> None:
    for profile in (PROFILE, _measured(manifest_of(*BLOCKS))):
        plan = _plan(manifest_of(*BLOCKS), 3000 * MB, profile)
        assert plan.packed
        assert plan.resident == {f"s{k}" for k in range(12)}
        assert (plan.streamed_bytes, plan.buffers, plan.buffer_bytes, plan.partly_resident) == (0, 0, 0, {})


def test_where_the_packed_copies_of_all_shards_fit_nothing_else_is_looked_at() -> None:
    manifest = manifest_of(*BLOCKS)
    rates = Rates.of(manifest, _measured(manifest), None)
    packed = next(one.used_bytes for one in layouts(manifest.shards, 3000 * MB, rates, None) if one.packed)
    assert any(one.buffers for one in layouts(manifest.shards, packed - 1, rates, None))
    assert not any(one.buffers for one in layouts(manifest.shards, packed, rates, None))


def test_packing_that_gains_nothing_is_left_alone() -> None:
    manifest = manifest_of(*BLOCKS)
    assert not _plan(manifest, 3000 * MB, _measured(manifest, packed_share=1.0)).packed


def test_what_fits_without_packing_stays_resident() -> None:
    manifest = manifest_of(*[[50 * MB]] * 4)
    packed = min(budget for budget in range(250 * MB, 500 * MB, MB) if _plan(manifest, budget).packed)
    plan = _plan(manifest, packed - MB)
    assert not plan.packed
    assert plan.streamed_bytes == 0


def test_the_smallest_budget_holds_one_buffer_for_the_largest_shard() -> None:
    manifest = manifest_of([MB], [80 * MB], [3 * MB])
    plan = _plan(manifest, _needed(manifest))
    assert plan.buffers == 1
    assert plan.buffer_bytes >= 80 * MB


def test_too_small_a_budget_names_what_it_is_made_of() -> None:
    manifest = manifest_of([MB], [80 * MB], [3 * MB])
    with pytest.raises(BudgetError) as caught:
        _plan(manifest, 100 * MB, needs=Needs(pass_bytes=7 * MB, cache_bytes=9 * MB))
    assert caught.value.budget_bytes == 100 * MB
    for words in ("100.0 MB", "'s1'", "80.0 MB", "7.0 MB activations", "9.0 MB caches", str(caught.value.needed_bytes)):
        assert words in str(caught.value)


def test_the_session_of_a_large_graph_is_counted() -> None:
    """A block of many experts has thousands of operators, and its session takes megabytes beside the weights."""
    small = manifest_of([MB], [80 * MB], [3 * MB])
    *others, last = small.shards
    large = replace(small, shards=(*others, replace(last, graph=replace(last.graph, nbytes=200_000))))
    more = session_bytes(large.shards[-1], 1) - session_bytes(last, 1)
    assert more > 4 * MB
    assert _needed(large) - _needed(small) == pytest.approx(more, abs=MB)


def test_the_named_budget_is_not_far_above_what_is_needed() -> None:
    manifest = manifest_of([MB], [80 * MB], [3 * MB])
    needed = _needed(manifest)
    # Two megabytes are spare, and it is a whole number of them.
    assert needed - (process_bytes(PROFILE) + MB + 80 * MB + session_bytes(manifest.shards[1], 1)) <= 4 * MB
    with pytest.raises(BudgetError):
        _plan(manifest, needed - 3 * MB)


def test_small_shards_are_resident_before_large_ones() -> None:
    manifest = manifest_of([MB], *[[50 * MB]] * 12, [2 * MB])
    found = [_plan(manifest, budget).resident for budget in range(_needed(manifest), 900 * MB, 10 * MB)]
    assert any(found)
    for resident in found:
        assert not resident - {"s0", "s13"} or {"s0", "s13"} <= resident


@pytest.mark.parametrize("count", [4, 7, 12, 24])
def test_resident_shards_are_spread_evenly(count: int) -> None:
    manifest = manifest_of(*[[50 * MB]] * count)
    for budget in range(_needed(manifest), 60 * MB * (count + 4), 50 * MB):
        plan = _plan(manifest, budget)
        resident = sorted(int(name[1:]) for name in plan.resident)
        if not 0 < len(resident) < count:
            continue
        # Passes follow one another, so the distance goes round.
        gaps = [(b - a - 1) % count for a, b in zip(resident, [*resident[1:], resident[0] + count], strict=True)]
        fair = (count - len(resident)) / len(resident)
        assert max(gaps) <= 2 * fair + 2, f"{resident} of {count}"


def test_weights_that_are_far_better_packed_are_packed_by_the_loaders_where_memory_allows() -> None:
    manifest = manifest_of(*[[50 * MB]] * 12)
    profile = _measured(manifest, run_bytes_per_s=5e7, pack_bytes_per_s=1e9, packed_share=0.05)
    plan = _plan(manifest, 400 * MB, profile)
    assert plan.packed_streamed
    assert plan.partly_resident == {}
    # Where there is room for one buffer and no copy, it still works.
    tight = _plan(manifest, _needed(manifest, profile), profile)
    assert not tight.packed_streamed
    assert (tight.steady_pass_s or 0) > (plan.steady_pass_s or 0)


# The machine


def test_loaders_and_threads_are_as_asked_for() -> None:
    manifest = manifest_of(*[[50 * MB]] * 12)
    plan = _plan(manifest, 400 * MB, loaders=3, threads=1)
    assert (plan.loaders, plan.threads) == (3, 1)
    assert 1 <= plan.buffers <= 4


def test_as_many_loaders_as_the_bandwidth_needs() -> None:
    manifest = manifest_of(*[[10 * MB]] * 24)
    for bandwidth, loaders in (({1: 1e9, 2: 1e9}, 1), ({1: 1e9, 2: 2e9}, 2)):
        profile = _measured(manifest, read_bytes_per_s=bandwidth, loading_share=1.0, session_s=0.0)
        assert _plan(manifest, _needed(manifest, profile) + 40 * MB, profile).loaders == loaders


@pytest.mark.parametrize("past", [{3: 1e9}, {8: 1e9, 3: 1e9}, {}])
def test_numbers_of_agents_that_nobody_else_measures_will_do(past: dict[int, float]) -> None:
    manifest = manifest_of(*BLOCKS)
    profile = replace(_measured(manifest), read_bytes_per_s=past, cached_read_bytes_per_s={} if past else {3: 1e9})
    assert _plan(manifest, 200 * MB, profile).loaders == 3


def test_the_page_cache_is_used_where_it_is_faster() -> None:
    manifest = manifest_of(*BLOCKS)
    for cached, direct in (({1: 1.05e9}, True), ({1: 3e9}, False)):
        profile = _measured(manifest, read_bytes_per_s={1: 1e9}, cached_read_bytes_per_s=cached)
        assert _plan(manifest, 200 * MB, profile).direct is direct


def test_the_fastest_number_of_threads_is_taken() -> None:
    manifest = manifest_of(*BLOCKS)
    assert _plan(manifest, 2000 * MB, _measured(manifest, threads=(1, 2))).threads == 2


def test_times_of_a_number_of_threads_that_nobody_measured_are_those_of_the_nearest() -> None:
    manifest = manifest_of(*BLOCKS)
    profile = _measured(manifest, threads=(1, 4))
    assert planner.times_of(manifest, profile, 3) == profile.times[4]
    assert _plan(manifest, 200 * MB, profile, threads=3).threads == 3


def test_a_profile_of_another_model_is_refused() -> None:
    profile = _measured(manifest_of(*BLOCKS[:-1]))
    with pytest.raises(ConfigError, match=rf"no times of shard 's{len(BLOCKS) - 1}'.*pipeload profile"):
        _plan(manifest_of(*BLOCKS), 2000 * MB, profile)


# The smallest budget for a latency


@pytest.mark.parametrize("share", [1.0, 0.8, 0.5, 0.2, 0.0])
def test_the_smallest_budget_for_a_latency_is_found(share: float) -> None:
    manifest = manifest_of([MB], *BLOCKS, [2 * MB])
    profile = _measured(manifest)
    slowest = _plan(manifest, _needed(manifest, profile), profile).steady_pass_s or 0.0
    fastest = _plan(manifest, 5000 * MB, profile).steady_pass_s or 0.0
    target = fastest + share * (slowest - fastest)
    plan = budget_for_latency(manifest, profile, target * 1.006, needs=Needs(pass_bytes=MB))
    assert plan is not None
    assert plan.steady_pass_s is not None
    assert plan.steady_pass_s <= target * 1.006
    if plan.budget_bytes > _needed(manifest, profile) + MB:
        less = _plan(manifest, plan.budget_bytes - MB, profile).steady_pass_s
        assert less is not None
        assert less > target * 1.006


def test_a_latency_that_no_budget_reaches_is_none() -> None:
    manifest = manifest_of(*BLOCKS)
    profile = _measured(manifest)
    assert budget_for_latency(manifest, profile, 1e-6, needs=Needs(pass_bytes=MB)) is None


def test_a_latency_that_is_always_met_takes_the_smallest_budget() -> None:
    manifest = manifest_of(*BLOCKS)
    profile = _measured(manifest)
    needs = Needs(pass_bytes=MB, cache_bytes=3 * MB)
    plan = budget_for_latency(manifest, profile, 1e6, needs=needs, loaders=2, threads=4)
    assert plan is not None
    assert plan.budget_bytes == _needed(manifest, profile, needs=needs)
    assert (plan.loaders, plan.threads, plan.cache_bytes) == (2, 4, 3 * MB)
