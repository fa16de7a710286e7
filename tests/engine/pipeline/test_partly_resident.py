"""Parts of shards that stay in memory are read once, and leave when another plan does not want them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    assert_same,
)
from tests.engine.pipeline.rig import (
    BLOCKS,
    NotingStorage,
    Scripted,
    fail_once,
    plan_by_hand,
    rigged,
)
from tests.marks import slow

from pipeload.errors import LoadError, ShardError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest, Shard
from pipeload.pipeline.pipeline import Pipeline
from pipeload.pipeline.session import to_value
from pipeload.pipeline.sweep import Feed
from pipeload.planning.footprint import session_bytes
from pipeload.planning.layouts import Range
from pipeload.planning.needs import Needs
from pipeload.tracing.trace import read_bytes

LAST, FIRST, MIDDLE = slice(-1, None), slice(None, -1), slice(1, -1)
"""Tensors of a shard that are streamed."""


def _halves(manifest: Manifest, *names: str, streamed: slice = LAST) -> dict[str, Range]:
    """Some tensors of each shard are streamed, and the tensors before and behind them are kept."""
    shards = [shard for shard in manifest.shards if shard.name in names and len(shard.tensors) > 1]
    return {shard.name: _range_of(shard, streamed) for shard in shards}


def _range_of(shard: Shard, streamed: slice) -> Range:
    assert shard.weights is not None
    places = [spec.offset - shard.weights.offset for spec in shard.tensors]
    begin, end, _ = streamed.indices(len(places))
    return places[begin], [*places, shard.nbytes][end]


@pytest.mark.parametrize("buffers", [1, 2, slow(3)])
@pytest.mark.parametrize("loaders", [1, slow(2), 4])
@pytest.mark.parametrize(
    ("name", "streamed"),
    [("toy", LAST), ("toy-uneven", LAST), ("toy-uneven", FIRST), ("toy-uneven", MIDDLE)],
    ids=["even", "last", "first", "middle"],
)
@pytest.mark.parametrize(
    ("resident", "partly"),
    [((), BLOCKS), (("prologue", "epilogue"), BLOCKS), (("block.001", "block.004"), ("block.000", "block.005"))],
    ids=["every block", "all but the ends", "some"],
)
def test_partly_resident_passes_equal_sequential_ones_and_read_what_is_kept_once(
    made_toys: Callable[[str], Path],
    name: str,
    resident: tuple[str, ...],
    partly: tuple[str, ...],
    streamed: slice,
    loaders: int,
    buffers: int,
) -> None:
    manifest = manifests.read(made_toys(name))
    halves = _halves(manifest, *partly, streamed=streamed)
    assert set(halves) == set(partly)
    with rigged(made_toys(name), resident=resident, partly=halves, buffers=buffers, loaders=loaders) as rig:
        rig.check(passes=4)
        assert rig.pipeline.plan.streamed_bytes < manifest.weight_bytes
        seen: dict[str, list[int]] = {}
        for shard, nbytes in rig.storage.read_bytes:
            seen.setdefault(shard, []).append(nbytes)
        for shard in manifest.shards:
            first, *later = seen[shard.name]
            assert first == shard.nbytes
            begin, end = halves.get(shard.name, (0, shard.nbytes))
            assert set(later) <= {end - begin}
            assert len(later) in ([0] if shard.name in resident else [3, 4])
        reads = [span for span in rig.pipeline.trace.spans if span.kind == "read"]
        assert read_bytes(span for span in reads if span.pass_number == 1) == manifest.weight_bytes
        for number in (2, 3, 4):
            steady = [span for span in reads if span.pass_number == number]
            assert read_bytes(steady) == rig.pipeline.plan.streamed_bytes


def test_agents_that_wait_for_the_next_pass_reserve_a_kept_part_only_once(toy_uneven: Path) -> None:
    manifest = manifests.read(toy_uneven)
    # More agents than shards: some wait with a shard whose beginning another one is still reading.
    loaders = 2 * len(manifest.shards)
    halves = _halves(manifest, *BLOCKS, streamed=MIDDLE)
    with rigged(toy_uneven, partly=halves, buffers=2, loaders=loaders) as rig:
        for _ in range(4):
            rig.check()
        kept = sum(part.buffer.nbytes for parts in rig.exchange.residents.parts.values() for part in parts)
        rig.wait(
            lambda: (
                rig.pipeline._memory.reservations.reserved_bytes
                <= kept
                + 2 * (rig.pipeline.plan.buffer_bytes + max(session_bytes(shard, 1) for shard in manifest.shards))
            )
        )


def test_a_load_of_a_kept_part_that_fails_is_done_again_and_leaks_nothing(toy_uneven: Path) -> None:
    manifest = manifests.read(toy_uneven)
    with rigged(toy_uneven, partly=_halves(manifest, *BLOCKS, streamed=MIDDLE), buffers=1) as rig:
        rig.storage.before_read = fail_once(OSError("disk"), "block.002")
        with pytest.raises(LoadError, match="disk"):
            rig.check()
        rig.check(passes=3)


@pytest.mark.parametrize("at", [4096, -1], ids=["kept", "streamed"])
def test_a_damaged_part_is_found_when_it_is_read_the_first_time(toy_copy: Path, at: int) -> None:
    manifest = manifests.read(toy_copy)
    path = toy_copy / "shards" / "block.002.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    plan = plan_by_hand(manifest, partly=_halves(manifest, *BLOCKS))
    pipeline = Pipeline(manifest, NotingStorage(toy_copy, manifest), plan, Scripted(manifest, lambda *_: plan))
    try:
        values = {name: to_value(array) for name, array in toys.inputs().items()}
        for _ in range(2):
            with pytest.raises(ShardError, match=r"'shards/block\.002\.safetensors' is damaged"):
                pipeline.submit(Feed(pieces=[values]), Needs()).result()
    finally:
        pipeline.close()


def test_kept_parts_that_another_plan_does_not_want_leave(toy_uneven: Path) -> None:
    manifest = manifests.read(toy_uneven)
    plans = [
        plan_by_hand(manifest, partly=_halves(manifest, *BLOCKS)),
        plan_by_hand(
            manifest, partly=_halves(manifest, "block.001", "block.002"), resident=("block.003",), pass_bytes=1
        ),
        plan_by_hand(manifest, resident=BLOCKS[:4], pass_bytes=2),
        plan_by_hand(manifest, pass_bytes=3),
    ]
    with rigged(toy_uneven, partly=_halves(manifest, *BLOCKS), replan=lambda pass_bytes, _: plans[pass_bytes]) as rig:
        for number in (0, 1, 0, 2, 1, 3, 0, 0):
            for _ in range(2):
                assert_same(rig.run(pass_bytes=number), rig.expected)
            kept = {manifest.shards[index].name for index in rig.exchange.residents.parts}
            assert kept == set(plans[number].partly_resident)
            staying = {manifest.shards[index].name for index in rig.exchange.residents.shards}
            assert staying == plans[number].resident
            assert rig.pipeline._memory.reservations.reserved_bytes <= plans[number].weights_bytes
