"""The threads around real shards: what is loaded when, what happens when something fails or ends, what is left."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    EMULATED,
    PATIENCE_S,
    Background,
    Gate,
    agents,
    assert_close,
    assert_same,
    run_sequentially,
)

from pipeload.errors import BudgetError, ClosedError, ConfigError, LoadError, ShardError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest, Shard
from pipeload.format.pages import page_ceil, room_bytes
from pipeload.machine.memory import rss_bytes
from pipeload.pipeline import pipeline as pipelines
from pipeload.pipeline.pipeline import Pipeline
from pipeload.pipeline.requests import Call, Served
from pipeload.pipeline.session import ShardSession, Value, to_array, to_value
from pipeload.pipeline.sweep import Feed
from pipeload.planning.layouts import Range, session_bytes, staying
from pipeload.planning.planner import Plan, make_plan
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.replanner import Replanner
from pipeload.storage.buffers import Buffer, Part
from pipeload.storage.weights import Storage
from pipeload.tracing.trace import Progress, Span, read_bytes

NAMES = ["prologue", *(f"block.{k:03d}" for k in range(6)), "epilogue"]
FAILURES = [OSError("disk"), MemoryError(), SystemExit(3), KeyboardInterrupt()]


class _Storage(Storage):
    """Notes what is read, and lets a test stand in the way."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        super().__init__(directory, manifest)
        self.read: list[str] = []
        self.read_bytes: list[tuple[str, int]] = []
        self.before_read: Callable[[Shard], None] = _nothing

    def read_weights(self, shard: Shard, parts: Sequence[Part], *rest: Any, **options: Any) -> bool:
        self.before_read(shard)
        done = super().read_weights(shard, parts, *rest, **options)
        if done:
            self.read.append(shard.name)
            self.read_bytes.append((shard.name, sum(part.end - part.begin for part in parts)))
        return done


def _nothing(*_: Any) -> None:
    pass


def _plan(
    manifest: Manifest,
    *,
    resident: Sequence[str] = (),
    partly: Mapping[str, Range] | None = None,
    buffers: int = 2,
    loaders: int = 2,
    pass_bytes: int = 0,
    packed: bool = False,
    packed_streamed: bool = False,
) -> Plan:
    """A plan by hand, which adds up."""
    partly = dict(partly or {})
    streamed = [shard for shard in manifest.shards if shard.name not in resident]
    whole = [shard for shard in manifest.shards if shard.name in resident]
    buffers = min(buffers, len(streamed))
    ranges = {shard.name: partly.get(shard.name, (0, shard.nbytes)) for shard in streamed}
    buffer_bytes = max((room_bytes(*part) for part in ranges.values()), default=0)
    weights = sum(page_ceil(shard.nbytes) + session_bytes(1) for shard in whole)
    weights += sum(_staying_bytes(shard, ranges[shard.name]) for shard in streamed)
    weights += buffers * (buffer_bytes * (1 + packed_streamed) + session_bytes(1))
    streamed_bytes = sum(end - begin for begin, end in ranges.values())
    return Plan(
        budget_bytes=10**11,
        loaders=loaders,
        buffers=buffers,
        buffer_bytes=buffer_bytes,
        resident=frozenset(resident),
        partly_resident=partly,
        packed=packed,
        packed_streamed=packed_streamed,
        threads=1,
        process_bytes=10**10,
        pass_bytes=pass_bytes,
        cache_bytes=0,
        resident_bytes=manifest.weight_bytes - streamed_bytes,
        streamed_bytes=streamed_bytes,
        peak_bytes=10**10 + pass_bytes + weights,
    )


def _staying_bytes(shard: Shard, streamed: Range) -> int:
    return sum(room_bytes(*part) for part in staying(shard, streamed))


_SCALE = 10**12
"""Tells what a test says from the bytes of outputs that it keeps."""


