"""Shards whose kernels round otherwise when they are not packed are packed under every plan."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.harness import Gate, assert_same, figures_of_memory, run_sequentially
from tests.engine.pipeline.rig import NAMES, Scripted, fail_once, rigged

import pipeload
from pipeload.errors import LoadError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Shard
from pipeload.pipeline import loader, weights_memory
from pipeload.pipeline.session import ShardSession
from pipeload.planning.footprint import least_bytes, second_copy_bytes, session_bytes, whole_bytes
from pipeload.planning.needs import Needs
from pipeload.planning.planner import make_plan
from pipeload.planning.profile import Profile
from pipeload.tracing.trace import Trace

BLOCKS = tuple(NAMES[1:-1])


@pytest.fixture(scope="module")
def small(made_toys: Callable[[str], Path]) -> Path:
    return made_toys("toy-small")


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bool]]:
    """Name of a shard -> whether its sessions were packed."""
    seen: dict[str, set[bool]] = {}

    class Noting(ShardSession):
        def __init__(self, shard: Any, *arguments: Any, **options: Any) -> None:
            seen.setdefault(shard.name, set()).add(options.get("packed", False))
            super().__init__(shard, *arguments, **options)

    monkeypatch.setattr(loader, "ShardSession", Noting)
    return seen


@pytest.mark.parametrize("loaders", [1, 3])
@pytest.mark.parametrize(
    ("resident", "partly"),
    [
        ((), {}),
        (("block.001", "block.004"), {}),
        (NAMES, {}),
        ((), {"block.000": (0, 1024), "block.003": (1024, 1792)}),
    ],
    ids=["streamed", "some resident", "all resident", "partly"],
)
def test_every_plan_gives_the_same_bits(
    small: Path,
    packed: dict[str, set[bool]],
    resident: tuple[str, ...],
    partly: dict[str, tuple[int, int]],
    loaders: int,
) -> None:
    expected = run_sequentially(small, toys.inputs(), threads=1)
    with rigged(small, resident=resident, partly=partly, loaders=loaders) as rig:
        for _ in range(3):
            assert_same(rig.run(), expected)
    assert {name: kinds for name, kinds in packed.items() if name in BLOCKS} == {name: {True} for name in BLOCKS}
    assert packed["prologue"] == {False}


def test_resident_shards_have_given_their_buffers_back(small: Path) -> None:
    with rigged(small, resident=NAMES) as rig:
        rig.check(passes=2)
        shards = rig.exchange.residents.shards
        assert {rig.manifest.shards[k].name for k, loaded in shards.items() if loaded.buffer is None} == set(BLOCKS)
        expected = sum(whole_bytes(shard) + session_bytes(shard, 1) for shard in rig.manifest.shards)
        assert rig.pipeline._memory.reservations.reserved_bytes == expected


def test_a_load_that_fails_while_it_packs_gives_everything_back(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail = fail_once(OSError("no memory"), "block.002")

    class Failing(ShardSession):
        def __init__(self, shard: Any, *arguments: Any, **options: Any) -> None:
            fail(shard)
            super().__init__(shard, *arguments, **options)

    monkeypatch.setattr(loader, "ShardSession", Failing)
    with rigged(small, resident=NAMES) as rig:
        with pytest.raises(LoadError, match="no memory"):
            rig.check()
        rig.check(passes=2)


def test_a_plan_has_room_for_the_copies(small: Path) -> None:
    manifest = manifests.read(small)
    profile = Profile(process_bytes=10_000_000, cores=1, runtime_bytes=10_000_000)
    needs = Needs(pass_bytes=0)
    with pytest.raises(pipeload.BudgetError) as caught:
        make_plan(manifest, profile, budget_bytes=1, needs=needs)
    least = make_plan(manifest, profile, budget_bytes=caught.value.needed_bytes, needs=needs)
    assert least.weights_bytes >= least_bytes(manifest.shards, 1)
    block = manifest.shards[1]
    assert session_bytes(block, 1) > block.nbytes + 8 * 64 * 2
    whole = make_plan(manifest, profile, budget_bytes=10**9, needs=needs)
    assert len(whole.resident) == len(manifest.shards)
    copies = sum(session_bytes(shard, whole.threads) + whole_bytes(shard) for shard in manifest.shards)
    assert whole.weights_bytes >= copies + second_copy_bytes(block)


_PROGRAM = """
import ctypes, sys
from pathlib import Path
from pipeload.format import manifest as manifests
from pipeload.machine.memory import rss_bytes
from pipeload.pipeline.session import ShardSession, Stopper, to_value
from pipeload.planning.footprint import session_bytes
from pipeload.storage.buffers import Buffer, Part
from pipeload.storage.weights import Storage
import numpy as np

