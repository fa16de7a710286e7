"""Between passes: the plan stays while nothing speaks against it, memory is given back at once and taken slowly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.engine.plans import manifest_of

from pipeload.errors import BudgetError
from pipeload.format.manifest import Manifest
from pipeload.machine.memory import Peak
from pipeload.planning import planner
from pipeload.planning.footprint import least_bytes
from pipeload.planning.learning import learn
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.replanner import Replanner
from pipeload.tracing.trace import Kind, Span

pytestmark = pytest.mark.measures("memory", "times")
"""Figures are given; the engine finds none out here."""

MB = 1_000_000
PROCESS = 50 * MB
NEEDS = Needs(pass_bytes=10 * MB)
MANIFEST = manifest_of(*[[20 * MB, 20 * MB]] * 10)
PATIENCE = 8
WINDOW = 16


def _times(run_s: float, *, packed_s: float | None = None) -> ShardTimes:
    packed_s = run_s if packed_s is None else packed_s
    return ShardTimes(session_s=1e-3, run_s=run_s, loading_run_s=run_s, pack_s=0.1, packed_run_s=packed_s)


def _profile(manifest: Manifest = MANIFEST, *, run_s: float = 1e-3, bandwidth: float = 1e9, **times: Any) -> Profile:
    """Reading takes by far the longest, and packing gains nothing."""
    shards = {shard.name: _times(run_s, **times) for shard in manifest.shards}
    return Profile(process_bytes=PROCESS, cores=1, read_bytes_per_s={1: bandwidth, 2: bandwidth}, times={1: shards})


class _Case:
    """A replanner, the plan in force, and the free memory."""

    def __init__(
        self, budget: int | None = 300 * MB, profile: Profile | None = None, *, free: int = 10**12, **options: Any
    ) -> None:
        self.free = free
        self.replanner = Replanner(
            MANIFEST, profile or _profile(), budget_bytes=budget, free_bytes=lambda: self.free, **options
        )
        self.plan = self.replanner.plan(NEEDS)

    @property
    def quiet(self) -> int:
        """Memory of the process, without weights and caches, as planned."""
        return planner.process_bytes(self.replanner.profile)

    def pass_(self, needs: Needs = NEEDS, occupied: int | None = None) -> Plan:
        self.plan = self.replanner.before_pass(self.plan, needs, self.quiet if occupied is None else occupied)
        return self.plan

    def ask(self, budget: int | None) -> Plan:
        """Another budget, and the plan of the next pass."""
        with self.replanner.trying(budget):
            return self.pass_()


def _span(kind: Kind, shard: str, begin_s: float, end_s: float, nbytes: int = 0, agent: str = "inference") -> Span:
    return Span(agent=agent, kind=kind, shard=shard, begin_s=begin_s, end_s=end_s, nbytes=nbytes)


# Nothing changed


def test_the_plan_stays_when_nothing_changed() -> None:
    case = _Case()
    first = case.plan
    for _ in range(5 * PATIENCE):
        assert case.pass_() == first


@pytest.mark.parametrize("share", [0.996, 0.999, 1.0])
def test_free_memory_that_swings_a_little_changes_nothing(share: float) -> None:
    case = _Case()
    first = case.plan
    for _ in range(2 * PATIENCE):
        case.free = int(first.budget_bytes * share)
        assert case.pass_() == first


def test_memory_that_others_leave_beyond_the_budget_is_not_taken() -> None:
    case = _Case(budget=200 * MB)
    for _ in range(3 * PATIENCE):
        assert case.pass_().budget_bytes == 200 * MB


# Budgets


def test_a_smaller_budget_takes_effect_with_the_next_pass() -> None:
    case = _Case(budget=400 * MB)
    before = case.plan
    after = case.ask(200 * MB)
    assert after.peak_bytes <= after.budget_bytes == 200 * MB
    assert after.streamed_bytes > before.streamed_bytes


def test_a_larger_budget_takes_effect_with_the_next_pass() -> None:
    case = _Case(budget=200 * MB)
    before = case.plan
    after = case.ask(400 * MB)
    assert after.budget_bytes == 400 * MB
    assert after.streamed_bytes < before.streamed_bytes


def test_a_look_for_a_better_plan_refuses_no_pass_that_the_plan_in_force_has_room_for() -> None:
    # New plans leave half a percent of the weights' memory free, in which this pass still fits.
    least = planner.process_bytes(_profile()) + NEEDS.pass_bytes + int(least_bytes(MANIFEST.shards, 1) / 0.995) + 2
    case = _Case(budget=least)
    more = replace(NEEDS, pass_bytes=NEEDS.pass_bytes + 1000)
    with pytest.raises(BudgetError):
        case.replanner.plan(more)
    case.replanner._reason = "learned"
    before = case.plan
    assert case.pass_(more).layout == before.layout
    assert case.pass_(more).peak_bytes <= least


def test_a_larger_budget_that_gains_nothing_keeps_the_shards() -> None:
    case = _Case(budget=1000 * MB)
    before = case.plan
    assert not before.streamed_bytes
    after = case.ask(2000 * MB)
    assert (after.layout, after.budget_bytes) == (before.layout, 2000 * MB)


def test_a_budget_that_cannot_work_is_refused_and_the_old_one_stays() -> None:
    case = _Case()
    first = case.plan
    with pytest.raises(BudgetError):
        case.ask(60 * MB)
    assert case.pass_() == first


def test_free_memory_that_cannot_work_is_refused_and_the_old_budget_stays() -> None:
    case = _Case()
    first, case.free = case.plan, 60 * MB
    with pytest.raises(BudgetError), case.replanner.trying(None):
        case.replanner.before_pass(case.plan, NEEDS, case.quiet, strict=True)
    case.free = 10**12
    assert case.pass_() == first


def test_loaders_and_threads_stay_as_asked_for() -> None:
    case = _Case(loaders=2, threads=3)
    plan = case.ask(500 * MB)
    assert (case.plan.loaders, case.plan.threads) == (plan.loaders, plan.threads) == (2, 3)


# Free memory


def test_memory_that_becomes_short_is_given_back_at_once_and_for_as_long() -> None:
    case = _Case(budget=400 * MB)
    before = case.plan
    case.free = 200 * MB
    assert case.replanner.limit_bytes(case.plan) == 200 * MB
    for _ in range(5 * PATIENCE):
        plan = case.pass_()
        assert plan.peak_bytes <= plan.budget_bytes <= 200 * MB
        assert plan.streamed_bytes > before.streamed_bytes
        assert case.replanner.limit_bytes(plan) <= 200 * MB


def test_memory_that_shrinks_in_small_steps_is_followed() -> None:
    case = _Case(budget=400 * MB)
    while case.free > 200 * MB:
        case.free = int(case.plan.budget_bytes * 0.97)
        assert case.pass_().peak_bytes <= case.free


def test_memory_that_comes_back_is_taken_after_some_passes() -> None:
    case = _Case(budget=400 * MB)
    first = case.plan
    case.free = 200 * MB
    short = case.pass_()
    case.free = 10**12
    passes = 0
    while case.pass_().layout == short.layout:
        passes += 1
        assert passes <= 2 * PATIENCE, "the room is never taken"
    assert passes >= PATIENCE - 2
    assert case.plan == first


def test_memory_that_comes_back_for_a_moment_is_not_taken() -> None:
    case = _Case(budget=400 * MB)
    case.free = 200 * MB
    short = case.pass_()
    for _ in range(5):
        for _ in range(2 * PATIENCE):
            case.free = 200 * MB
            assert case.pass_().layout == short.layout
        for _ in range(PATIENCE // 2):
            case.free = 10**12
            assert case.pass_().layout == short.layout


def test_memory_that_comes_back_in_part_is_taken_in_part() -> None:
    case = _Case(budget=400 * MB)
    case.free = 200 * MB
    short = case.pass_()
    case.free = 300 * MB
    for _ in range(3 * PATIENCE):
        assert case.pass_().peak_bytes <= 300 * MB
    assert case.plan.streamed_bytes < short.streamed_bytes


def test_memory_that_the_first_pass_has_left_free_is_taken_once() -> None:
    """Pages of libraries may be charged to no process: the free memory then grows when the first pass touches them."""
    case = _Case(budget=None, free=316 * MB)
    before = case.plan

    def pass_and_look() -> bool:
        plan = case.pass_()
        spans = _pass_spans(plan, run_s=1e-3, bandwidth=1e9)
        return case.replanner.after_pass(plan, spans, plan.steady_pass_s or 0.0, None)

    assert pass_and_look()
    case.free += 12 * MB
    taken = case.pass_()
    assert taken.budget_bytes == 328 * MB * 995 // 1000
    assert taken.streamed_bytes < before.streamed_bytes
    case.free += 12 * MB
    for _ in range(3 * PATIENCE):
        assert not pass_and_look()
        assert case.plan == taken


def test_room_that_only_saves_reading_is_used_too() -> None:
    # Computing takes longest: with more memory a pass is no faster.
    case = _Case(budget=400 * MB, profile=_profile(run_s=1.0))
    case.free = 200 * MB
    short = case.pass_()
    case.free = 10**12
    for _ in range(PATIENCE):
        case.pass_()
    assert case.plan.streamed_bytes < short.streamed_bytes
    assert case.plan.budget_bytes - case.plan.peak_bytes < 21 * MB  # a shard has 20 MB


def test_room_that_had_to_be_given_back_is_taken_later_the_next_time() -> None:
    case = _Case(budget=400 * MB)

    def passes_until_room_is_taken() -> int:
        large = case.pass_(Needs(pass_bytes=100 * MB))
        return next(number for number in range(1, 200) if case.pass_().layout != large.layout)

    first, second, third = (passes_until_room_is_taken() for _ in range(3))
    assert first == WINDOW + PATIENCE - 1
    assert second == first + PATIENCE
    assert third == first + 3 * PATIENCE


def test_less_than_the_least_that_works_is_answered_with_the_least_that_works() -> None:
    case = _Case(budget=400 * MB)
    case.free = 10 * MB
    plan = case.pass_()
    assert plan.buffers == 1
    assert plan.budget_bytes <= 400 * MB
    with pytest.raises(BudgetError) as caught:
        planner.make_plan(MANIFEST, _profile(), budget_bytes=1, needs=NEEDS)
    assert plan.peak_bytes <= caught.value.needed_bytes


# The host


def test_a_strict_pass_is_refused_where_another_one_would_be_answered_with_the_least_that_works() -> None:
    case = _Case(budget=None, free=300 * MB)
    case.free = 60 * MB
    with pytest.raises(BudgetError):
        case.replanner.before_pass(case.plan, NEEDS, case.quiet, strict=True)
    assert case.pass_().budget_bytes > case.free


def test_a_host_that_grows_gets_its_memory() -> None:
    case = _Case(budget=400 * MB)
    before = case.plan
    plan = case.pass_(occupied=case.quiet + NEEDS.pass_bytes + 100 * MB)
    assert plan.peak_bytes <= 400 * MB
    assert plan.process_bytes == before.process_bytes + 100 * MB
    assert plan.streamed_bytes > before.streamed_bytes
    # It is counted once.
    assert case.pass_(occupied=case.quiet + NEEDS.pass_bytes).process_bytes == plan.process_bytes


def test_what_a_host_gives_back_is_used_again_but_never_what_the_process_began_with() -> None:
    case = _Case(budget=400 * MB)
    before, quiet = case.plan, case.quiet
    case.pass_(occupied=quiet + NEEDS.pass_bytes + 100 * MB)
    for _ in range(2 * PATIENCE):
        case.pass_(occupied=quiet + 5 * MB)
    assert case.plan.process_bytes == before.process_bytes + 5 * MB
    for _ in range(2 * PATIENCE):
        case.pass_(occupied=quiet - 60 * MB)
    assert case.plan == before


def test_what_a_pass_left_in_the_heap_is_no_growth() -> None:
    case = _Case()
    first = case.plan
    assert case.pass_(occupied=case.quiet + NEEDS.pass_bytes) == first
    assert case.pass_(occupied=case.quiet + NEEDS.pass_bytes + MB) == first


# The peak of the process


def _peaks(case: _Case, beyond: int, passes: int, *, complete: bool = True) -> int:
    """Passes whose peak leaves the plan by some bytes. Returns by how much the figure for the runtime changed."""
    before = planner.runtime_bytes(case.replanner.profile)
    for _ in range(passes):
        peak = case.plan.peak_bytes + beyond
        case.replanner.correct(case.plan, Peak(peak, peak), NEEDS.pass_bytes, complete=complete)
    return planner.runtime_bytes(case.replanner.profile) - before


def test_a_process_that_outgrows_its_plan_gets_another_one_before_it_outgrows_its_budget() -> None:
    case = _Case()
    before = case.plan
    room = before.budget_bytes - before.peak_bytes
    assert _peaks(case, room - 100_000, 1) == room - 100_000
    plan = case.pass_()
    assert plan.process_bytes == before.process_bytes + room - 100_000
    assert plan.weights_bytes < before.weights_bytes
    assert plan.peak_bytes <= plan.budget_bytes * 0.99


def test_what_a_host_takes_for_a_moment_moves_the_plan_by_a_little_at_most() -> None:
    case = _Case()
    assert 0 < _peaks(case, 500 * MB, 1) <= 0.02 * 300 * MB


def test_a_process_that_no_smaller_plan_would_help_goes_on_as_it_is() -> None:
    with pytest.raises(BudgetError) as caught:
        _Case(budget=1)
    case = _Case(budget=caught.value.needed_bytes)
    before = case.plan
    _peaks(case, 5 * MB, 20)
    assert case.pass_().layout == before.layout


def test_memory_that_passes_leave_is_used_when_some_have_left_it() -> None:
    case = _Case(budget=400 * MB)
    before = case.plan
    assert not _peaks(case, -9 * MB, PATIENCE - 1)
    assert _peaks(case, -9 * MB, 1) == -9 * MB + 2 * MB  # half a percent of the budget stays
    for _ in range(PATIENCE):
        case.pass_()
    assert case.plan.peak_bytes <= case.plan.budget_bytes
    assert case.plan.process_bytes == before.process_bytes - 7 * MB
    assert case.replanner.learned is not None
    assert case.replanner.learned.runtime_bytes == planner.runtime_bytes(case.replanner.profile)


def test_room_that_a_correction_finds_is_taken_at_once_unless_it_was_given_back_before() -> None:
    case = _Case(budget=400 * MB)
    before = case.plan
    _peaks(case, -30 * MB, PATIENCE)
    after = case.pass_()
    assert after.streamed_bytes < before.streamed_bytes
    # It was too much: the process outgrows the plan, and has another one before it outgrows the budget.
    for _ in range(2):
        _peaks(case, case.plan.budget_bytes - case.plan.peak_bytes - 100_000, 1)
        given_back = case.pass_()
    assert given_back.streamed_bytes > after.streamed_bytes
    _peaks(case, -30 * MB, PATIENCE)
    assert case.pass_().layout == given_back.layout
    for _ in range(2 * PATIENCE):
        case.pass_()
    assert case.plan.streamed_bytes < given_back.streamed_bytes


def test_a_small_budget_leaves_what_the_heap_may_take_in_one_pass() -> None:
    """Python's arenas have 1 MiB: half a percent of 128 MB is less, and 2,000 passes went over it."""
    case = _Case(budget=150 * MB)
    assert _peaks(case, -9 * MB, PATIENCE) == pytest.approx(-9 * MB + 1.5 * MB)
    # No correction for what little more than that is left: the next one would be back at once.
    assert not _peaks(case, -2 * MB, 3 * PATIENCE)


