"""For any model, machine and budget: a plan that keeps to the budget, or an error that names a budget that works."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeload.buffers import page_ceil
from pipeload.errors import BudgetError
from pipeload.manifest import (
    ByteTerm,
    Cache,
    FileRecord,
    Head,
    Manifest,
    Shard,
    Structure,
    TensorSpec,
    WeightsRange,
)
from pipeload.planner import SESSION_BYTES, Plan, cache_bytes, make_plan, pass_bytes, planning_dims
from pipeload.profile import Profile
from pipeload.profiler import measure

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

MB = 1_000_000
PROFILE = Profile(process_bytes=50 * MB, cores=4)
_EMPTY = FileRecord(path="x", nbytes=0, sha256="0" * 64)


def _shard(name: str, nbytes: int, *, takes: tuple[str, ...] = (), makes: tuple[str, ...] = ()) -> Shard:
    weights = WeightsRange(path="x", offset=0, nbytes=nbytes, sha256="0" * 64) if nbytes else None
    return Shard(
        name=name, role="block", graph=_EMPTY, weights=weights, tensors=(), inputs=takes, outputs=makes, structure="s"
    )


def _manifest(*sizes: int, activations: tuple[ByteTerm, ...] = (ByteTerm(nbytes=10),)) -> Manifest:
    return Manifest(
        exporter="tests", source="", model_type="", task="", inputs=(), outputs=(), edges=(), files=(),
        shards=tuple(_shard(f"s{k}", nbytes) for k, nbytes in enumerate(sizes)),
        structures={"s": Structure(activations=(activations,))},
    )  # fmt: skip


def _plan(manifest: Manifest, budget_bytes: int, **options: Any) -> Plan:
    options = {"pass_bytes": MB, **options}
    return make_plan(manifest, PROFILE, budget_bytes=budget_bytes, **options)


def _needed(manifest: Manifest, **options: Any) -> int:
    with pytest.raises(BudgetError) as caught:
        _plan(manifest, 1, **options)
    return caught.value.needed_bytes


_SIZES = st.lists(
    st.one_of(st.integers(0, 200 * MB), st.sampled_from([0, 1, 4096, MB, 50 * MB])), min_size=1, max_size=30
)
_OPTIONS = st.fixed_dictionaries(
    {
        "pass_bytes": st.integers(0, 100 * MB),
        "cache_bytes": st.integers(0, 100 * MB),
        "loaders": st.sampled_from([None, 1, 2, 3, 8]),
        "threads": st.sampled_from([None, 1, 3]),
    }
)
_BUDGETS = st.integers(1, 4000 * MB)
_settings = settings(derandomize=True, database=None, deadline=None, max_examples=300)


# For anything


@_settings
@given(_SIZES, _OPTIONS, _BUDGETS)
def test_the_predicted_peak_keeps_to_the_budget_or_the_named_budget_works(
    sizes: list[int], options: dict[str, Any], budget: int
) -> None:
    manifest = _manifest(*sizes)
    try:
        plan = _plan(manifest, budget, **options)
    except BudgetError as error:
        plan = _plan(manifest, error.needed_bytes, **options)
        assert plan.budget_bytes > budget
    assert plan.peak_bytes <= plan.budget_bytes


@_settings
@given(_SIZES, _OPTIONS, _BUDGETS)
def test_a_plan_adds_up(sizes: list[int], options: dict[str, Any], budget: int) -> None:
    manifest = _manifest(*sizes)
    try:
        plan = _plan(manifest, budget, **options)
    except BudgetError as error:
        plan = _plan(manifest, error.needed_bytes, **options)
    streamed = [shard for shard in manifest.shards if shard.name not in plan.resident]
    resident = [shard for shard in manifest.shards if shard.name in plan.resident]
    assert len(resident) == len(plan.resident)
    assert plan.streamed_bytes == sum(shard.nbytes for shard in streamed)
    assert plan.buffer_bytes >= max((shard.nbytes for shard in streamed), default=0)
    assert plan.buffer_bytes % 4096 == 0
    assert (plan.buffers == 0) == (not streamed)
    assert plan.buffers <= len(streamed)
    assert 1 <= plan.loaders <= (options["loaders"] or 2)
    assert plan.threads == (options["threads"] or PROFILE.cores)
    assert not (plan.packed and streamed)
    used = sum(page_ceil(s.nbytes) + SESSION_BYTES for s in resident) + plan.buffers * (
        plan.buffer_bytes + SESSION_BYTES
    )
    assert plan.peak_bytes >= PROFILE.process_bytes + options["pass_bytes"] + options["cache_bytes"] + used


@_settings
@given(_SIZES, _OPTIONS, st.lists(st.floats(0, 2.5), min_size=2, max_size=8))
def test_more_budget_never_means_more_streamed_bytes(
    sizes: list[int], options: dict[str, Any], shares: list[float]
) -> None:
    manifest = _manifest(*sizes)
    needed = _needed(manifest, **options)
    budgets = [needed + int(share * manifest.weight_bytes) for share in sorted(shares)]
    streamed = [_plan(manifest, budget, **options).streamed_bytes for budget in budgets]
    assert streamed == sorted(streamed, reverse=True)


@_settings
@given(_SIZES, _OPTIONS, _BUDGETS)
def test_a_plan_is_a_pure_function(sizes: list[int], options: dict[str, Any], budget: int) -> None:
    def outcome() -> Any:
        try:
            return _plan(_manifest(*sizes), budget, **options)
        except BudgetError as error:
            return str(error)

    assert outcome() == outcome()


# In particular


def test_more_budget_streams_less_step_by_step() -> None:
    manifest = _manifest(2 * MB, *[50 * MB] * 12, 3 * MB)
    plans = [_plan(manifest, budget) for budget in range(_needed(manifest), 900 * MB, MB)]
    streamed = [plan.streamed_bytes for plan in plans]
    assert streamed == sorted(streamed, reverse=True)
    assert {plan.buffers for plan in plans} >= {1, 2, 3}
    assert plans[-1].packed


def test_when_everything_fits_nothing_is_streamed() -> None:
    plan = _plan(_manifest(*[50 * MB] * 4), 1000 * MB)
    assert plan.packed
    assert plan.resident == {"s0", "s1", "s2", "s3"}
    assert (plan.streamed_bytes, plan.buffers, plan.buffer_bytes) == (0, 0, 0)


def test_what_fits_without_packing_stays_resident() -> None:
    manifest = _manifest(*[50 * MB] * 4)
    packed = min(budget for budget in range(250 * MB, 500 * MB, MB) if _plan(manifest, budget).packed)
    plan = _plan(manifest, packed - MB)
    assert not plan.packed
    assert plan.streamed_bytes == 0


def test_the_smallest_budget_holds_one_buffer_for_the_largest_shard() -> None:
    manifest = _manifest(MB, 80 * MB, 3 * MB)
    plan = _plan(manifest, _needed(manifest))
    assert plan.buffers == 1
    assert plan.buffer_bytes >= 80 * MB
    assert plan.loaders == 1


def test_too_small_a_budget_names_what_it_is_made_of() -> None:
    manifest = _manifest(MB, 80 * MB, 3 * MB)
    with pytest.raises(BudgetError) as caught:
        _plan(manifest, 100 * MB, pass_bytes=7 * MB, cache_bytes=9 * MB)
    for words in ("100.0 MB", "'s1'", "80.0 MB", "7.0 MB activations", "9.0 MB caches", str(caught.value.needed_bytes)):
        assert words in str(caught.value)


def test_small_shards_are_resident_before_large_ones() -> None:
    manifest = _manifest(MB, *[50 * MB] * 12, 2 * MB)
    for budget in range(_needed(manifest) + 10 * MB, 900 * MB, 10 * MB):
        assert {"s0", "s13"} <= _plan(manifest, budget).resident


@pytest.mark.parametrize("count", [4, 7, 12, 24, 48])
def test_resident_shards_are_spread_evenly(count: int) -> None:
    manifest = _manifest(*[50 * MB] * count)
    for budget in range(_needed(manifest), 60 * MB * (count + 4), 25 * MB):
        plan = _plan(manifest, budget)
        resident = sorted(int(name[1:]) for name in plan.resident)
        if not 0 < len(resident) < count:
            continue
        # Passes follow one another, so the distance goes round.
        gaps = [(b - a - 1) % count for a, b in zip(resident, [*resident[1:], resident[0] + count], strict=True)]
        fair = (count - len(resident)) / len(resident)
        assert max(gaps) <= 2 * fair + 2, f"{resident} of {count}"


def test_loaders_and_threads_are_as_asked_for() -> None:
    manifest = _manifest(*[50 * MB] * 12)
    plan = _plan(manifest, 400 * MB, loaders=3, threads=1)
    assert (plan.loaders, plan.threads, plan.buffers) == (3, 1, 4)


# What a pass needs


def _model() -> Manifest:
    """ids -> [embed] -> a -> [block] -> b -> [top] -> out; the mask is used until the end."""
    specs = {
        "ids": ("int64", ("batch", "length")), "mask": ("float32", ("batch", "length")),
        "a": ("float32", ("batch", "length", 100)), "b": ("float32", ("batch", "length", 100)),
        "out": ("float32", ("batch", 10)),
    }  # fmt: skip
    tensors = {n: TensorSpec(name=n, dtype=dtype, shape=shape) for n, (dtype, shape) in specs.items()}
    shards = (
        _shard("embed", MB, takes=("ids",), makes=("a",)),
        _shard("block", MB, takes=("a", "mask"), makes=("b",)),
        _shard("top", MB, takes=("b", "mask"), makes=("out",)),
    )
    return replace(
        _manifest(1), inputs=(tensors["ids"], tensors["mask"]), outputs=(tensors["out"],),
        edges=(tensors["a"], tensors["b"]), shards=shards, dims=("batch", "length"),
        structures={"s": Structure(activations=((ByteTerm(nbytes=1200, dims=("batch", "length")),),))},
    )  # fmt: skip


def test_a_pass_needs_edges_and_activations_of_its_worst_shard() -> None:
    need = pass_bytes(_model(), {"batch": 100, "length": 1000})
    # Input edge of 40 MB and activations of 120 MB, outputs included.
    assert 160 * MB <= need <= 400 * MB


def test_the_callers_arrays_are_counted() -> None:
    image = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 1000, 1000))
    model = replace(_model(), inputs=(*_model().inputs, image))
    dims = {"batch": 10, "length": 1}
    assert pass_bytes(model, dims) - pass_bytes(_model(), dims) >= 120 * MB


def test_a_pass_needs_more_for_larger_inputs() -> None:
    needs = [pass_bytes(_model(), {"batch": 8, "length": length}) for length in range(0, 5000, 100)]
    assert needs == sorted(needs)


def test_planning_assumes_one_row_of_128() -> None:
    assert planning_dims(_model()) == {"batch": 1, "length": 128}
    assert planning_dims(_model(), {"length": 512}) == {"batch": 1, "length": 512}


def _decoder() -> Manifest:
    base = _model()
    past = TensorSpec(name="past", dtype="float32", shape=("batch", 4, "past_length", 16))
    present = replace(past, name="present", shape=("batch", 4, "past_length + length", 16))
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch", "length", 50_000))
    mask = replace(base.inputs[1], shape=("batch", "past_length + length"))
    hidden = replace(base.edges[0], name="hidden")
    shards = (
        base.shards[0],
        _shard("block", MB, takes=("a", "mask", "past"), makes=("hidden", "present")),
        _shard("head.0", MB, takes=("hidden",), makes=("logits.0",)),
    )
    return replace(
        base, inputs=(base.inputs[0], mask, past), outputs=(logits, present), edges=(base.edges[0], hidden),
        shards=shards, dims=("batch", "length", "past_length"), caches=(Cache(input="past", output="present"),),
        head=Head(input="hidden", output="logits", shards=("head.0",)),
    )  # fmt: skip


def test_planning_assumes_empty_caches() -> None:
    assert planning_dims(_decoder()) == {"batch": 1, "length": 128, "past_length": 0}


def test_caches_are_counted_by_their_length_after_the_pass() -> None:
    one = 2 * 4 * 16 * 4 * 11
    need = cache_bytes(_decoder(), {"batch": 2, "length": 1, "past_length": 10})
    assert one <= need <= 4 * one
    assert cache_bytes(_model(), {"batch": 2, "length": 1}) == 0


def test_a_head_for_the_last_position_needs_less_than_one_for_all() -> None:
    dims = {"batch": 1, "length": 1000, "past_length": 0}
    every, last = pass_bytes(_decoder(), dims), pass_bytes(_decoder(), dims, last_position=True)
    assert every - last >= 190 * MB


def test_the_machine_is_measured() -> None:
    profile = measure()
    assert profile.cores >= 1
    assert profile.process_bytes > 10 * MB