manifest = manifests.read(Path(sys.argv[1]))
storage, sessions, before = Storage(Path(sys.argv[1]), manifest), [], 0
inputs = {"mask": to_value(np.ones((1, 1, 1), np.float32))}
for shard in manifest.shards[1:-1]:
    parts = [Part(0, shard.nbytes, Buffer(shard.nbytes))]
    storage.read_weights(shard, parts, lambda: False)
    sessions.append(ShardSession(shard, storage.graph(shard), parts, 1, packed=True, copied=True))
    hidden = to_value(np.ones((1, 1, int(sys.argv[2])), np.float32))
    sessions[-1].run({**inputs, shard.inputs[0]: hidden}, Stopper())
    parts[0].buffer.close()
    ctypes.CDLL(None).malloc_trim(0)
    if len(sessions) == 1:
        before = rss_bytes()
planned = sum(session_bytes(shard, 1) for shard in manifest.shards[2:-1])
print((rss_bytes() - before) / planned)
"""


@pytest.mark.slow
def test_the_packed_copies_take_what_the_plan_says(tmp_path: Path) -> None:
    width = 3072
    toys.make_toy(tmp_path / "toy", blocks=5, width=width, small=True)
    program = _PROGRAM.replace("sys.argv[1]", repr(str(tmp_path / "toy"))).replace("sys.argv[2]", repr(width))
    [share] = figures_of_memory(program)
    assert 0.9 < share <= 1.0


_STREAMING = """
import resource, sys
from contextlib import ExitStack
from pathlib import Path
from pipeload.format import manifest as manifests
from pipeload.machine.heap import limit_heap, trim
from pipeload.machine.memory import rss_bytes
from pipeload.pipeline.session import ShardSession
from pipeload.planning.footprint import second_copy_bytes, session_bytes
from pipeload.storage.buffers import Buffer, Part
from pipeload.storage.weights import Storage

limit_heap()
manifest = manifests.read(Path(sys.argv[1]))
storage, blocks = Storage(Path(sys.argv[1]), manifest), manifest.shards[1:-1]
parts, pages, rss = [Part(0, blocks[0].nbytes, Buffer(blocks[0].nbytes))], [], []
storage.read_weights(blocks[0], parts, lambda: False)
# The code of onnxruntime that a first session loads.
ShardSession(blocks[0], storage.graph(blocks[0]), parts, 1, packed=True, copied=True)
trim()
begin = rss_bytes()
for shard in (*blocks, *blocks):
    storage.read_weights(shard, parts, lambda: False)
    graph = storage.graph(shard)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    session = ShardSession(shard, graph, parts, 1, packed=True)
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    rss.append(rss_bytes())
    del session