def test_memory_that_is_not_filled_yet_is_not_left() -> None:
    case = _Case()
    assert not _peaks(case, -30 * MB, 3 * PATIENCE, complete=False)


def test_a_measured_runtime_takes_the_place_of_the_assumed_one() -> None:
    assumed = planner.process_bytes(_profile()) - PROCESS
    assert planner.process_bytes(replace(_profile(), runtime_bytes=11 * MB)) == PROCESS + 11 * MB
    # Measured where a model had run before.
    assert planner.process_bytes(replace(_profile(), runtime_bytes=MB)) == PROCESS + assumed


# Needs


def test_a_pass_that_needs_more_makes_shards_leave_and_they_stay_away_for_a_while() -> None:
    case = _Case(budget=300 * MB)
    before = case.plan
    large = case.pass_(Needs(pass_bytes=100 * MB))
    assert large.streamed_bytes > before.streamed_bytes
    assert large.pass_bytes == 100 * MB
    for _ in range(WINDOW - 1):
        # Memory that was needed once may be needed again.
        assert case.pass_().layout == large.layout
        assert case.plan.pass_bytes == 100 * MB
    for _ in range(2 * PATIENCE):
        case.pass_()
    assert case.plan.pass_bytes == before.pass_bytes
    assert case.plan.streamed_bytes == before.streamed_bytes


