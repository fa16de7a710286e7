"""Weights that shards have in common: counted once in memory, read once, and streamed or resident for all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from tests.engine.plans import manifest_of, slots_bytes, with_common

from pipeload.errors import BudgetError
from pipeload.format.manifest import Manifest, first_places
from pipeload.format.pages import memory_ceil, room_bytes
from pipeload.planning.footprint import session_bytes
from pipeload.planning.layouts import staying
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan, make_plan, predict
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.schedule import roofline

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

MB = 1_000_000
NEEDS = Needs(pass_bytes=MB)
LAYERS = range(1, 13)

_settings = settings(derandomize=True, deadline=None, max_examples=60)


def _albert() -> Manifest:
    """Small ends, and twelve layers over one range of 28 MB."""
    return with_common(manifest_of([MB], *[[20 * MB, 8 * MB]] * 12, [15 * MB]), LAYERS)


def _measured(manifest: Manifest, *, packed_share: float = 1.0, run_s: float = 1e-3) -> Profile:
    times = ShardTimes(session_s=1e-3, run_s=run_s, loading_run_s=run_s, pack_s=0.05, packed_run_s=run_s * packed_share)
    return Profile(
        process_bytes=50 * MB,
        cores=1,
        read_bytes_per_s={1: 1e9, 2: 1.4e9},
        times={1: {shard.name: times for shard in manifest.shards}},
    )


def _plan(manifest: Manifest, budget_bytes: int, profile: Profile | None = None) -> Plan:
    profile = profile or _measured(manifest)
    return make_plan(manifest, profile, budget_bytes=budget_bytes, needs=NEEDS)


def _needed(manifest: Manifest, profile: Profile | None = None) -> int:
    with pytest.raises(BudgetError) as caught:
        _plan(manifest, 1, profile)
    return caught.value.needed_bytes


def test_weights_in_common_count_once() -> None:
    manifest = _albert()
    assert manifest.weight_bytes == (1 + 28 + 15) * MB
    assert first_places(manifest.shards) == [0, *[1] * 12, 13]
    # Shards without weights have nothing in common.
    assert first_places(manifest_of([], [MB], []).shards) == [0, 1, 2]


def test_all_of_a_model_fits_where_its_weights_fit_once() -> None:
    manifest = _albert()
    sessions = sum(session_bytes(shard, 1) for shard in manifest.shards)
    plan = _plan(manifest, _needed(manifest) + 30 * MB)
    assert plan.streamed_bytes == 0
    assert not plan.packed
    assert plan.resident_bytes == manifest.weight_bytes
    assert plan.weights_bytes == sum(memory_ceil(n * MB) for n in (1, 28, 15)) + sessions


def test_the_range_stays_as_soon_as_it_fits_beside_a_buffer() -> None:
    """What it saves is a read for each layer; so it comes before shards with weights of their own."""
    manifest = with_common(manifest_of(*[[10 * MB]] * 20), range(4, 12))
    layers = {f"s{place}" for place in range(4, 12)}
    least = _needed(manifest)
    for budget in range(least + 14 * MB, least + 120 * MB, 5 * MB):
        assert _plan(manifest, budget).resident >= layers


def test_packed_copies_count_each_and_are_made_from_weights_that_are_read_once() -> None:
    manifest = _albert()
    profile = _measured(manifest, packed_share=0.5, run_s=0.05)
    plan = _plan(manifest, 2000 * MB, profile)
    assert plan.packed
    assert plan.resident_bytes == (1 + 12 * 28 + 15) * MB
    assert plan.weights_bytes > plan.resident_bytes
    # Where the copies do not fit, the range still does.
    plan = _plan(manifest, _needed(manifest, profile) + 30 * MB, profile)
    assert not plan.packed
    assert plan.streamed_bytes == 0


@pytest.mark.parametrize("packed", [False, True])
def test_a_cold_pass_reads_the_range_once(packed: bool) -> None:
    manifest = _albert()
    profile = _measured(manifest, packed_share=0.1 if packed else 1.0)
    plan = _plan(manifest, 2000 * MB, profile)
    assert plan.packed is packed
    assert plan.streamed_bytes == 0
    read_s = manifest.weight_bytes / 1e9
    assert plan.first_pass_s is not None
    assert plan.first_pass_s <= read_s + 14 * (1e-3 + 1e-3) + 1e-6
    bound = roofline(manifest, profile, plan.resident_bytes)
    assert bound.first_s <= plan.first_pass_s


def test_the_bound_counts_the_range_once() -> None:
    manifest = _albert()
    alone = manifest_of([MB], [28 * MB], *[[]] * 11, [15 * MB])
    profile = _measured(manifest)
    for resident_bytes in (0, 28 * MB, manifest.weight_bytes):
        assert roofline(manifest, profile, resident_bytes) == roofline(alone, profile, resident_bytes)


_SIZES = st.lists(st.sampled_from([1, 4096, 65_536, MB, 3 * MB, 10 * MB, 35 * MB]), min_size=0, max_size=4)


@st.composite
def _manifests(draw: Any) -> Manifest:
    shards = draw(st.lists(_SIZES, min_size=2, max_size=14))
    places = draw(st.permutations(range(len(shards))))
    cut, end = sorted(draw(st.tuples(st.integers(0, len(shards)), st.integers(0, len(shards)))))
    return with_common(manifest_of(*shards), *[sorted(group) for group in (places[:cut], places[cut:end]) if group])


_PROFILES = st.sampled_from(
    [{"packed_share": 1.0}, {"packed_share": 0.5, "run_s": 0.02}, {"packed_share": 0.9, "run_s": 1e-4}]
)


@_settings
@given(_manifests(), _PROFILES, st.floats(0, 3))
def test_a_plan_adds_up(manifest: Manifest, measured: dict[str, float], share: float) -> None:
    profile = _measured(manifest, **measured)
    plan = _plan(manifest, _needed(manifest, profile) + int(share * manifest.weight_bytes), profile)
    firsts = first_places(manifest.shards)
    sessions = [session_bytes(shard, plan.threads) for shard in manifest.shards]
    weights = slots_bytes(plan, manifest.shards)
    resident_bytes = streamed_bytes = 0
    for place, shard in enumerate(manifest.shards):
        kept = shard.name in plan.resident
        first = manifest.shards[firsts[place]]
        assert kept == (first.name in plan.resident), "shards with the same weights stay together"
        if kept:
            own = plan.packed or firsts[place] == place
            weights += sessions[place] + memory_ceil(shard.nbytes) * own
            resident_bytes += shard.nbytes * own
            continue
        begin, end = plan.partly_resident.get(shard.name, (0, shard.nbytes))
        assert firsts.count(firsts[place]) == 1 or shard.name not in plan.partly_resident
        weights += sum(room_bytes(*part) for part in staying(shard, (begin, end)))
        resident_bytes += shard.nbytes - (end - begin)
        streamed_bytes += end - begin
    assert plan.weights_bytes == weights
    assert (plan.resident_bytes, plan.streamed_bytes) == (resident_bytes, streamed_bytes)
    assert plan.peak_bytes <= plan.budget_bytes
    predicted = predict(manifest, profile, plan)
    assert predicted is not None
    assert (predicted.first_s, predicted.steady_s) == (plan.first_pass_s, plan.steady_pass_s)


@_settings
@given(_manifests())
def test_the_named_budget_works_and_is_hardly_above_the_smallest_that_does(manifest: Manifest) -> None:
    profile = replace(_measured(manifest), process_bytes=60 * MB)
    needed = _needed(manifest, profile)
    assert _plan(manifest, needed, profile).peak_bytes <= needed
    with pytest.raises(BudgetError):
        _plan(manifest, int(needed * 0.95), profile)


@_settings
@given(_manifests(), _PROFILES, st.lists(st.floats(0, 3), min_size=2, max_size=4))
def test_more_budget_never_promises_a_slower_pass(
    manifest: Manifest, measured: dict[str, float], shares: list[float]
) -> None:
    profile = _measured(manifest, **measured)
    needed = _needed(manifest, profile)
    budgets = [needed + int(share * manifest.weight_bytes) for share in sorted(shares)]
    seconds = [_plan(manifest, budget, profile).steady_pass_s or 0.0 for budget in budgets]
    sessions_s = sum(session_bytes(shard, 1) for shard in manifest.shards) / profile.read_bytes_per_s[1]
    assert all(more <= less * 1.0051 + sessions_s for less, more in pairwise(seconds))