kept = rss_bytes()
trim()
planned = session_bytes(blocks[0], 1) + second_copy_bytes(blocks[0])
print(pages[0], sum(pages[1:]), (max(rss) - begin) / planned, kept - rss_bytes())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_streamed_shards_are_packed_into_the_same_pages_one_after_the_other(tmp_path: Path) -> None:
    """The system clears each page that it gives, which takes longer than to fill it."""
    toys.make_toy(tmp_path / "toy", blocks=4, width=2048, small=True)
    program = _STREAMING.replace("sys.argv[1]", repr(str(tmp_path / "toy")))
    first_pages, later_pages, of_plan, kept = figures_of_memory(program)
    assert first_pages > 500, "the first one takes new memory"
    assert later_pages < 1.5 * first_pages, "of the seven behind it, one finds no hole of its size"
    assert of_plan <= 1
    assert kept > 2048 * 2048, "the memory is kept, and goes when the heap is trimmed"


def test_the_heap_is_given_back_before_a_shard_that_may_not_fit_into_its_holes(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it keeps of a shard of another structure, or beside a tensor that finds no hole, may be above the plan."""
    trims: list[str] = []
    with rigged(small) as rig:
        plan, block = rig.pipeline.plan, rig.manifest.shards[1]
    # One that no agent uses: they read ahead, and would have packed a block before.
    memory = weights_memory.WeightsMemory(plan, Trace(8), in_arena=False)
    other = replace(block, structure="another")
    monkeypatch.setattr(weights_memory, "trim", lambda: trims.append("trim"))
    monkeypatch.setattr(weights_memory, "rss_bytes", lambda: 0)

    def trimmed(shard: Shard, *, streamed: bool = True) -> bool:
        trims.clear()
        memory.fit_heap(shard, streamed=streamed)
        return bool(trims)

    assert trimmed(block), "what lies in the heap is not known"
    assert not trimmed(block)
    assert trimmed(other)
    assert not trimmed(other)
    assert trimmed(block, streamed=False), "a resident shard has memory of its own"
    assert trimmed(block)
    assert not trimmed(block)
    most = plan.peak_bytes - plan.loaders * second_copy_bytes(block)
    monkeypatch.setattr(weights_memory, "rss_bytes", lambda: most)
    assert not trimmed(block)
    monkeypatch.setattr(weights_memory, "rss_bytes", lambda: most + 1)
    assert trimmed(block)


def test_streamed_shards_of_one_structure_leave_the_heap_as_it_is(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[str] = []
    with rigged(small) as rig:
        monkeypatch.setattr(weights_memory.WeightsMemory, "_is_short", lambda _: False)
        monkeypatch.setattr(weights_memory, "rss_bytes", lambda: 0)
        rig.check()
        monkeypatch.setattr(weights_memory, "trim", lambda: trims.append("trim"))
        rig.check(passes=2)
    assert len(trims) <= 1, "all blocks have one structure; closing gives the heap back"


def test_agents_wait_for_each_other_where_the_plan_has_room_for_one_copy(small: Path, monkeypatch: Any) -> None:
    gate = Gate()
    making: list[str] = []

    class Slow(ShardSession):
        def __init__(self, shard: Any, *arguments: Any, **options: Any) -> None:
            if shard.packed:
                making.append(shard.name)
                if len(making) == 1:
                    gate.stop_here()
            super().__init__(shard, *arguments, **options)

    monkeypatch.setattr(loader, "ShardSession", Slow)
    with rigged(small, resident=NAMES, loaders=3) as rig:
        call = rig.submit()
        gate.wait_reached()
        assert rig.pipeline._memory.reservations.reserved_bytes <= rig.pipeline.plan.weights_bytes
        gate.open()
        call.result()
        rig.check()


@pytest.mark.parametrize(("resident", "tells"), [((), False), (NAMES, True)])
def test_passes_whose_agents_pack_do_not_tell_how_much_room_is_left(
    small: Path, monkeypatch: pytest.MonkeyPatch, resident: tuple[str, ...], tells: bool
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(Scripted, "correct", lambda *_, complete: told.append(complete))
    with rigged(small, resident=resident) as rig:
        rig.check(passes=3)
    assert told[-1] == tells
    assert len(told) >= 2