def test_needs_of_different_kinds_are_planned_for_together_while_they_fit() -> None:
    case = _Case(budget=300 * MB)
    case.pass_(Needs(pass_bytes=80 * MB))
    plan = case.pass_(Needs(pass_bytes=10 * MB, cache_bytes=60 * MB))
    assert (plan.pass_bytes, plan.cache_bytes) == (80 * MB, 60 * MB)


def test_what_was_needed_once_gives_way_when_it_is_in_the_way() -> None:
    case = _Case(budget=300 * MB)
    case.pass_(Needs(pass_bytes=150 * MB))
    plan = case.pass_(Needs(pass_bytes=10 * MB, cache_bytes=100 * MB))
    assert (plan.pass_bytes, plan.cache_bytes) == (10 * MB, 100 * MB)
    assert plan.peak_bytes <= 300 * MB


def test_a_pass_that_does_not_fit_is_refused_and_hinders_nobody() -> None:
    case = _Case()
    first = case.plan
    for _ in range(3):
        with pytest.raises(BudgetError) as caught:
            case.pass_(Needs(pass_bytes=1000 * MB))
        assert caught.value.needed_bytes > 1000 * MB
        assert case.pass_() == first


# Learning


def _pass_spans(
    plan: Plan, *, run_s: float, bandwidth: float, session_s: float = 1e-3, names: Sequence[str] | None = None
) -> list[Span]:
    """A pass in which everything happens one after the other."""
    spans, now = [], 100.0
    for shard in MANIFEST.shards:
        if names is not None and shard.name not in names:
            continue
        if shard.name not in plan.resident:
            begin, end = plan.partly_resident.get(shard.name, (0, shard.nbytes))
            nbytes = end - begin
            spans.append(_span("read", shard.name, now, now + nbytes / bandwidth, nbytes, agent="loader-0"))
            now = spans[-1].end_s
            spans.append(_span("session", shard.name, now, now + session_s, agent="loader-0"))
            now = spans[-1].end_s
        spans.append(_span("run", shard.name, now, now + run_s))
        now = spans[-1].end_s
    return spans


