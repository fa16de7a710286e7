"""Which ways to use memory are looked at, by models that are small enough to count them by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from tests.engine.plans import manifest_of, shard_of, with_common

from pipeload.format.manifest import Manifest, Shard
from pipeload.planning import layouts as module
from pipeload.planning.footprint import Footprint, session_bytes
from pipeload.planning.layouts import Layout, Range, layouts, staying
from pipeload.planning.planner import AMPLE_BYTES
from pipeload.planning.profile import ShardTimes
from pipeload.planning.rates import Rates

P = 4096
K = 100 * P
"""Sizes are whole pages, so that they are those of memory too."""


def _rates(shards: tuple[Shard, ...], *, threads: int = 1, loaders: int = 1, packed_share: float = 1.0) -> Rates:
    times = ShardTimes(session_s=1.0, run_s=10.0, loading_run_s=10.0, pack_s=1.0, packed_run_s=10.0 * packed_share)
    return Rates(
        read_bytes_per_s=dict.fromkeys(range(1, loaders + 1), 1e9),
        direct=True,
        times={count: {shard.name: times for shard in shards} for count in range(1, threads + 1)},
    )


def _layouts(manifest: Manifest, free: int, asked: int | None = 1, **rates: Any) -> list[Layout]:
    return list(layouts(manifest.shards, free, _rates(manifest.shards, **rates), asked))


def _ranges(shard: Shard, *, alone: bool = True) -> list[Range]:
    return [choice.streamed for choice in module._choices(shard, alone=alone)]


# The order in which shards stay


@pytest.mark.parametrize(
    ("count", "order"),
    [(0, []), (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 2, 1, 3]), (8, [0, 4, 2, 6, 1, 5, 3, 7])],
)
def test_shards_stay_in_the_order_of_van_der_corput(count: int, order: list[int]) -> None:
    assert module._spread(count) == order


@pytest.mark.parametrize("count", range(1, 40))
def test_each_shard_is_in_the_order_once_and_the_first_of_them_are_far_apart(count: int) -> None:
    order = module._spread(count)
    assert sorted(order) == list(range(count))
    for taken in (2, 4, 8):
        if taken <= count:
            places = sorted(order[:taken])
            apart = [after - before for before, after in pairwise(places)]
            assert min(apart) >= count // taken


def test_small_shards_come_first_then_those_with_common_weights_then_the_others_spread() -> None:
    sizes = [[100 * K], [10 * K], [100 * K], [30 * K], [30 * K], [100 * K], [11 * K], [5 * K], [100 * K]]
    groups = module._groups(with_common(manifest_of(*sizes), (3, 4)).shards)
    assert [[shard.name for shard in group] for group in groups[3:5]] == [["s3", "s4"], ["s5"]]
    order = [[shard.name for shard in group] for group in module._residence_order(groups)]
    # A tenth of the largest is small. Of the five others, the first, third, second ... of five.
    assert order[:3] == [["s1"], ["s7"], ["s3", "s4"]]
    rest = ["s0", "s2", "s5", "s6", "s8"]
    assert order[3:] == [[rest[place]] for place in module._spread(5)]


# Ranges that are streamed


def test_what_stays_is_before_and_behind_the_range() -> None:
    shard = shard_of("s", [K, K, K])
    assert staying(shard, (K, 2 * K)) == [(0, K), (2 * K, 3 * K)]
    assert staying(shard, (0, 2 * K)) == [(2 * K, 3 * K)]
    assert staying(shard, (K, 3 * K)) == [(0, K)]
    assert staying(shard, (0, 3 * K)) == []
    assert staying(shard, (0, 0)) == [(0, 3 * K)]


def test_ranges_are_adjacent_tensors_the_largest_first_and_with_the_fewest_parts_around() -> None:
    assert _ranges(shard_of("s", [K, K, K])) == [(0, 3 * K), (0, 2 * K), (0, K)]
    assert _ranges(shard_of("s", [2 * K, K])) == [(0, 3 * K), (0, 2 * K), (2 * K, 3 * K)]
    # The largest lies in the middle, with parts on both sides.
    assert _ranges(shard_of("s", [K, 5 * K, 2 * K])) == [
        (0, 8 * K), (K, 8 * K), (0, 6 * K), (K, 6 * K), (6 * K, 8 * K), (0, K),
    ]  # fmt: skip


def test_a_part_of_less_than_a_fiftieth_is_no_part_and_a_range_that_is_hardly_smaller_no_range() -> None:
    assert _ranges(shard_of("s", [K - 1, 48 * K + 1, K])) == [(0, 50 * K), (0, 49 * K), (49 * K, 50 * K)]
    assert _ranges(shard_of("s", [K, 48 * K + 1, K - 1])) == [(0, 50 * K), (K, 50 * K), (0, K)]
    assert _ranges(shard_of("s", [K, 48 * K, K])) == [(0, 50 * K), (0, 49 * K), (K, 49 * K), (0, K)]
    # 26 and 25 of 51 differ by less than a fiftieth of 51: the first one does for both.
    assert _ranges(shard_of("s", [26 * K, 25 * K])) == [(0, 51 * K), (0, 26 * K)]
    assert _ranges(shard_of("s", [26 * K, 24 * K])) == [(0, 50 * K), (0, 26 * K), (26 * K, 50 * K)]


def test_all_or_nothing_is_streamed_of_a_shard_without_weights_or_with_those_of_others() -> None:
    assert _ranges(shard_of("s", [])) == [(0, 0)]
    assert _ranges(shard_of("s", [K, K]), alone=False) == [(0, 2 * K)]


def test_all_of_a_shard_of_16_bits_may_stay() -> None:
    assert _ranges(shard_of("s", [K, K], narrow=True)) == [(0, 2 * K), (0, K), (0, 0)]
    none = module._choices(shard_of("s", [K, K], narrow=True), alone=True)[-1]
    # It is widened into a buffer, for which nothing is read.
    assert (none.read_bytes, none.staying_bytes) == (0, 2 * K)
    assert none.buffer_bytes >= 4 * K


def _sizes(manifest: Manifest) -> list[int]:
    choices = {shard.name: module._choices(shard, alone=True) for shard in manifest.shards}
    return module._range_sizes(manifest.shards, choices)


def test_buffers_are_as_large_as_a_range_of_a_shard_that_is_not_small() -> None:
    assert _sizes(manifest_of([K, K, K], [2 * K, K])) == [3 * K, 2 * K, K]
    # A tenth of the largest is small.
    assert _sizes(manifest_of([50 * K, 50 * K], [10 * K], [10 * K + P])) == [100 * K, 50 * K, 10 * K + P]
    assert _sizes(manifest_of([], [])) == [0]


@pytest.mark.parametrize(("count", "step"), [(12, 1), (13, 2), (24, 2), (25, 3)])
def test_at_most_twelve_sizes_of_buffers_are_tried_and_the_largest_always(count: int, step: int) -> None:
    found = _sizes(manifest_of([K] * count))
    assert found == [size * K for size in range(count, 0, -step)]


# The layouts that are looked at


def test_without_room_for_packed_copies_each_number_of_agents_and_buffers_is_tried_with_each_size() -> None:
    manifest = manifest_of(*[[K, K]] * 8)
    session = session_bytes(manifest.shards[0], 1)
    # Of the ranges, one or both tensors.
    free = 5 * (2 * K + session)
    found = {(one.loaders, one.buffers, one.buffer_bytes) for one in _layouts(manifest, free, None, loaders=2)}
    assert found == {
        (loaders, buffers, size)
        for loaders in (1, 2)
        for buffers in range(1, loaders + 2)
        for size in (K, 2 * K)
        if buffers * (size + session) + (0 if size == 2 * K else 8 * K) <= free
    }
    assert {one.loaders for one in _layouts(manifest, free, 3)} == {3}


def test_where_the_packed_copies_fit_only_layouts_that_read_nothing_are_tried_packed_or_not() -> None:
    manifest = manifest_of(*[[K, K]] * 3)
    beside = Footprint.of(manifest.shards, 1)
    everything = 3 * (2 * K + session_bytes(manifest.shards[0], 1)) + beside.packing_bytes
    found = _layouts(manifest, everything, None, loaders=2)
    assert [(one.loaders, one.buffers, one.packed) for one in found] == [
        (1, 0, False), (2, 0, False), (1, 0, True), (2, 0, True),
    ]  # fmt: skip
    assert [one.packing_bytes for one in found] == [0, 0, beside.packing_bytes, beside.packing_bytes]
    assert found[-1].used_bytes == everything
    # With a byte less, others are tried; none that has a buffer for nothing.
    fewer = _layouts(manifest, everything - 1)
    assert {(one.packed, bool(one.buffers)) for one in fewer} == {(False, False), (True, True)}


def test_the_most_threads_come_first_and_each_number_of_them_is_tried() -> None:
    manifest = manifest_of([K])
    assert [one.threads for one in _layouts(manifest, AMPLE_BYTES, threads=3)] == [3, 3, 2, 2, 1, 1]


def test_streamed_shards_are_packed_only_where_that_pays_and_may_not_be_all_the_same() -> None:
    manifest = manifest_of(*[[40 * K]] * 8)
    free = 160 * K
    assert not any(one.packed_streamed for one in _layouts(manifest, free))
    found = _layouts(manifest, free, packed_share=0.5)
    assert {one.packed_streamed for one in found} == {False, True}
    assert not any(one.partly_resident for one in found if one.packed_streamed)


def test_of_weights_of_16_bits_all_half_and_none_of_the_resident_shards_come_before_parts() -> None:
    manifest = manifest_of(*[[K]] * 8, narrow=True)
    free = 5 * (2 * K + session_bytes(manifest.shards[0], 1))
    found = [one for one in _layouts(manifest, free) if one.buffers == 1 and not one.packed]
    # As many as fit, where some of the others are read; and fewer, where all of them stay as they are stored.
    assert [len(one.resident) for one in found] == [3, 1, 1]
    assert [one.streamed_bytes for one in found] == [3 * K, 0, 0]
    assert all(one.used_bytes <= free for one in found)


def test_weights_in_common_are_in_memory_once_or_if_they_are_packed_for_each() -> None:
    manifest = with_common(manifest_of([K], [K], [K]), (0, 1))
    found = {one.packed: one for one in _layouts(manifest, AMPLE_BYTES)}
    sessions = sum(session_bytes(shard, 1) for shard in manifest.shards)
    packing = Footprint.of(manifest.shards, 1).packing_bytes
    assert (found[False].used_bytes, found[False].resident_bytes) == (2 * K + sessions, 2 * K)
    assert (found[True].used_bytes, found[True].resident_bytes) == (3 * K + sessions + packing, 3 * K)


def test_what_a_layout_takes_is_counted_to_the_byte() -> None:
    manifest = manifest_of([K, K, K], [K, K, K])
    session = session_bytes(manifest.shards[0], 1)
    least = 3 * K + session

    def of(free: int) -> dict[tuple[int, int], Layout]:
        return {(one.buffers, one.buffer_bytes): one for one in _layouts(manifest, free) if not one.packed}

    # Nothing fits into a byte less than a buffer for a whole shard and its session take.
    assert set(of(least - 1)) == set()
    assert set(of(least)) == {(1, 3 * K)}
    assert of(least)[1, 3 * K].streamed_bytes == 6 * K
    # Two tensors are streamed of each, and one stays.
    whole = of(2 * K + session + 2 * K)[1, 2 * K]
    assert whole.partly_resident == {"s0": (0, 2 * K), "s1": (0, 2 * K)}
    assert (whole.resident_bytes, whole.streamed_bytes, whole.used_bytes) == (2 * K, 4 * K, 4 * K + session)
    # A byte short of all of a shard beside a buffer for the other; then all of it.
    free = 3 * K + session + 3 * K + session
    assert of(free - 1)[1, 3 * K].resident == frozenset()
    assert of(free)[1, 3 * K].resident == frozenset({"s0"})
    assert of(free)[1, 3 * K].used_bytes == free
    assert (of(free)[0, 0].streamed_bytes, of(free)[0, 0].used_bytes) == (0, free)
    assert (0, 0) not in of(free - 1)


def test_a_layout_is_a_value_whose_fields_have_names() -> None:
    (one, *_) = _layouts(manifest_of([K]), AMPLE_BYTES)
    assert one == replace(one)
    assert one != replace(one, loaders=2)
    assert not hasattr(one, "__dict__")
