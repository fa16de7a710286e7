"""Sessions with copies of their weights may be fewer than buffers: one is packed while the next buffer is filled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.engine.plans import loading_bytes, manifest_of, shard_of, slots_bytes

from pipeload.format.manifest import PAGE_BYTES, Manifest, Shard, WeightSpec, WeightsRange
from pipeload.format.pages import room_bytes
from pipeload.planning import planner
from pipeload.planning.footprint import least_bytes, second_copy_bytes, session_bytes, whole_bytes
from pipeload.planning.layouts import Layout, layouts, staying
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan, make_plan
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.rates import Rates
from pipeload.planning.schedule import ShardWork, simulate

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

MB = 1_000_000
BLOCK_BYTES = 32
_settings = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def _packed(name: str, *matrices: tuple[int, int]) -> Shard:
    """A shard of 8-bit matrices with this many rows and blocks a row, and a scale of 16 bits for each block."""
    tensors, place = [], PAGE_BYTES
    for number, (rows, blocks) in enumerate(matrices):
        blobs = WeightSpec(name=f"{number}.blobs", dtype="uint8", shape=(rows, blocks, BLOCK_BYTES), offset=place)
        place += blobs.nbytes
        scales = WeightSpec(
            name=f"{number}.scales", dtype="bfloat16", shape=(rows, blocks), offset=place, widened=f"{number}.wide"
        )
        place += scales.nbytes
        tensors += [blobs, scales]
    weights = WeightsRange(path=name, offset=PAGE_BYTES, nbytes=place - PAGE_BYTES, sha256="0" * 64)
    return replace(shard_of(name, [1]), weights=weights, tensors=tuple(tensors), packed=True)


def _gptj() -> Manifest:
    """GPT-J with weights of 8 bits: 28 blocks of 214 MB, and a head in two slices of 116 MB."""
    block = [(16384, 128), (4096, 512), *[(4096, 128)] * 4]
    blocks = [_packed(f"block.{k:03d}", *block) for k in range(28)]
    heads = [_packed(f"head.{k:03d}", (25200, 128)) for k in range(2)]
    return replace(manifest_of([1]), shards=(shard_of("prologue", [524_288]), *blocks, *heads))


def _profile(manifest: Manifest, read_bytes_per_s: float, *, pack_bytes_per_s: float = 9e8) -> Profile:
    times = {}
    for shard in manifest.shards:
        pack_s, run_s = 1e-3 + shard.nbytes / pack_bytes_per_s, shard.nbytes / 2e10
        session_s = pack_s if shard.packed else 1e-3
        times[shard.name] = ShardTimes(
            session_s=session_s, run_s=run_s, loading_run_s=run_s, pack_s=pack_s, packed_run_s=run_s
        )
    return Profile(
        process_bytes=90 * MB, cores=2, read_bytes_per_s=dict.fromkeys((1, 2, 4), read_bytes_per_s), times={2: times}
    )


def _plan(manifest: Manifest, budget_bytes: int, profile: Profile) -> Plan:
    return make_plan(manifest, profile, budget_bytes=budget_bytes, needs=Needs(pass_bytes=5 * MB))


def test_gptj_in_a_gigabyte_reads_a_block_while_another_is_packed() -> None:
    manifest = _gptj()
    assert manifest.shards[1].nbytes == pytest.approx(214 * MB, rel=0.01)
    assert session_bytes(manifest.shards[1], 2) == pytest.approx(277 * MB, rel=0.01)
    assert second_copy_bytes(manifest.shards[1]) == pytest.approx(75 * MB, rel=0.01)
    plan = _plan(manifest, 988 * MB, _profile(manifest, 4e8))
    assert (plan.buffers, plan.sessions) == (2, 1)
    assert plan.loaders >= 2
    assert plan.peak_bytes <= 988 * MB
    assert plan.steady_pass_s == pytest.approx(plan.streamed_bytes / 4e8, rel=0.01)


def test_a_session_for_each_buffer_comes_first_where_fewer_are_no_faster() -> None:
    """Those are packed into the memory of the one before, which takes less time."""
    manifest = replace(manifest_of([1]), shards=tuple(_packed(f"block.{k}", (4096, 128)) for k in range(6)))
    block = manifest.shards[0]
    profile = _profile(manifest, 4e9, pack_bytes_per_s=5e7)
    sessions = 3 * session_bytes(block, 2) + 2 * second_copy_bytes(block)
    weights = int((3 * (block.memory_bytes + 4096) + sessions) / 0.994)
    budget = planner.process_bytes(profile) + 5 * MB + weights
    found = [
        (layout.sessions, layout.streamed_bytes)
        for layout in layouts(manifest.shards, weights, Rates.of(manifest, profile, None), 2)
        if layout.buffers == 3
    ]
    assert min(found, key=lambda each: each[1])[0] is not None, "fewer sessions leave memory for parts that stay"
    # Two agents pack all the time, however little is read.
    plan = make_plan(manifest, profile, budget_bytes=budget, needs=Needs(pass_bytes=5 * MB), loaders=2)
    assert (plan.buffers, plan.sessions, plan.sessions_bytes) == (3, None, 0)


@pytest.mark.parametrize("budget", [900 * MB, 1200 * MB, 2000 * MB, 4000 * MB])
def test_no_plan_with_a_session_for_each_buffer_is_faster(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = _gptj()
    profile = _profile(manifest, 4e8)
    found = _plan(manifest, budget, profile)

    def with_each(*arguments: Any) -> Iterator[Layout]:
        return (layout for layout in layouts(*arguments) if layout.sessions is None)

    monkeypatch.setattr(planner, "layouts", with_each)
    equal = _plan(manifest, budget, profile)
    assert equal.sessions is None
    assert (found.steady_pass_s or 0) <= (equal.steady_pass_s or 0) * 1.0051
    if found.sessions is not None:
        assert (found.steady_pass_s or 0) < (equal.steady_pass_s or 0)
    assert (found.sessions is None) == (budget == 900 * MB), "there is room for one buffer only"


def test_sessions_that_borrow_their_weights_are_as_many_as_buffers() -> None:
    manifest = manifest_of(*[[50 * MB]] * 12)
    speed = Rates.of(manifest, _profile(manifest, 4e8), None)
    found = list(layouts(manifest.shards, 400 * MB, speed, None))
    assert found
    assert {(one.sessions, one.sessions_bytes) for one in found} == {(None, 0)}


_MATRIX = st.tuples(st.integers(1, 3000), st.integers(1, 300))
_PACKED = st.lists(_MATRIX, min_size=1, max_size=5)
_PLAIN = st.lists(st.integers(1, 20 * MB), min_size=0, max_size=4)


@st.composite
def _models(draw: Any) -> Manifest:
    """Packed and plain shards, most of them alike."""
    block = draw(_PACKED)
    shards = [_packed(f"block.{k}", *block) for k in range(draw(st.integers(1, 8)))]
    shards += [_packed(f"other.{k}", *matrices) for k, matrices in enumerate(draw(st.lists(_PACKED, max_size=2)))]
    shards += [shard_of(f"plain.{k}", sizes) for k, sizes in enumerate(draw(st.lists(_PLAIN, max_size=3)))]
    return replace(manifest_of([1]), shards=tuple(draw(st.permutations(shards))))


def _taken(manifest: Manifest, layout: Layout) -> tuple[int, int]:
    """Bytes that all loads of a layout may reserve together: for buffers and what stays, and for sessions apart."""
    shards = manifest.shards
    plan = _by_hand(layout)
    beside = slots_bytes(plan, shards) + layout.packing_bytes
    for shard in shards:
        if shard.name in layout.resident:
            beside += whole_bytes(shard) + session_bytes(shard, layout.threads)
        else:
            streamed = layout.partly_resident.get(shard.name, (0, shard.nbytes))
            beside += sum(room_bytes(*part) for part in staying(shard, streamed))
    apart = beside if layout.sessions is None else 0
    if layout.sessions is not None:
        apart = slots_bytes(plan, shards) - layout.buffers * layout.buffer_bytes - loading_bytes(plan, shards)
    return beside, apart


def _by_hand(layout: Layout) -> Plan:
    return Plan(
        budget_bytes=0, loaders=layout.loaders, buffers=layout.buffers, buffer_bytes=layout.buffer_bytes,
        sessions=layout.sessions, resident=layout.resident, packed=layout.packed,
        packed_streamed=layout.packed_streamed, threads=layout.threads, process_bytes=0, pass_bytes=0, cache_bytes=0,
        resident_bytes=0, streamed_bytes=0, peak_bytes=0,
    )  # fmt: skip


@_settings
@given(_models(), st.floats(1.0, 3.0), st.sampled_from([None, 1, 3]), st.sampled_from([3e8, 2e9]))
def test_no_layout_takes_more_than_there_is(
    manifest: Manifest, share: float, loaders: int | None, read_bytes_per_s: float
) -> None:
    free = int(least_bytes(manifest.shards, 2) * share)
    speed = Rates.of(manifest, _profile(manifest, read_bytes_per_s), None)
    found = list(layouts(manifest.shards, free, speed, loaders))
    assert found
    for layout in found:
        taken, apart = _taken(manifest, layout)
        assert taken == layout.used_bytes <= free
        if layout.sessions is None:
            assert layout.sessions_bytes == 0
            continue
        assert 1 <= layout.sessions < layout.buffers
        assert layout.sessions_bytes == apart
        # Each load of a streamed shard can have what it reserves, whatever others hold to stay.
        for shard in manifest.shards:
            if shard.name not in layout.resident:
                needed = session_bytes(shard, layout.threads) + (second_copy_bytes(shard) if shard.packed else 0)
                assert needed <= layout.sessions_bytes


# The schedule


def _work(nbytes: int, session_s: float, run_s: float, count: int = 4) -> list[ShardWork]:
    one = ShardWork(
        cold_bytes=nbytes, steady_bytes=nbytes, streamed=True, session_s=session_s, run_s=run_s, loading_run_s=run_s
    )
    return [one] * count


def _steady_s(work: list[ShardWork], **options: Any) -> float:
    return simulate(work, read_bytes_per_s=1.0, threads=1, cores=100, **options).steady_s


def test_two_buffers_and_a_session_read_and_pack_at_the_same_time() -> None:
    work = _work(5, 2.0, 1.0)
    assert _steady_s(work, loaders=2, buffers=1) == pytest.approx(4 * (5 + 2 + 1))
    assert _steady_s(work, loaders=2, buffers=2, sessions=1) == pytest.approx(4 * 5)


def test_a_single_agent_reads_while_the_shard_before_runs_but_not_while_it_packs() -> None:
    assert _steady_s(_work(5, 2.0, 1.0), loaders=1, buffers=2, sessions=1) == pytest.approx(4 * (5 + 2))


def test_sessions_that_take_longest_follow_one_another() -> None:
    work = _work(1, 3.0, 1.0)
    assert _steady_s(work, loaders=3, buffers=3, sessions=1) == pytest.approx(4 * (3 + 1))
    assert _steady_s(work, loaders=3, buffers=3, sessions=2) == pytest.approx(4 * (3 + 1) / 2)


@_settings
@given(
    st.lists(st.tuples(st.integers(0, 100), st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_more_sessions_are_never_slower(parts: list[tuple[int, float, float]], loaders: int, buffers: int) -> None:
    work = [one for part in parts for one in _work(*part, count=1)]

    def both(sessions: int | None) -> tuple[float, float]:
        options = {"read_bytes_per_s": 10.0, "threads": 1, "cores": 100}
        schedule = simulate(work, loaders=loaders, buffers=buffers, sessions=sessions, **options)
        return schedule.first_s, schedule.steady_s

    assert both(buffers)[0] == both(None)[0]
    firsts = [both(sessions)[0] for sessions in range(1, buffers + 1)]
    assert firsts == sorted(firsts, reverse=True)