def test_bandwidth_is_what_was_read_while_anybody_read() -> None:
    plan = _Case().plan
    # Two at once: 80 MB in 0.05 s, with a pause that does not count.
    spans = [
        _span("read", "s0", 0.0, 0.04, 40 * MB, "loader-0"),
        _span("read", "s1", 0.01, 0.05, 40 * MB, "loader-1"),
        _span("read", "s2", 1.0, 1.05, 80 * MB, "loader-1"),
    ]
    profile = learn(MANIFEST, replace(_profile(), read_bytes_per_s={1: 1e9, 2: 2e9}), replace(plan, loaders=2), spans)
    # Times seen with two agents hold for one as well.
    assert profile.read_bytes_per_s == pytest.approx({1: 0.8e9, 2: 1.6e9})
    assert profile.cached_read_bytes_per_s == {}


def test_bandwidth_through_the_page_cache_is_another_one() -> None:
    plan = replace(_Case().plan, direct=False, loaders=1)
    before = replace(_profile(), cached_read_bytes_per_s={1: 1e9})
    profile = learn(MANIFEST, before, plan, [_span("read", "s0", 0.0, 0.02, 40 * MB)])
    assert profile.cached_read_bytes_per_s == pytest.approx({1: 2e9})
    assert profile.read_bytes_per_s == before.read_bytes_per_s


