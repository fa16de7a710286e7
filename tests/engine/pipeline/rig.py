"""A pipeline over a toy: its storage notes its reads, the test makes its plans, and waits for its agents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.harness import (
    PATIENCE_S,
    Gate,
    agents,
    assert_same,
    run_sequentially,
)
from tests.engine.plans import loading_bytes, slots_bytes

from pipeload.errors import PipeloadError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest, Shard
from pipeload.format.pages import room_bytes
from pipeload.format.placement import place
from pipeload.pipeline.pipeline import Pipeline
from pipeload.pipeline.requests import Call
from pipeload.pipeline.session import ShardSession, Value, to_array, to_value
from pipeload.pipeline.sweep import Feed
from pipeload.planning.footprint import session_bytes, whole_bytes
from pipeload.planning.layouts import Range, staying
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile
from pipeload.planning.replanner import Replanner
from pipeload.storage.buffers import Part
from pipeload.storage.weights import Storage
from pipeload.tracing.trace import Progress, Span

NAMES = ["prologue", *(f"block.{k:03d}" for k in range(6)), "epilogue"]


FAILURES = [OSError("disk"), MemoryError(), SystemExit(3), KeyboardInterrupt()]


@contextmanager
def raising(error: BaseException, kind: type[PipeloadError]) -> Iterator[None]:
    """Expect the error as it is where it ends programs; a foreign one as the cause of an error of pipeload."""
    foreign = isinstance(error, Exception)
    with pytest.raises(kind if foreign else type(error)) as caught:
        yield
    assert (caught.value.__cause__ if foreign else caught.value) is error


class NotingStorage(Storage):
    """Notes each read, and lets a test stand in the way."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        super().__init__(directory, manifest)
        self.read: list[str] = []
        self.read_bytes: list[tuple[str, int]] = []
        self.before_read: Callable[[Shard], None] = nothing

    def read_weights(self, shard: Shard, parts: Sequence[Part], *rest: Any, **options: Any) -> bool:
        self.before_read(shard)
        done = super().read_weights(shard, parts, *rest, **options)
        if done:
            self.read.append(shard.name)
            self.read_bytes.append((shard.name, sum(part.end - part.begin for part in parts)))
        return done


def nothing(*_: Any) -> None:
    pass