class _Scripted(Replanner):
    """Plans as the test says."""

    def __init__(self, manifest: Manifest, replan: Callable[[int, int], Plan]) -> None:
        super().__init__(manifest, Profile(process_bytes=0, cores=1), budget_bytes=10**11, free_bytes=lambda: 10**12)
        self._replan = replan
        self.taught: list[tuple[Plan, list[Span], float]] = []

    def growth_bytes(self, current: Plan, pass_bytes: int, occupied_bytes: int) -> int:
        return 0

    def before_pass(
        self, current: Plan, pass_bytes: int, cache_bytes: int, occupied_bytes: int, *, strict: bool = False
    ) -> Plan:
        # Outputs that the test keeps count too.
        return self._replan(pass_bytes // _SCALE, cache_bytes)

    def after_pass(self, current: Plan, spans: Sequence[Span], seconds: float, kind: object) -> bool:
        self.taught.append((current, list(spans), seconds))
        return False


def _served(values: Mapping[str, Value], pass_bytes: int = 0, cache_bytes: int = 0) -> Served:
    return Served(feed=Feed(pieces=[values]), pass_bytes=pass_bytes, held_bytes=0, cache_bytes=cache_bytes)


class _Rig:
    """A pipeline over a toy, with a storage that notes, and plans that the test makes."""

    def __init__(
        self,
        directory: Path,
        *,
        replan: Callable[[int, int], Plan] | None = None,
        replanner: Callable[[Manifest], tuple[Plan, Replanner]] | None = None,
        progress: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> None:
        self.manifest = manifests.read(directory)
        self.storage = _Storage(directory, self.manifest)
        self.expected = run_sequentially(directory, toys.inputs(), threads=1)
        plan = _plan(self.manifest, **options)
        self.replanner: Any = _Scripted(self.manifest, replan or (lambda *_: plan))
        if replanner is not None:
            plan, self.replanner = replanner(self.manifest)
        self.pipeline = Pipeline(self.manifest, self.storage, plan, self.replanner, progress)
        self.exchange = self.pipeline._exchange

    def submit(self, *, pass_bytes: int = 0, cache_bytes: int = 0) -> Call[dict[str, Value]]:
        values = {name: to_value(array) for name, array in toys.inputs().items()}
        pass_bytes *= _SCALE if isinstance(self.replanner, _Scripted) else 1
        return self.pipeline.submit(_served(values, pass_bytes, cache_bytes))

    def run(self, **needs: int) -> dict[str, Any]:
        return {name: to_array(value) for name, value in self.submit(**needs).result().items()}

    def check(self, passes: int = 1) -> None:
        for _ in range(passes):
            assert_same(self.run(), self.expected)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until the agents have brought something about."""
        with self.exchange._changed:
            assert self.exchange._changed.wait_for(condition, PATIENCE_S), "it never happens"

    def wait_packed(self) -> None:
        """Until every resident shard is packed, and no Loading Agent is busy with it."""
        residents = self.exchange._residents
        self.wait(lambda: all(shard.buffer is None for shard in residents.values()) and not self.exchange._packing)


@contextmanager
def _rig(directory: Path, **options: Any) -> Iterator[_Rig]:
    rig = _Rig(directory, **options)
    try:
        yield rig
    finally:
        rig.pipeline.close()
        assert agents() == []
    if not rig.exchange.cause:
        assert rig.pipeline._budget.reserved_bytes == 0


def _once(error: BaseException, at: str) -> Callable[[Shard], None]:
    armed = [True]

    def fail(shard: Shard) -> None:
        if armed and shard.name == at:
            armed.clear()
            raise error

    return fail


# Order, residence, prefetch


@pytest.mark.parametrize("buffers", [1, 2, 3, 8])
@pytest.mark.parametrize("loaders", [1, 2, 4])
@pytest.mark.parametrize("resident", [(), ("block.001", "block.004"), ("prologue", "epilogue"), tuple(NAMES)])
def test_streamed_passes_equal_sequential_ones_bit_for_bit(
    toy: Path, buffers: int, loaders: int, resident: tuple[str, ...]
) -> None:
    with _rig(toy, buffers=buffers, loaders=loaders, resident=resident) as rig:
        rig.check(passes=4)
        counts = Counter(rig.storage.read)
        # A pass more may have been begun ahead.
        assert {counts[name] for name in NAMES if name in resident} <= {1}
        assert {counts[name] for name in NAMES if name not in resident} <= {4, 5}
        assert rig.pipeline.stats.passes == 4


def test_one_loader_reads_in_plan_order_round_and_round(toy: Path) -> None:
    with _rig(toy, loaders=1, resident=("block.002",)) as rig:
        rig.check(passes=3)
        again = [name for name in NAMES if name != "block.002"]
        order = NAMES + again + again + again
        assert rig.storage.read == order[: len(rig.storage.read)]


def test_the_next_pass_is_read_before_anybody_calls(toy: Path) -> None:
    second = Gate(opened=True)
    with _rig(toy, loaders=1, buffers=2) as rig:
        rig.storage.before_read = lambda _: second.stop_here() if len(rig.storage.read) > len(NAMES) else None
        rig.check()
        second.wait_reached()
        assert rig.storage.read[len(NAMES)] == "prologue"


def test_outputs_are_counted_as_long_as_somebody_keeps_them(toy: Path) -> None:
    with _rig(toy) as rig:
        asked: list[int] = []
        before_pass = rig.replanner.before_pass

        def noting(current: Plan, pass_bytes: int, *others: int, **options: bool) -> Plan:
            asked.append(pass_bytes)
            return before_pass(current, pass_bytes, *others, **options)

        rig.replanner.before_pass = noting
        outputs = rig.run()
        rig.run()
        part = next(iter(outputs.values()))[:1]
        del outputs
        rig.run()
        del part
        rig.run()
        nbytes = sum(array.nbytes for array in rig.expected.values())
        assert asked == [0, nbytes, asked[2], 0]
        assert 0 < asked[2] <= nbytes


def test_reading_begins_before_the_first_call(toy: Path) -> None:
    gate = Gate()
    original = _Storage.read_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _Storage, "read_weights", lambda *args, **options: (gate.stop_here(), original(*args, **options))[1]
        )
        with _rig(toy) as rig:
            gate.wait_reached()
            gate.open()
            rig.check()


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_no_more_sessions_live_than_planned(toy: Path, monkeypatch: pytest.MonkeyPatch, buffers: int) -> None:
    lock, alive, most = threading.Lock(), [0], [0]

    class Counted(ShardSession):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            with lock:
                alive[0] += 1
                most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            with lock:
                alive[0] -= 1

    monkeypatch.setattr(pipelines, "ShardSession", Counted)
    with _rig(toy, loaders=3, buffers=buffers, resident=("block.001",)) as rig:
        rig.check(passes=5)
        assert 2 <= most[0] <= buffers + 1
    assert alive[0] == 0


def test_the_weights_never_exceed_what_the_plan_gives_them(toy: Path) -> None:
    with _rig(toy, loaders=4, buffers=3, resident=("block.003",)) as rig:
        budget = rig.pipeline._budget
        seen: list[int] = []
        rig.storage.before_read = lambda _: seen.append(budget.reserved_bytes)
        rig.check(passes=5)
        assert max(seen) <= budget._limit_bytes
    assert budget.reserved_bytes == 0


def test_threads_have_names(toy: Path) -> None:
    with _rig(toy, loaders=2):
        assert sorted(agents()) == ["pipeload-daemon", "pipeload-inference", "pipeload-loader-0", "pipeload-loader-1"]


# Partly resident shards

LAST, FIRST, MIDDLE = slice(-1, None), slice(None, -1), slice(1, -1)
"""Tensors of a shard that are streamed."""


def _halves(manifest: Manifest, *names: str, streamed: slice = LAST) -> dict[str, Range]:
    """Some tensors of each shard are streamed, and what lies before and behind them is kept."""
    shards = [shard for shard in manifest.shards if shard.name in names and len(shard.tensors) > 1]
    return {shard.name: _range_of(shard, streamed) for shard in shards}


def _range_of(shard: Shard, streamed: slice) -> Range:
    assert shard.weights is not None
    places = [spec.offset - shard.weights.offset for spec in shard.tensors]
    begin, end, _ = streamed.indices(len(places))
    return places[begin], [*places, shard.nbytes][end]


BLOCKS = tuple(NAMES[1:-1])


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("loaders", [1, 2, 4])
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
    with _rig(made_toys(name), resident=resident, partly=halves, buffers=buffers, loaders=loaders) as rig:
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
    with _rig(toy_uneven, partly=halves, buffers=2, loaders=loaders) as rig:
        for _ in range(4):
            rig.check()
        kept = sum(part.buffer.nbytes for parts in rig.pipeline._kept.values() for part in parts)
        rig.wait(
            lambda: (
                rig.pipeline._budget.reserved_bytes <= kept + 2 * (rig.pipeline.plan.buffer_bytes + session_bytes(1))
            )
        )


def test_a_load_of_a_kept_part_that_fails_is_done_again_and_leaks_nothing(toy_uneven: Path) -> None:
    manifest = manifests.read(toy_uneven)
    with _rig(toy_uneven, partly=_halves(manifest, *BLOCKS, streamed=MIDDLE), buffers=1) as rig:
        rig.storage.before_read = _once(OSError("disk"), "block.002")
        with pytest.raises(OSError, match="disk"):
            rig.check()
        rig.check(passes=3)


@pytest.mark.parametrize("at", [4096, -1], ids=["kept", "streamed"])
def test_a_damaged_part_is_found_when_it_is_read_the_first_time(toy_copy: Path, at: int) -> None:
    manifest = manifests.read(toy_copy)
    path = toy_copy / "shards" / "block.002.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    plan = _plan(manifest, partly=_halves(manifest, *BLOCKS))
    pipeline = Pipeline(manifest, _Storage(toy_copy, manifest), plan, _Scripted(manifest, lambda *_: plan))
    try:
        values = {name: to_value(array) for name, array in toys.inputs().items()}
        for _ in range(2):
            with pytest.raises(ShardError, match=r"'shards/block\.002\.safetensors' is damaged"):
                pipeline.submit(_served(values)).result()
    finally:
        pipeline.close()


def test_kept_parts_that_another_plan_does_not_want_leave(toy_uneven: Path) -> None:
    manifest = manifests.read(toy_uneven)
    plans = [
        _plan(manifest, partly=_halves(manifest, *BLOCKS)),
        _plan(manifest, partly=_halves(manifest, "block.001", "block.002"), resident=("block.003",), pass_bytes=1),
        _plan(manifest, resident=BLOCKS[:4], pass_bytes=2),
        _plan(manifest, pass_bytes=3),
    ]
    with _rig(toy_uneven, partly=_halves(manifest, *BLOCKS), replan=lambda pass_bytes, _: plans[pass_bytes]) as rig:
        for number in (0, 1, 0, 2, 1, 3, 0, 0):
            for _ in range(2):
                assert_same(rig.run(pass_bytes=number), rig.expected)
            kept = {manifest.shards[index].name for index in rig.pipeline._kept}
            assert kept == set(plans[number].partly_resident)
            staying = {manifest.shards[index].name for index in rig.exchange.residents}
            assert staying == plans[number].resident
            assert rig.pipeline._budget.reserved_bytes <= plans[number].weights_bytes


# Packing


@pytest.mark.parametrize("loaders", [1, 2])
@pytest.mark.parametrize("last", [1, 2], ids=["a block is last", "the epilogue is last"])
def test_the_smallest_budget_for_packing_does_not_hang(toy: Path, loaders: int, last: int) -> None:
    manifest = manifests.read(toy)
    manifest = replace(manifest, shards=manifest.shards[: len(manifest.shards) - 2 + last])
    if last == 1:
        manifest = replace(manifest, outputs=tuple(e for e in manifest.edges if e.name == "hidden.6"))
    profile = Profile(process_bytes=10**6, cores=1)

    def plan(budget_bytes: int) -> Plan:
        return make_plan(manifest, profile, budget_bytes=budget_bytes, pass_bytes=0, loaders=loaders)

    # Two megabytes are not planned for.
    exact = plan(plan(10**10).peak_bytes + 2 * 10**6)
    assert exact.packed
    pipeline = Pipeline(manifest, Storage(toy, manifest), exact, _Scripted(manifest, lambda *_: exact))
    try:
        values = {name: to_value(array) for name, array in toys.inputs().items()}
        for _ in range(3):
            pipeline.submit(_served(values)).result()
        assert pipeline._budget.reserved_bytes <= pipeline._budget._limit_bytes
    finally:
        pipeline.close()


@pytest.mark.parametrize("resident", [tuple(NAMES), ("prologue", *BLOCKS[:3])], ids=["all", "some"])
def test_residents_are_packed_behind_the_passes_from_memory(toy: Path, resident: tuple[str, ...]) -> None:
    gate = Gate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines, "ShardSession", _gated_packing(gate))
        with _rig(toy, resident=resident, packed=True) as rig:
            # Nothing is packed yet, so the answer is the sequential one's.
            rig.check()
            gate.wait_reached()
            rig.check()
            reserved = rig.pipeline._budget.reserved_bytes
            buffers = [shard.buffer for shard in rig.exchange.residents.values()]
            assert len(buffers) == len(resident)
            gate.open()
            rig.wait_packed()
            for _ in range(3):
                assert_close(rig.run(), rig.expected, 1e-5)
            # The packed copies stand for the bytes, and the memory of what was read is given back.
            rig.wait(lambda: all(buffer is not None and buffer._map.closed for buffer in buffers))
            if len(resident) == len(NAMES):
                assert rig.pipeline._budget.reserved_bytes == reserved
            counts = Counter(rig.storage.read)
            assert {counts[name] for name in resident} == {1}
            packs = [span.shard for span in rig.pipeline.trace.spans if span.kind == "pack"]
            assert sorted(packs) == sorted(resident)


def _gated_packing(gate: Gate, at: str = "") -> type[ShardSession]:
    """Sessions that stop at a gate before they are packed."""

    class Gated(ShardSession):
        def __init__(self, shard: Shard, *arguments: Any, **options: Any) -> None:
            if options.get("packed") and at in shard.name:
                gate.stop_here()
            super().__init__(shard, *arguments, **options)

    return Gated


def test_streamed_shards_that_are_packed_agree(toy: Path) -> None:
    with _rig(toy, packed_streamed=True) as rig:
        for _ in range(4):
            assert_close(rig.run(), rig.expected, 1e-5)
        kinds = Counter(span.kind for span in rig.pipeline.trace.spans)
        assert kinds["pack"] >= 4 * len(NAMES)
        assert kinds["session"] == 0


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failed_packing_reaches_the_caller_once_and_is_not_tried_again(
    toy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(pipelines, "ShardSession", _failing_sessions("pack", error, "block.003"))
    with _rig(toy, resident=NAMES, packed=True) as rig:
        rig.check()
        rig.wait(lambda: rig.exchange._packing_error is not None)
        with pytest.raises(type(error)) as caught:
            rig.run()
        assert caught.value is error
        for _ in range(4):
            assert_close(rig.run(), rig.expected, 1e-5)
        assert not rig.exchange.packing
        assert [name for name in NAMES if rig.exchange.residents[NAMES.index(name)].buffer is None] == NAMES[:4]
        assert Counter(rig.storage.read) == dict.fromkeys(NAMES, 1)


def test_closing_while_a_shard_is_packed_ends_all_threads(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr(pipelines, "ShardSession", _gated_packing(gate, "block.002"))
    with _rig(toy, resident=NAMES, packed=True) as rig:
        rig.check()
        gate.wait_reached()
        closing = Background(rig.pipeline.close)
        rig.wait(lambda: rig.exchange.closed)
        assert closing.is_alive(), "a thread still packs"
        gate.open()
        closing.end()
        assert agents() == []


def test_a_reset_waits_for_packing_and_forgets_what_comes_too_late(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, armed = Gate(), threading.Event()

    class Failing(_gated_packing(gate, "block.002")):  # type: ignore[misc]
        def run(self, *arguments: Any) -> Any:
            if armed.is_set():
                armed.clear()
                raise OSError("disk")
            return super().run(*arguments)

    monkeypatch.setattr(pipelines, "ShardSession", Failing)
    with _rig(toy, resident=NAMES, packed=True) as rig:
        rig.check()
        gate.wait_reached()
        armed.set()
        call = Background(rig.run)
        rig.wait(lambda: rig.exchange.stopped)
        assert call.is_alive()
        gate.open()
        with pytest.raises(OSError, match="disk"):
            call.end()
        rig.run()
        rig.wait_packed()
        assert_close(rig.run(), rig.expected, 1e-5)


def test_a_plan_without_packing_makes_packed_shards_leave(toy: Path) -> None:
    manifest = manifests.read(toy)
    plans = [_plan(manifest, resident=NAMES, packed=packed, pass_bytes=packed) for packed in (False, True)]
    with _rig(toy, resident=NAMES, replan=lambda pass_bytes, _: plans[pass_bytes]) as rig:
        rig.check()
        assert_close(rig.run(pass_bytes=1), rig.expected, 1e-5)
        rig.wait_packed()
        # Those that are not packed serve a plan that is: nothing is read again.
        assert Counter(rig.storage.read) == dict.fromkeys(NAMES, 1)
        rig.check(passes=2)
        assert Counter(rig.storage.read) == dict.fromkeys(NAMES, 2)


# Failures


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", ["prologue", "block.003", "epilogue"])
@pytest.mark.parametrize("resident", [(), ("block.003",)])
def test_a_failed_read_reaches_the_caller_and_the_next_call_works(
    toy: Path, error: BaseException, at: str, resident: tuple[str, ...]
) -> None:
    with _rig(toy, resident=resident) as rig:
        rig.storage.before_read = _once(error, at)
        with pytest.raises(type(error)) as caught:
            rig.check(passes=3)
        assert caught.value is error
        rig.check(passes=2)


def _failing_sessions(method: str, error: BaseException, at: str) -> type[ShardSession]:
    fail = _once(error, at)

    class Failing(ShardSession):
        def __init__(self, shard: Shard, *arguments: Any, **options: Any) -> None:
            if method == "make" or (method == "pack" and options.get("packed")):
                fail(shard)
            super().__init__(shard, *arguments, **options)
            self._shard = shard

        def run(self, *arguments: Any) -> Any:
            if method == "run":
                fail(self._shard)
            return super().run(*arguments)

    return Failing


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("method", ["make", "run"])
@pytest.mark.parametrize("at", ["prologue", "block.003", "epilogue"])
def test_a_failed_session_reaches_the_caller_and_the_next_call_works(
    toy: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException, at: str
) -> None:
    monkeypatch.setattr(pipelines, "ShardSession", _failing_sessions(method, error, at))
    with _rig(toy) as rig:
        with pytest.raises(type(error)) as caught:
            rig.check(passes=3)
        assert caught.value is error
        rig.check(passes=2)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failure_while_freeing_closes_with_its_cause(
    toy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    armed = [True]
    with _rig(toy) as rig:
        pool = rig.pipeline._pool

        def give(buffer: Buffer) -> None:
            if armed and threading.current_thread().name == "pipeload-daemon":
                armed.clear()
                raise error
            buffer.close()

        monkeypatch.setattr(pool, "give", give)
        for _ in range(2):
            with pytest.raises(ClosedError) as caught:
                rig.check(passes=3)
            assert caught.value.__cause__ is error


def test_a_model_that_vanished_is_not_tried_again_until_somebody_calls(toy_copy: Path) -> None:
    tries: list[str] = []
    with _rig(toy_copy, loaders=2) as rig:
        rig.check()
        rig.storage.before_read = lambda shard: tries.append(shard.name)
        (toy_copy / "shards").rename(toy_copy / "away")
        for _ in range(3):
            with pytest.raises(ShardError, match="cannot be read"):
                rig.check(passes=3)
        (toy_copy / "away").rename(toy_copy / "shards")
        with suppress(ShardError):
            # What was tried ahead, before the files came back, may fail once more.
            rig.check()
        rig.check()
    assert len(tries) < 60


def test_a_load_that_fails_gives_its_reservation_back(toy_copy: Path) -> None:
    with _rig(toy_copy, buffers=1) as rig:
        path = toy_copy / "shards" / "block.002.safetensors"
        content = path.read_bytes()
        for _ in range(10):
            path.write_bytes(content[:-1])
            with pytest.raises(ShardError, match=r"block\.002\.safetensors"):
                rig.check(passes=2)
            path.write_bytes(content)
            with suppress(ShardError):
                rig.check()
            rig.check()


def test_a_thread_that_cannot_start_leaves_none_behind(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start
    calls = iter(range(10))

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("pipeload-") and next(calls) == 2:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        _Rig(toy)
    assert agents() == []


# Closing


def test_closing_without_a_call_ends_all_threads(toy: Path) -> None:
    with _rig(toy) as rig:
        rig.pipeline.close()
        assert agents() == []
        rig.pipeline.close()
        with pytest.raises(ClosedError):
            rig.run()


def test_closing_while_a_shard_is_read_ends_the_call(toy: Path) -> None:
    gate = Gate()
    with _rig(toy) as rig:
        rig.storage.before_read = lambda shard: gate.stop_here() if shard.name == "block.003" else None
        calls = [Background(rig.check, 5) for _ in range(3)]
        gate.wait_reached()
        closing = Background(rig.pipeline.close)
        with pytest.raises(ClosedError):
            calls[0].end()
        assert all(isinstance(call.wait(), ClosedError) for call in calls)
        assert closing.is_alive(), "a thread still reads"
        gate.open()
        closing.end()
        assert agents() == []


def test_closing_while_a_shard_runs_ends_the_call(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    class Gated(ShardSession):
        def run(self, *arguments: Any) -> Any:
            gate.stop_here()
            return super().run(*arguments)

    monkeypatch.setattr(pipelines, "ShardSession", Gated)
    with _rig(toy) as rig:
        calls = [Background(rig.check) for _ in range(3)]
        gate.wait_reached()
        closing = Background(rig.pipeline.close)
        while not rig.pipeline._exchange.closed:
            rig.pipeline._exchange.notify()
        gate.open()
        closing.end()
        assert all(isinstance(call.wait(), ClosedError) for call in calls)


def test_closing_while_all_wait_for_budget_ends_all_threads(toy: Path) -> None:
    with _rig(toy, buffers=1, loaders=4) as rig:
        rig.check()


@pytest.mark.parametrize("seed", range(8))
def test_closing_at_any_moment_leaves_nothing(toy: Path, seed: int) -> None:
    """The n-th time that anything is read, the pipeline is closed from another thread."""
    moment = Gate()
    reads = iter(range(1000))
    with _rig(toy, buffers=1 + seed % 3) as rig:
        rig.storage.before_read = lambda _: moment.stop_here() if next(reads) == 3 * seed else None
        calls = [Background(rig.check, 10) for _ in range(2)]
        moment.wait_reached()
        closing = Background(rig.pipeline.close)
        moment.open()
        closing.end()
        assert all(isinstance(call.wait(), ClosedError) for call in calls)
    assert rig.pipeline._budget.reserved_bytes == 0


def test_several_may_close_at_once(toy: Path) -> None:
    with _rig(toy) as rig:
        rig.check()
        barrier = threading.Barrier(4)

        def close() -> list[str]:
            barrier.wait(PATIENCE_S)
            rig.pipeline.close()
            return agents()

        for call in [Background(close) for _ in range(4)]:
            assert call.end() == [], "close returned before the threads had ended"


# Stop and resume


def test_the_daemon_stops_and_resumes_the_loaders_when_memory_is_short(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[bool] = []
    trims: list[str] = []
    with _rig(toy) as rig:
        exchange = rig.pipeline._exchange
        real = exchange.signal_memory
        monkeypatch.setattr(exchange, "signal_memory", lambda *, short: (signals.append(short), real(short=short)))
        monkeypatch.setattr(pipelines, "trim", lambda: trims.append(threading.current_thread().name))
        rig.check(passes=2)
        assert signals == []
        monkeypatch.setattr(pipelines, "rss_bytes", lambda: rig.pipeline.plan.budget_bytes)
        rig.check(passes=2)
        assert "pipeload-daemon" in trims
        assert True in signals
        monkeypatch.setattr(pipelines, "rss_bytes", lambda: 0)
        rig.check(passes=2)
    assert not exchange._short


# Other plans


def test_a_pass_that_needs_more_makes_residents_leave(toy: Path) -> None:
    manifest = manifests.read(toy)
    small, large = ("block.001", "block.003", "block.005"), ("block.003",)

    def replan(pass_bytes: int, _: int) -> Plan:
        return _plan(manifest, resident=large if pass_bytes else small, pass_bytes=pass_bytes)

    with _rig(toy, resident=small, replan=replan) as rig:
        rig.check(passes=2)
        for _ in range(2):
            assert_same(rig.run(pass_bytes=5), rig.expected)
        assert rig.pipeline.plan.resident == {"block.003"}
        assert set(rig.exchange.residents) == {4}
        rig.storage.read.clear()
        assert_same(rig.run(pass_bytes=5), rig.expected)
        counts = Counter(rig.storage.read)
        assert "block.003" not in counts
        rig.check(passes=2)
        assert set(rig.exchange.residents) == {2, 4, 6}


def test_other_buffer_sizes_take_effect(toy: Path) -> None:
    manifest = manifests.read(toy)

    def replan(pass_bytes: int, _: int) -> Plan:
        resident = (BLOCKS, (), ("prologue", *BLOCKS[:3]))[pass_bytes]
        return _plan(manifest, resident=resident, pass_bytes=pass_bytes, buffers=1 + pass_bytes)

    with _rig(toy, resident=BLOCKS, buffers=1, replan=replan) as rig:
        rig.check(passes=2)
        for pass_bytes in (1, 2):
            for _ in range(2):
                assert_same(rig.run(pass_bytes=pass_bytes), rig.expected)
            plan = rig.pipeline.plan
            kept = [page_ceil(s.nbytes) for s in manifest.shards if s.name in plan.resident]
            limit = sum(kept) + plan.buffers * plan.buffer_bytes + (len(kept) + plan.buffers) * session_bytes(1)
            assert plan.weights_bytes == limit
            assert rig.pipeline._budget.reserved_bytes <= limit


def test_loading_agents_come_when_a_plan_wants_more_and_wait_when_it_wants_fewer(toy: Path) -> None:
    manifest = manifests.read(toy)
    plans = [_plan(manifest, loaders=loaders, buffers=4, pass_bytes=k) for k, loaders in enumerate((1, 3, 2))]
    lock, now, most = threading.Lock(), [0], [0]

    def before(_: Shard) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.stop_here()
        with lock:
            now[0] -= 1

    def start(*arguments: Any) -> None:
        nonlocal together
        together, most[0] = Gate(), 0
        real_start(*arguments)
        started.release()

    together, started = Gate(opened=True), threading.Semaphore(0)
    with _rig(toy, loaders=1, buffers=4, replan=lambda pass_bytes, _: plans[pass_bytes]) as rig:
        rig.check()
        assert {name for name in agents() if "loader" in name} == {"pipeload-loader-0"}
        rig.storage.before_read = before
        real_start, rig.exchange.start = rig.exchange.start, start  # type: ignore[method-assign]
        # All that may read at the same time do, and nobody else, until they are let go on.
        for number, loaders in ((1, 3), (2, 2), (0, 1), (1, 3)):
            call = rig.submit(pass_bytes=number)
            assert started.acquire(timeout=PATIENCE_S)
            for _ in range(loaders):
                together.wait_reached()
            with rig.exchange._changed:
                assert not rig.exchange._may_draw(), "another one would begin"
            together.open()
            result = {name: to_array(value) for name, value in call.result().items()}
            assert_same(result, rig.expected)
            assert most[0] <= loaders
        assert len([name for name in agents() if "loader" in name]) == 3


def test_a_pass_that_does_not_fit_is_refused_and_the_next_works(toy: Path) -> None:
    manifest = manifests.read(toy)

    def replan(pass_bytes: int, _: int) -> Plan:
        if pass_bytes:
            raise BudgetError("too large", needed_bytes=2, budget_bytes=1)
        return _plan(manifest)

    with _rig(toy, replan=replan) as rig:
        rig.check()
        for _ in range(2):
            with pytest.raises(BudgetError, match="too large"):
                rig.run(pass_bytes=5)
            rig.check(passes=2)
        assert rig.pipeline.plan.pass_bytes == 0


def test_what_passes_teach_is_taken_from_their_own_spans(toy: Path) -> None:
    with _rig(toy, resident=("block.001",)) as rig:
        rig.check(passes=3)
        # A call that runs no shard teaches nothing.
        rig.pipeline.set_budget(10**11)
        Call(rig.exchange, _nothing).result()
        learned = rig.replanner.taught
        assert len(learned) == 3
        for number, (plan, spans, seconds) in enumerate(learned, start=1):
            assert plan.resident == {"block.001"}
            runs = [span for span in spans if span.kind == "run" and span.pass_number == number]
            assert [span.shard for span in runs] == NAMES
            assert seconds >= runs[-1].end_s - runs[0].begin_s


def test_a_lesson_may_change_the_plan_before_the_next_call(toy: Path) -> None:
    manifest = manifests.read(toy)
    plans = [_plan(manifest), _plan(manifest, resident=BLOCKS)]

    class Learning(_Scripted):
        def after_pass(self, *arguments: Any) -> bool:
            super().after_pass(*arguments)
            return len(self.taught) == 1

    def replanner(_: Manifest) -> tuple[Plan, Replanner]:
        made = Learning(manifest, lambda *_: plans[len(made.taught) > 0])
        return plans[0], made

    with _rig(toy, replanner=replanner) as rig:
        rig.check()
        # Nobody calls: the agents begin to read what is to stay.
        rig.wait(lambda: rig.pipeline.plan is plans[1])
        rig.check(passes=2)
        assert set(rig.exchange.residents) == set(range(1, 7))


# Budgets


class _Unlearning(Replanner):
    """Does not learn, so that plans depend on budgets and needs only; tells when it was asked."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.asked = threading.Semaphore(0)

    def before_pass(self, *arguments: Any, **options: Any) -> Plan:
        try:
            return super().before_pass(*arguments, **options)
        finally:
            self.asked.release()

    def after_pass(self, *_: Any) -> bool:
        return False


def _profile(manifest: Manifest) -> Profile:
    """Reading takes longest, and packing gains nothing."""
    times = ShardTimes(session_s=1e-4, run_s=1e-4, loading_run_s=1e-4, pack_s=1e-2, packed_run_s=1e-4)
    shards = {shard.name: times for shard in manifest.shards}
    return Profile(process_bytes=rss_bytes(), cores=1, read_bytes_per_s={1: 1e9, 2: 1.2e9}, times={1: shards})


def _budgets(manifest: Manifest, profile: Profile) -> list[int]:
    """From one buffer to everything resident, nothing packed."""

    def plan(budget: int) -> Plan:
        return make_plan(manifest, profile, budget_bytes=budget, pass_bytes=10**6)

    with pytest.raises(BudgetError) as caught:
        plan(1)
    least = caught.value.needed_bytes
    everything = next(b for b in range(least, least + 10**9, 10**6) if not plan(b).streamed_bytes)
    assert not plan(everything).packed
    return [least, (least + everything) // 2, everything]


@contextmanager
def _budgeted(directory: Path, which: int) -> Iterator[tuple[_Rig, list[int], list[int]]]:
    """A rig under one of the budgets; the budgets, and what is free, which the test may change."""
    profile = _profile(manifests.read(directory))
    budgets = _budgets(manifests.read(directory), profile)
    free = [10**12]

    def replanner(manifest: Manifest) -> tuple[Plan, Replanner]:
        made = _Unlearning(manifest, profile, budget_bytes=budgets[which], free_bytes=lambda: free[0])
        return made.plan(10**6, 0), made

    with _rig(directory, replanner=replanner) as rig:
        yield rig, budgets, free


def test_a_smaller_budget_gives_memory_back_before_it_returns(toy_large: Path) -> None:
    with _budgeted(toy_large, 2) as (rig, budgets, _):
        rig.check(passes=2)
        assert len(rig.exchange.residents) == 10
        buffers = {index: shard.buffer for index, shard in rig.exchange.residents.items()}
        before = rss_bytes()
        rig.pipeline.set_budget(budgets[0])
        plan = rig.pipeline.plan
        assert plan.peak_bytes <= plan.budget_bytes == budgets[0]
        assert set(rig.exchange.residents) <= {
            index for index, shard in enumerate(rig.manifest.shards) if shard.name in plan.resident
        }
        gone = [buffer for index, buffer in buffers.items() if index not in rig.exchange.residents]
        assert len(gone) >= 8
        assert all(buffer is not None and buffer._map.closed for buffer in gone)
        # Reading may have begun anew, into as many buffers as the plan has.
        dropped = sum(buffer.nbytes for buffer in gone if buffer)
        assert EMULATED or before - rss_bytes() > 0.8 * (dropped - plan.buffers * plan.buffer_bytes)
        rig.check(passes=2)


def test_a_larger_budget_is_used(toy_large: Path) -> None:
    with _budgeted(toy_large, 0) as (rig, budgets, _):
        rig.check(passes=2)
        residents = set(rig.exchange.residents)
        for budget in budgets[1:]:
            rig.pipeline.set_budget(budget)
            rig.check(passes=2)
            assert residents < set(rig.exchange.residents)
            residents = set(rig.exchange.residents)
        assert len(residents) == 10
        rig.storage.read.clear()
        rig.check(passes=2)
        assert rig.storage.read == []


def test_a_budget_that_cannot_work_is_refused_and_the_old_one_stays(toy_large: Path) -> None:
    with _budgeted(toy_large, 1) as (rig, budgets, _):
        rig.check()
        before = rig.pipeline.plan
        with pytest.raises(BudgetError) as caught:
            rig.pipeline.set_budget(budgets[0] - 5_000_000)
        assert caught.value.needed_bytes == pytest.approx(budgets[0], abs=2e6)
        assert rig.pipeline.plan == before
        rig.check(passes=2)
        assert rig.pipeline.plan.layout == before.layout
        assert rig.pipeline.plan.budget_bytes == budgets[1]


def test_budgets_change_while_passes_run(toy_large: Path) -> None:
    with _budgeted(toy_large, 2) as (rig, budgets, _):
        calls = [Background(rig.check, 12) for _ in range(2)]
        for number in range(12):
            rig.pipeline.set_budget(budgets[number % 3])
            assert rig.pipeline.plan.budget_bytes == budgets[number % 3]
        for call in calls:
            call.end()
        assert rig.pipeline.stats.passes <= 24


@pytest.mark.parametrize("seed", range(4))
def test_everything_at_once(toy_large: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Callers, changing needs and budgets, memory that comes and goes, withdrawn calls, learning and packing."""
    monkeypatch.setattr(pipelines, "_WATCH_S", 0.001)
    manifest = manifests.read(toy_large)
    process = rss_bytes()
    least, _, everything = _budgets(manifest, _profile(manifest))
    budgets = [least + 3_000_000, (least + everything) // 2, everything, everything + 40_000_000]
    random = np.random.default_rng(seed)
    free = [10**12]

    def replanner(_: Manifest) -> tuple[Plan, Replanner]:
        made = Replanner(
            manifest, Profile(process_bytes=process, cores=1), budget_bytes=budgets[2], free_bytes=lambda: free[0]
        )
        return made.plan(10**6, 0), made

    with _rig(toy_large, replanner=replanner) as rig:

        def call(needs: list[int]) -> None:
            for need in needs:
                assert_close(rig.run(pass_bytes=10**6 + need), rig.expected, 1e-5)

        def set_budgets(order: list[int]) -> None:
            for which in order:
                rig.pipeline.set_budget(budgets[which])

        def swing(amounts: list[int]) -> None:
            for amount in amounts:
                free[0] = amount
                rig.run()

        def give_up(times: int) -> None:
            for _ in range(times):
                waiting = rig.submit()
                waiting.withdraw()

        threads = [
            Background(call, random.choice([0, 10**6], 8).tolist()),
            Background(call, random.choice([0, 10**6], 8).tolist()),
            Background(set_budgets, random.integers(0, 4, 8).tolist()),
            Background(swing, random.choice([budgets[0], budgets[1], 10**12], 8).tolist()),
            Background(give_up, 8),
        ]
        for thread in threads:
            thread.end()
        free[0] = 10**12
        plan = rig.pipeline.plan
        assert plan.peak_bytes <= plan.budget_bytes
        assert rig.pipeline._budget.reserved_bytes <= rig.pipeline._budget._limit_bytes


def test_closing_during_set_budget_ends_it(toy: Path) -> None:
    gate = Gate()
    with _rig(toy) as rig:
        rig.storage.before_read = lambda shard: gate.stop_here() if shard.name == "block.003" else None
        call = Background(rig.check)
        gate.wait_reached()
        setting = Background(rig.pipeline.set_budget, 10**11)
        closing = Background(rig.pipeline.close)
        assert isinstance(setting.wait(), ClosedError)
        gate.open()
        closing.end()
        assert isinstance(call.wait(), ClosedError)
        with pytest.raises(ClosedError):
            rig.pipeline.set_budget(10**11)


def test_an_idle_model_gives_memory_back_when_it_becomes_short(
    toy_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "_WATCH_S", 0.001)
    with _budgeted(toy_large, 2) as (rig, budgets, free):
        rig.check(passes=2)
        replanner = rig.replanner
        # One for each call: whatever comes now is the Daemon's doing.
        assert [replanner.asked.acquire(timeout=PATIENCE_S) for _ in range(2)] == [True, True]
        free[0] = budgets[0]
        assert replanner.asked.acquire(timeout=PATIENCE_S)
        Call(rig.exchange, _nothing).result()
        plan = rig.pipeline.plan
        assert plan.peak_bytes <= plan.budget_bytes <= budgets[0]
        assert len(rig.exchange.residents) <= len(plan.resident) < 10
        rig.check(passes=20)
        assert rig.pipeline.plan.budget_bytes <= budgets[0], "memory is still short"
        free[0] = 10**12
        rig.check(passes=20)
        assert len(rig.exchange.residents) == 10


def test_an_idle_model_with_memory_to_spare_is_left_alone(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "_WATCH_S", 0.001)
    watched = Gate(opened=True)
    with _budgeted(toy, 2) as (rig, _, _):
        real = rig.replanner.limit_bytes
        monkeypatch.setattr(rig.replanner, "limit_bytes", lambda plan: (watched.stop_here(), real(plan))[1])
        rig.check()
        plan = rig.pipeline.plan
        for _ in range(5):
            watched.wait_reached()
        assert rig.pipeline.plan is plan


# What happened


def test_statistics_add_up(toy: Path) -> None:
    with _rig(toy) as rig:
        assert rig.pipeline.stats.passes == 0
        assert rig.pipeline.stats.first_pass_s is None
        assert rig.pipeline.stats.last is None
        rig.check(passes=3)
        stats = rig.pipeline.stats
        assert stats.passes == 3
        assert stats.first_pass_s is not None
        assert stats.last is not None
        assert stats.last_pass_s == stats.last.seconds
        assert stats.budget_bytes == rig.pipeline.plan.budget_bytes
        assert stats.read_bytes >= 3 * rig.manifest.weight_bytes
        assert stats.peak_bytes > 0
        assert {"inference", "loader-0", "loader-1"} <= stats.last.agents.keys()
    assert rig.pipeline.stats.read_bytes == sum(nbytes for _, nbytes in rig.storage.read_bytes)


def test_the_trace_tells_what_every_agent_did(toy: Path) -> None:
    with _rig(toy, resident=NAMES[:-1], loaders=2) as rig:
        rig.check(passes=3)
        rig.wait(lambda: not rig.exchange._retired)
        spans = rig.pipeline.trace.spans
        # The last shard of a pass that nobody called for may be on its way.
        known = [span for span in spans if span.pass_number <= 3]
        assert {span.agent for span in known} <= {"inference", "loader-0", "loader-1", "daemon"}
        reads = [span for span in known if span.kind == "read"]
        assert read_bytes(reads) == rig.manifest.weight_bytes + 2 * rig.manifest.shards[-1].nbytes
        for kind in ("reserve", "session"):
            assert Counter(span.shard for span in known if span.kind == kind) == Counter(s.shard for s in reads)
        runs = [span for span in known if span.kind == "run"]
        assert [span.shard for span in runs] == NAMES * 3
        assert [span.pass_number for span in runs] == [1] * 8 + [2] * 8 + [3] * 8
        assert {span.shard for span in known if span.kind == "free"} == {"epilogue"}
        # Nothing runs before it was read and made.
        ready = {(s.shard, s.pass_number): s.end_s for s in known if s.kind == "session"}
        for run in runs:
            assert run.begin_s >= ready.get((run.shard, run.pass_number), 0)
        counters = {sample.counter for sample in rig.pipeline.trace.samples}
        assert counters == {"buffers", "reserved_bytes", "rss_bytes"}


def test_progress_is_told_after_each_shard(toy: Path) -> None:
    told: list[Progress] = []
    with _rig(toy, progress=told.append) as rig:
        rig.check(passes=2)
        total = rig.manifest.weight_bytes
        done = np.cumsum([shard.nbytes for shard in rig.manifest.shards]).tolist()
    assert [(one.shard, one.index, one.count) for one in told] == [
        (name, index, len(NAMES)) for index, name in enumerate(NAMES, start=1)
    ] * 2
    for one in (told[:8], told[8:]):
        elapsed = [progress.elapsed_s for progress in one]
        assert elapsed == sorted(elapsed)
    for progress, nbytes in zip(told, done * 2, strict=True):
        assert progress.eta_s == pytest.approx(progress.elapsed_s * (total - nbytes) / nbytes)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_an_error_in_the_progress_callback_reaches_the_caller(toy: Path, error: BaseException) -> None:
    armed = [True]

    def fail(progress: Progress) -> None:
        if armed and progress.index == 4:
            armed.clear()
            raise error

    with _rig(toy, progress=fail, resident=("block.002",)) as rig:
        with pytest.raises(type(error)) as caught:
            rig.run()
        assert caught.value is error
        rig.check(passes=2)


@pytest.mark.parametrize("call", ["run", "set_budget"])
def test_the_progress_callback_cannot_wait_for_another_pass(toy: Path, call: str) -> None:
    def again(_: Progress) -> None:
        rig.run() if call == "run" else rig.pipeline.set_budget(10**11)

    with _rig(toy, progress=again) as rig, pytest.raises(ConfigError, match="runs inside a pass"):
        rig.run()


def test_the_progress_callback_may_close_the_pipeline(toy: Path) -> None:
    closed: list[bool] = []

    def close(_: Progress) -> None:
        rig.pipeline.close()
        closed.append(True)

    with _rig(toy, progress=close) as rig:
        with pytest.raises(ClosedError):
            rig.run()
        assert closed == [True]
        for thread in threading.enumerate():
            if thread.name == "pipeload-closer":
                thread.join(PATIENCE_S)


def test_a_shard_that_onnxruntime_refuses_is_named(toy_copy: Path) -> None:
    manifest = manifests.read(toy_copy)
    graph = toy_copy / manifest.shards[2].graph.path
    with _rig(toy_copy) as rig:
        rig.check()
        # Same size, so only onnxruntime can notice; its hash was checked at the first load.
        graph.write_bytes(b"\xff" * graph.stat().st_size)
        with pytest.raises(LoadError, match=r"refused shard 'block\.001'"):
            rig.check(passes=2)
        np.testing.assert_equal(rig.pipeline._budget.reserved_bytes, 0)


# Sweeps that serve several calls


def _values(seed: int = 0, batch: int = 2, length: int = 5) -> dict[str, Value]:
    return {name: to_value(array) for name, array in toys.inputs(batch, length, seed).items()}


@contextmanager
def _while_one_runs(rig: _Rig, then: Callable[[Shard], None] = _nothing) -> Iterator[Call[dict[str, Value]]]:
    """A call that runs, and has not got beyond its first shard; `then` is called before later reads."""
    gate = Gate()
    rig.pipeline._progress = lambda _: gate.stop_here()
    running = rig.submit()
    gate.wait_reached()
    try:
        yield running
    finally:
        rig.storage.before_read = then
        rig.pipeline._progress = None
        gate.open()


def test_calls_that_wait_are_served_by_one_sweep(toy: Path) -> None:
    with _rig(toy) as rig:
        with _while_one_runs(rig) as running:
            calls = [rig.pipeline.submit(_served(_values(seed, batch=1 + seed))) for seed in range(4)]
        assert_same({name: to_array(value) for name, value in running.result().items()}, rig.expected)
        for seed, call in enumerate(calls):
            found = {name: to_array(value) for name, value in call.result().items()}
            assert_same(found, run_sequentially(toy, toys.inputs(1 + seed, 5, seed), threads=1))
        assert rig.pipeline.stats.passes == 2
        rig.check()


def test_while_nothing_is_streamed_each_call_has_its_own_sweep(toy: Path) -> None:
    with _rig(toy, resident=NAMES) as rig:
        with _while_one_runs(rig):
            calls = [rig.submit() for _ in range(3)]
        for call in calls:
            call.result()
        assert rig.pipeline.stats.passes == 4


def test_a_call_that_fails_hinders_none_of_the_others_in_its_sweep(toy: Path) -> None:
    with _rig(toy) as rig:
        wrong = _values()
        wrong["input_ids"] = to_value(np.full((2, 5), 10**6))
        with _while_one_runs(rig):
            calls = [rig.submit(), rig.pipeline.submit(_served(wrong)), rig.submit(), rig.submit()]
        calls[3].withdraw()
        for call in (calls[0], calls[2]):
            assert_same({name: to_array(value) for name, value in call.result().items()}, rig.expected)
        with pytest.raises(ConfigError, match="out of range"):
            calls[1].result()
        rig.check(passes=2)


def test_the_first_call_of_a_sweep_may_fail_too(toy: Path) -> None:
    with _rig(toy) as rig:
        wrong = _values()
        wrong["input_ids"] = to_value(np.full((2, 5), 10**6))
        with _while_one_runs(rig):
            calls = [rig.pipeline.submit(_served(wrong)), rig.submit()]
        with pytest.raises(ConfigError, match="out of range"):
            calls[0].result()
        assert_same({name: to_array(value) for name, value in calls[1].result().items()}, rig.expected)
        rig.check(passes=2)


def test_a_shard_that_cannot_be_had_fails_all_calls_of_its_sweep(toy: Path) -> None:
    reads = count(1)

    def fail(shard: Shard) -> None:
        if shard.name == "block.003" and next(reads) == 2:
            raise OSError("disk")

    with _rig(toy) as rig:
        with _while_one_runs(rig, fail) as running:
            calls = [rig.submit() for _ in range(3)]
        assert_same({name: to_array(value) for name, value in running.result().items()}, rig.expected)
        for call in calls:
            with pytest.raises(OSError, match="disk"):
                call.result()
        rig.check(passes=2)


def test_calls_that_do_not_fit_together_are_served_one_by_one(toy: Path) -> None:
    manifest = manifests.read(toy)
    plan = _plan(manifest)

    def replan(pass_bytes: int, _: int) -> Plan:
        if pass_bytes > 1:
            raise BudgetError("too much", needed_bytes=2, budget_bytes=1)
        return plan

    with _rig(toy, replan=replan) as rig:
        values = _values()
        with _while_one_runs(rig):
            calls = [
                rig.pipeline.submit(
                    Served(feed=Feed(pieces=[values]), pass_bytes=_SCALE, held_bytes=_SCALE, cache_bytes=0)
                )
                for _ in range(3)
            ]
        for call in calls:
            assert_same({name: to_array(value) for name, value in call.result().items()}, rig.expected)
        assert rig.pipeline.stats.passes == 4


def test_calls_that_were_served_together_are_waited_for(toy: Path) -> None:
    """Each of several callers gets its answer with every sweep, and not with every second one."""
    callers, rounds = 4, 5
    with _rig(toy) as rig:

        def call_again_and_again() -> None:
            for _ in range(rounds):
                rig.check()

        # However slow a caller is: the others wait for it.
        original = rig.exchange.expect
        original(callers, PATIENCE_S)
        rig.exchange.expect = lambda count, _: original(count, PATIENCE_S)  # type: ignore[method-assign]
        threads = [threading.Thread(target=call_again_and_again) for _ in range(callers - 1)]
        for thread in threads:
            thread.start()
        call_again_and_again()
        for thread in threads:
            thread.join()
        assert rig.pipeline.stats.passes == rounds