def test_a_pass_that_only_widens_tells_nothing_of_the_disk() -> None:
    spans = [_span("run", "s0", 0.0, 0.1), _span("widen", "s0", 0.0, 0.1, agent="loader-0")]
    plan = replace(_Case().plan, loaders=1)
    for known in ({}, {1: 5e8}):
        found = learn(MANIFEST, replace(_profile(), read_bytes_per_s=known), plan, spans).read_bytes_per_s
        assert found == known if known else min(found.values()) > 0


def test_a_disk_that_rests_while_weights_are_widened_sustains_less_than_it_reads() -> None:
    plan = replace(_Case().plan, loaders=1)
    spans = [_span("run", "s0", 0.0, 0.4)]
    for number in range(4):
        begin = number / 10
        spans.append(_span("read", f"s{number}", begin, begin + 0.07, 40 * MB, "loader-0"))
        spans.append(_span("widen", f"s{number}", begin + 0.07, begin + 0.1, 0, "loader-0"))
    profile = learn(MANIFEST, replace(_profile(), read_bytes_per_s={1: 1e9}), plan, spans)
    assert profile.read_bytes_per_s[1] == pytest.approx(40 * MB / 0.1)
    # Where another agent reads meanwhile, nothing rests.
    spans += [_span("read", f"s{k + 5}", k / 10 + 0.07, k / 10 + 0.1, 20 * MB, "loader-1") for k in range(4)]
    profile = learn(MANIFEST, replace(_profile(), read_bytes_per_s={1: 1e9, 2: 1e9}), replace(plan, loaders=2), spans)
    assert profile.read_bytes_per_s[2] == pytest.approx(60 * MB / 0.1)