def plan_by_hand(
    manifest: Manifest,
    *,
    resident: Sequence[str] = (),
    partly: Mapping[str, Range] | None = None,
    buffers: int = 2,
    sessions: int | None = None,
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
    buffer_bytes = max((place(shard, ranges[shard.name]).nbytes for shard in streamed), default=0)
    own = whole if packed else [shard for shard in whole if shard.name not in _followers(manifest, resident)]
    weights = sum(whole_bytes(shard) for shard in own) + sum(session_bytes(shard, 1) for shard in whole)
    weights += sum(_staying_bytes(shard, ranges[shard.name]) for shard in streamed)
    streamed_bytes = sum(end - begin for begin, end in ranges.values())
    plan = Plan(
        budget_bytes=10**11,
        loaders=loaders,
        buffers=buffers,
        buffer_bytes=buffer_bytes,
        sessions=sessions,
        resident=frozenset(resident),
        partly_resident=partly,
        packed=packed,
        packed_streamed=packed_streamed,
        threads=1,
        process_bytes=10**10,
        pass_bytes=pass_bytes,
        cache_bytes=0,
        resident_bytes=sum(s.nbytes for s in [*own, *streamed]) - streamed_bytes,
        streamed_bytes=streamed_bytes,
        peak_bytes=10**10 + pass_bytes + weights,
    )
    slots = slots_bytes(plan, manifest.shards)
    apart = sessions and slots - buffers * buffer_bytes - loading_bytes(plan, manifest.shards)
    return replace(plan, peak_bytes=plan.peak_bytes + slots, sessions_bytes=apart or 0)


def _followers(manifest: Manifest, resident: Sequence[str]) -> set[str]:
    """Resident shards whose weights an earlier resident shard has too."""
    seen: set[Any] = set()
    shared = [shard for shard in manifest.shards if shard.name in resident and shard.weights]
    return {shard.name for shard in shared if shard.weights in seen or seen.add(shard.weights)}


def _staying_bytes(shard: Shard, streamed: Range) -> int:
    return sum(room_bytes(*part) for part in staying(shard, streamed))


SCALE = 10**12
"""Tells the bytes that a test names from those of outputs that it keeps."""


class Scripted(Replanner):
    """Plans as the test says."""

    def __init__(self, manifest: Manifest, replan: Callable[[int, int], Plan]) -> None:
        super().__init__(manifest, Profile(process_bytes=0, cores=1), budget_bytes=10**11, free_bytes=lambda: 10**12)
        self._replan = replan
        self.taught: list[tuple[Plan, list[Span], float]] = []

    def growth_bytes(self, current: Plan, pass_bytes: int, occupied_bytes: int) -> int:
        return 0

    def before_pass(self, current: Plan, needs: Needs, occupied_bytes: int, *, strict: bool = False) -> Plan:
        # Outputs that the test keeps count too.
        return self._replan(needs.pass_bytes // SCALE, needs.cache_bytes)

    def after_pass(self, current: Plan, spans: Sequence[Span], seconds: float, kind: object) -> bool:
        self.taught.append((current, list(spans), seconds))
        return False


class Rig:
    """A pipeline over a toy, with a storage that notes, and plans that the test makes."""

    def __init__(
        self,
        directory: Path,
        *,
        replan: Callable[[int, int], Plan] | None = None,
        replanner: Callable[[Manifest], tuple[Plan, Replanner]] | None = None,
        progress: Callable[[Progress], None] | None = None,
        before_read: Callable[[Shard], None] | None = None,
        **options: Any,
    ) -> None:
        self.manifest = manifests.read(directory)
        self.storage = NotingStorage(directory, self.manifest)
        # Agents read as soon as the pipeline exists.
        self.storage.before_read = before_read or nothing
        self.expected = run_sequentially(directory, toys.inputs(), threads=1)
        plan = plan_by_hand(self.manifest, **options)
        self.replanner: Any = Scripted(self.manifest, replan or (lambda *_: plan))
        if replanner is not None:
            plan, self.replanner = replanner(self.manifest)
        self.pipeline = Pipeline(self.manifest, self.storage, plan, self.replanner, progress)
        self.exchange = self.pipeline._exchange

    def submit(self, *, pass_bytes: int = 0, cache_bytes: int = 0) -> Call[dict[str, Value]]:
        values = {name: to_value(array) for name, array in toys.inputs().items()}
        pass_bytes *= SCALE if isinstance(self.replanner, Scripted) else 1
        return self.pipeline.submit(Feed(pieces=[values]), Needs(pass_bytes=pass_bytes, cache_bytes=cache_bytes))

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
        residents = self.exchange.residents
        self.wait(lambda: all(s.buffer is None for s in residents.shards.values()) and not residents.busy)


@contextmanager
def rigged(directory: Path, **options: Any) -> Iterator[Rig]:
    rig = Rig(directory, **options)
    try:
        yield rig
    finally:
        rig.pipeline.close()
        assert agents() == []
    if not rig.exchange.cause:
        assert rig.pipeline._memory.reserved_bytes == 0


def fail_once(error: BaseException, at: str) -> Callable[[Shard], None]:
    armed = [True]

    def fail(shard: Shard) -> None:
        if armed and shard.name == at:
            armed.clear()
            raise error

    return fail


BLOCKS = tuple(NAMES[1:-1])


def gated_packing(gate: Gate, at: str = "") -> type[ShardSession]:
    """Sessions that stop at a gate before they are packed."""

    class Gated(ShardSession):
        def __init__(self, shard: Shard, *arguments: Any, **options: Any) -> None:
            if options.get("packed") and at in shard.name:
                gate.stop_here()
            super().__init__(shard, *arguments, **options)

    return Gated


def failing_sessions(method: str, error: BaseException, at: str) -> type[ShardSession]:
    fail = fail_once(error, at)

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
