"""One sweep: values of one or more feeds travel through the shards, in order, whoever provides the sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ClosedError, ConfigError, RunError
from pipeload.foreign import foreign_errors
from pipeload.format.caches import length_input
from pipeload.format.manifest import LENGTH_AXIS, Lookup, Manifest, Shard
from pipeload.pipeline.cache_room import with_room
from pipeload.pipeline.session import ShardSession, Stopper, Value, to_array, to_value
from pipeload.pipeline.top_logits import RunningTop, TopLogits
from pipeload.planning.needs import in_arena
from pipeload.storage.weights import Storage

__all__ = ["Feed", "Forward"]

_REMEDY = "The system may be out of memory: lower the memory budget, or end other programs."


@dataclass(slots=True, kw_only=True, eq=False)
class Feed:
    """What one call passes through the shards, and what comes of it.

    Attributes:
        pieces: every graph input, but those that are in `caches`. A text may be cut into pieces, which run one after
            another in each shard, so that the activations are those of one piece; only the last one has outputs.
        caches: those that are written in place, by graph input. One without room for the new tokens is replaced by a
            larger copy. When a sweep fails, they still hold what they held.
        room: tokens that such a copy has room for; no less than it must have.
        positions: run a cut head for so many of the last positions, which its output then has; None for all.
        top: of a cut head's output only so many of the largest logits of each position are made, in `top_logits`; 0
            makes the output.
        stopper: ends it when it is used.
        outputs: all graph outputs, at the end.
        top_logits: see `top`.
        error: what ended it before.
    """

    pieces: Sequence[Mapping[str, Value]] = ()
    caches: dict[str, Value] = field(default_factory=dict)
    room: int = 0
    positions: int | None = None
    top: int = 0
    stopper: Stopper = field(default_factory=Stopper)
    outputs: dict[str, Value] = field(default_factory=dict)
    top_logits: Sequence[Sequence[TopLogits]] | None = None
    error: Exception | None = None


class Forward:
    """Runs sweeps over a model's shards.

    Args:
        manifest: the model.
        storage: reads table rows.
    """

    def __init__(self, manifest: Manifest, storage: Storage) -> None:
        self._manifest = manifest
        self._storage = storage
        self._wanted = {spec.name for spec in manifest.outputs}
        self._head = manifest.head
        self._head_shards = frozenset(manifest.head.shards if manifest.head else ())
        self._in_arena = in_arena(manifest)
        self._in_place = {cache.output: cache.input for cache in manifest.caches if cache.in_place}
        self._length = length_input(manifest) if self._in_place else ("", 0)
        self._last_use: dict[str, int] = {}
        self._last_cached = -1
        for index, shard in enumerate(manifest.shards):
            for name in (*shard.inputs, *(lookup.indices for lookup in shard.lookups)):
                self._last_use[name] = index
            if self._in_place.keys() & set(shard.outputs):
                self._last_cached = index

    def run(
        self,
        feeds: Sequence[Feed],
        borrow: Callable[[int], AbstractContextManager[ShardSession]],
        *,
        keep_rows_cached: bool = False,
    ) -> None:
        """Run the shards once, each for every feed. A feed that fails hinders no other one.

        Args:
            feeds: they get their outputs, or what went wrong.
            borrow: gives shard i's session for the time that it runs; called once for each shard, in order.
            keep_rows_cached: leave the table rows that were read in the page cache.

        Raises:
            ConfigError: an index is beyond its table, in the first feed while no other one is left.
            RunError: a shard failed, likewise.
            ClosedError: the stopper was used, likewise.
            ShardError, LoadError: a shard could not be had.
        """
        walks = [_Walk(feed, self._in_place.values(), self._length) for feed in feeds]
        for index, shard in enumerate(self._manifest.shards):
            for walk in _going_on(walks):
                with walk.noting_errors(shard):
                    self._prepare(walk, index, shard, keep_rows_cached=keep_rows_cached)
            _check(feeds)
            with borrow(index) as session:
                for walk in _going_on(walks):
                    with walk.noting_errors(shard):
                        self._run_shard(walk, index, shard, session)
            # It must be gone before the next one comes.
            del session
            _check(feeds)
        for walk in _going_on(walks):
            self._finish(walk)

    def _prepare(self, walk: _Walk, index: int, shard: Shard, *, keep_rows_cached: bool) -> None:
        """All that a shard takes beside what the shards before have made."""
        if walk.feed.stopper.stopped:
            raise ClosedError("The call was ended.")
        for alive in self._pieces(walk, index):
            for lookup in shard.lookups:
                alive[lookup.output] = self._rows(lookup, alive[lookup.indices], keep_cached=keep_rows_cached)
            if walk.feed.positions and self._head and shard.name == self._head.shards[0]:
                hidden = to_array(alive[self._head.input])
                alive[self._head.input] = to_value(hidden[..., -walk.feed.positions :, :])
        for name in shard.inputs:
            if name in walk.caches and walk.caches[name].shape()[LENGTH_AXIS] < walk.room:
                walk.caches[name] = to_value(with_room(to_array(walk.caches[name]), walk.room))

    def _run_shard(self, walk: _Walk, index: int, shard: Shard, session: ShardSession) -> None:
        caches = walk.caches
        written = {name: self._in_place[name] for name in shard.outputs if name in self._in_place}
        for alive in self._pieces(walk, index):
            inputs = {name: caches[name] if name in caches else alive[name] for name in shard.inputs}
            in_place = {name: inputs[cache] for name, cache in written.items()}
            results = session.run(inputs, walk.feed.stopper, in_place)
            del inputs
            made = dict(zip(shard.outputs, results, strict=True))
            del results
            caches.update((cache, made[name]) for name, cache in written.items())
            if shard.name in self._head_shards:
                walk.take_slice(to_array(made[shard.outputs[0]]))
            else:
                alive.update(made)
                walk.feed.outputs.update((name, value) for name, value in made.items() if name in self._wanted)
            for name in [name for name in alive if self._last_use.get(name, -1) <= index]:
                del alive[name]

    def _pieces(self, walk: _Walk, index: int) -> Sequence[dict[str, Value]]:
        """The pieces that a shard runs for: those before the last one only have to get into the caches."""
        return walk.alive if index <= self._last_cached else walk.alive[-1:]

    def _finish(self, walk: _Walk) -> None:
        outputs = walk.feed.outputs
        if self._in_arena:
            # The caller may keep outputs for long, and the arena could not shrink.
            outputs.update((name, to_value(to_array(value).copy())) for name, value in outputs.items())
        if walk.top is not None and self._head:
            walk.feed.top_logits = walk.top.result
        elif self._head:
            outputs[self._head.output] = to_value(np.concatenate(walk.slices, axis=-1))

    def _rows(self, lookup: Lookup, indices: Value, *, keep_cached: bool) -> Value:
        try:
            rows = self._storage.read_rows(lookup, to_array(indices), keep_cached=keep_cached)
        except IndexError as error:
            raise ConfigError(f"'{lookup.indices}' is out of range: {error}.") from error
        return to_value(rows, lookup.table.dtype)


class _Walk:
    """A feed on its way through the shards.

    Attributes:
        feed: what it is.
        alive: for each piece, the values that a later shard takes.
        caches: see `Feed`.
        room: see `Feed`.
        slices: what the slices of a head have made.
        top: what is left of them when only the largest logits are wanted.
    """

    def __init__(self, feed: Feed, in_place: Iterable[str], length: tuple[str, int]) -> None:
        self.feed = feed
        self.alive = [dict(piece) for piece in feed.pieces]
        self.caches = feed.caches
        self.room = feed.room
        self.slices: list[NDArray[Any]] = []
        self.top = RunningTop(feed.top) if feed.top else None
        for name in in_place:
            given = [alive.pop(name) for alive in self.alive if name in alive]
            if given:
                self.caches[name] = given[0]
        if self.caches:
            name, axis = length
            self.room = max(feed.room, *(piece[name].shape()[axis] for piece in feed.pieces))

    def take_slice(self, logits: NDArray[Any]) -> None:
        """Keep what is wanted of a slice of the head's output."""
        if self.top is not None:
            self.top.push(logits)
        else:
            self.slices.append(logits)

    @contextmanager
    def noting_errors(self, shard: Shard) -> Iterator[None]:
        """What goes wrong ends this feed, and no other one."""
        try:
            with foreign_errors(RunError, f"The pass failed at shard '{shard.name}'", _REMEDY):
                yield
        except Exception as error:  # noqa: BLE001 - the caller of this feed gets it
            self.feed.error = error
            self.feed.outputs.clear()
            self.alive.clear()
            self.slices.clear()


def _going_on(walks: Sequence[_Walk]) -> list[_Walk]:
    return [walk for walk in walks if walk.feed.error is None]


def _check(feeds: Sequence[Feed]) -> None:
    """Raise the first feed's error when none is left."""
    errors = [feed.error for feed in feeds]
    if errors[0] is not None and None not in errors:
        raise errors[0]