def test_a_few_bytes_say_nothing_about_the_bandwidth() -> None:
    profile = learn(MANIFEST, _profile(), _Case().plan, [_span("read", "s0", 0.0, 1.0, 1000)])
    assert profile.read_bytes_per_s == _profile().read_bytes_per_s


def test_a_run_that_was_not_packed_scales_all_run_times() -> None:
    plan = _Case().plan
    assert "s3" not in plan.resident
    before = _profile(packed_s=8e-4)
    after = learn(MANIFEST, before, plan, [_span("run", "s3", 0, 2e-3), _span("session", "s3", 0, 5e-3)])
    found = after.times[1]["s3"]
    assert found.loading_run_s == pytest.approx(2e-3)
    assert found.run_s == pytest.approx(2e-3)
    assert found.packed_run_s == pytest.approx(1.6e-3)
    assert found.session_s == pytest.approx(5e-3)
    assert after.times[1]["s4"] == before.times[1]["s4"]


def test_a_packed_run_scales_the_unpacked_one() -> None:
    plan = replace(_Case(budget=1000 * MB).plan, packed=True)
    assert "s3" in plan.resident
    after = learn(MANIFEST, _profile(packed_s=8e-4), plan, [_span("run", "s3", 0, 16e-4)])
    found = after.times[1]["s3"]
    assert found.packed_run_s == pytest.approx(16e-4)
    assert found.run_s == pytest.approx(2e-3)


def test_a_profile_that_was_not_measured_is_after_one_pass() -> None:
    case = _Case(profile=Profile(process_bytes=PROCESS, cores=1))
    assert case.plan.steady_pass_s is None
    assert case.plan.streamed_bytes
    spans = _pass_spans(case.plan, run_s=3e-3, bandwidth=5e8)
    assert case.replanner.after_pass(case.plan, spans, 1.0, "text")
    profile = case.replanner.profile
    assert profile.measured
    assert list(profile.read_bytes_per_s.values()) == pytest.approx([5e8] * 3)
    assert [times.loading_run_s for times in profile.times[1].values()] == pytest.approx([3e-3] * 10)
    plan = case.pass_()
    assert plan.steady_pass_s is not None
    assert not case.replanner.after_pass(plan, spans, plan.steady_pass_s, "text")


def test_a_right_prediction_leaves_the_profile_as_it_is() -> None:
    case = _Case()
    assert case.plan.steady_pass_s is not None
    spans = _pass_spans(case.plan, run_s=5.0, bandwidth=1.0)
    for share in (1.0, 0.9, 1.1):
        assert not case.replanner.after_pass(case.plan, spans, case.plan.steady_pass_s * share, "text")
    assert case.replanner.profile == _profile()


def test_a_wrong_prediction_teaches_and_the_next_plan_predicts_what_happens() -> None:
    case = _Case()
    assert case.plan.steady_pass_s is not None
    spans = _pass_spans(case.plan, run_s=1e-3, bandwidth=1e8)
    seconds = spans[-1].end_s - spans[0].begin_s
    # The first pass of a kind has been read ahead for another one, and one that is wrong may be chance.
    assert not case.replanner.after_pass(case.plan, spans, seconds, "text")
    assert not case.replanner.after_pass(case.plan, spans, seconds, "text")
    assert case.replanner.after_pass(case.plan, spans, seconds, "text")
    plan = case.pass_()
    assert plan.steady_pass_s == pytest.approx(seconds, rel=0.2)
    assert not case.replanner.after_pass(plan, spans, plan.steady_pass_s, "text")


def test_short_passes_teach_once_in_half_a_second() -> None:
    """Their times vary, and a plan for each two of them takes as long as they do."""
    case = _Case()
    spans = _pass_spans(case.plan, run_s=1e-3, bandwidth=1e9)
    learned = [case.replanner.after_pass(case.plan, spans, 0.004, "text") for _ in range(300)]
    assert case.plan.steady_pass_s > 0.01
    # The first pass of a kind may have been read ahead for another one.
    assert learned.index(True) == 125


def test_passes_of_another_kind_do_not_teach_at_once() -> None:
    case = _Case()
    spans = _pass_spans(case.plan, run_s=1.0, bandwidth=1e8)
    for kind in (1, 2, 1, 2):
        assert not case.replanner.after_pass(case.plan, spans, 99.0, kind)
    assert not case.replanner.after_pass(case.plan, spans, 99.0, 2)
    assert case.replanner.after_pass(case.plan, spans, 99.0, 2)


def test_a_slower_machine_is_slower_with_any_number_of_threads() -> None:
    case = _Case()
    known = _profile()
    profile = replace(known, times={1: known.times[1], 2: {name: _times(6e-4) for name in known.times[1]}})
    after = learn(MANIFEST, profile, case.plan, _pass_spans(case.plan, run_s=3e-3, bandwidth=1e9))
    assert case.plan.threads == 1
    for times in after.times[2].values():
        assert times.run_s == times.loading_run_s == times.packed_run_s == pytest.approx(18e-4)


def test_learning_from_a_pass_that_ran_a_part_leaves_the_rest() -> None:
    case = _Case()
    spans = _pass_spans(case.plan, run_s=7e-3, bandwidth=1e9, names=["s1", "s2"])
    after = learn(MANIFEST, _profile(), case.plan, spans)
    assert {name for name, times in after.times[1].items() if times != _profile().times[1][name]} == {"s1", "s2"}
    assert learn(MANIFEST, _profile(), case.plan, []) == _profile()


def test_room_is_not_forgotten_where_times_vary() -> None:
    """A look for a faster plan, for other times, finds none that is faster enough; the room is used all the same."""
    case = _Case(budget=200 * MB)
    before = case.plan
    case.pass_(Needs(pass_bytes=NEEDS.pass_bytes + 12 * MB))
    for _ in range(WINDOW):
        case.pass_()
    left = case.plan
    assert left.budget_bytes - left.peak_bytes > 0.03 * left.budget_bytes
    # Passes took other times than was predicted, which only plans of a tenth less would be reason enough for.
    case.replanner._reason = "learned"
    assert case.pass_().layout == left.layout
    for _ in range(2 * PATIENCE):
        case.pass_()
    assert case.plan.layout == before.layout


# The first plan


def test_the_first_plan_keeps_to_the_free_memory_even_below_the_budget() -> None:
    case = _Case(budget=400 * MB, free=250 * MB)
    plan = case.replanner.first_plan(NEEDS)
    assert plan.peak_bytes <= plan.budget_bytes == 250 * MB
    # Free memory always swings a little.
    for free in (398 * MB, 400 * MB, 10**12):
        case.free = free
        assert case.replanner.first_plan(NEEDS) == case.replanner.plan(NEEDS, 400 * MB)
    case.free = 398 * MB - 1
    assert case.replanner.first_plan(NEEDS).budget_bytes == case.free


def test_a_first_plan_that_only_free_memory_stands_against_says_so() -> None:
    case = _Case(budget=400 * MB, free=90 * MB)
    with pytest.raises(BudgetError, match=r"budget of 400.0 MB would do, but .* leave only 90.0 MB") as caught:
        case.replanner.first_plan(NEEDS)
    needed = caught.value.needed_bytes
    assert caught.value.budget_bytes == 90 * MB
    case.free = needed
    assert case.replanner.first_plan(NEEDS).budget_bytes == needed


def test_a_budget_that_could_never_work_is_refused_for_its_own_sake() -> None:
    with pytest.raises(BudgetError, match=r"budget of 90.0 MB cannot work") as caught:
        Replanner(MANIFEST, _profile(), budget_bytes=90 * MB, free_bytes=lambda: 80 * MB).first_plan(NEEDS)
    assert caught.value.budget_bytes == 90 * MB


# The profile that is kept


def test_what_is_kept_was_learned_from_passes_of_its_own_sizes() -> None:
    case = _Case(profile=Profile(process_bytes=PROCESS, cores=1))
    assert case.replanner.learned is None
    spans = _pass_spans(case.plan, run_s=3e-3, bandwidth=5e8)
    assert case.replanner.after_pass(case.plan, spans, 1.0, "text")
    assert case.replanner.learned is None
    # What was read ahead for passes of another kind tells little.
    assert case.replanner.after_pass(case.plan, spans, 1.0, None)
    assert case.replanner.learned is None
    assert case.replanner.after_pass(case.plan, spans, 1.0, None)
    assert case.replanner.learned == case.replanner.profile
    assert case.replanner.learned.measured
