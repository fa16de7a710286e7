"""One sweep: values of one or more feeds travel through the shards, in order; the caller provides the sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ClosedError, ConfigError, RunError
from pipeload.foreign import foreign_errors, let_go
from pipeload.format.caches import length_input
from pipeload.format.manifest import LENGTH_AXIS, Lookup, Manifest, Shard
from pipeload.pipeline.cache_room import with_room
from pipeload.pipeline.session import ShardSession, Stopper, Value, to_array, to_value
from pipeload.pipeline.top_logits import RunningTop, TopLogits
from pipeload.planning.needs import in_arena
from pipeload.storage.weights import Storage

__all__ = ["Feed", "Sweep"]

_REMEDY = "The system may be out of memory: lower the memory budget, or end other programs."


@dataclass(slots=True, kw_only=True, eq=False)
class Feed:
    """The inputs that one call sends through the shards, and their results.

    Attributes:
        pieces: every graph input, except for the inputs in `caches`. A text may be cut into pieces, which run one
            after another in each shard, so that the activations are those of one piece; only the last one has outputs.
        caches: the caches written in place, by graph input. A larger copy replaces a cache without room for the new
            tokens. After a failed sweep, they hold the same tokens as before.
        room: tokens that such a copy has room for, at least the tokens that the pass leaves in it.
        positions: run a cut head for only this many of the last positions, which its output then has; None for all.
        top: keep only this many of the largest logits per position, in `top_logits`; 0 keeps the whole output.
        stopper: ends it when it is used.
        outputs: all graph outputs, at the end.
        top_logits: see `top`.
        error: the error that ended this feed early.
        begun: its sweep has begun.
        alive: during the sweep, the values of each piece that a later shard takes.
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
    begun: bool = field(init=False, default=False)
    alive: list[dict[str, Value]] = field(init=False, default_factory=list)
    _slices: list[NDArray[Any]] = field(init=False, default_factory=list)
    _running_top: RunningTop | None = field(init=False, default=None)

    def begin(self, in_place: Iterable[str], length: tuple[str, int]) -> None:
        """Begin at the first shard.

        Args:
            in_place: names of the cache inputs that shards write in place.
            length: see `length_input`.
        """
        self.begun = True
        self.alive = [dict(piece) for piece in self.pieces]
        self._running_top = RunningTop(self.top) if self.top else None
        for name in in_place:
            given = [alive.pop(name) for alive in self.alive if name in alive]
            if given:
                self.caches[name] = given[0]
        if self.caches:
            name, axis = length
            self.room = max(self.room, *(piece[name].shape()[axis] for piece in self.pieces))

    def take_slice(self, logits: NDArray[Any]) -> None:
        """Keep the part of a slice of the head's output that the call wants."""
        if self._running_top is not None:
            self._running_top.push(logits)
        else:
            self._slices.append(logits)

    def join_slices(self, output: str) -> None:
        """Join the complete slices of the head into an output, or into `top_logits`."""
        if self._running_top is not None:
            self.top_logits = self._running_top.result
        else:
            self.outputs[output] = to_value(np.concatenate(self._slices, axis=-1))
            self._slices.clear()

    @contextmanager
    def noting_errors(self, shard: Shard) -> Iterator[None]:
        """An error ends this feed, and no other one."""
        try:
            with foreign_errors(RunError, f"The pass failed at shard '{shard.name}'", _REMEDY):
                yield
        except Exception as error:  # noqa: BLE001 - the caller of this feed gets it
            self.error = error
            # While the sweep goes on for others, the session that it met must go when its shard is given back.
            let_go(error)
            self.outputs.clear()
            self.alive.clear()
            self._slices.clear()


class Sweep:
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
        """Run the shards once, each for every feed. A failing feed does not affect the others.

        Args:
            feeds: receive their outputs, or their error.
            borrow: gives shard i's session for the time that it runs; called once for each shard, in order.
            keep_rows_cached: leave the table rows in the page cache after reading them.

        Raises:
            ConfigError: an index is beyond its table: the error of the first feed, raised when no feed is left.
            RunError: a shard failed, likewise.
            ClosedError: the stopper was used, likewise.
            ShardError, LoadError: a shard could not be loaded.
        """
        for feed in feeds:
            feed.begin(self._in_place.values(), self._length)
        for index, shard in enumerate(self._manifest.shards):
            for feed in _going_on(feeds):
                with feed.noting_errors(shard):
                    self._prepare(feed, index, shard, keep_rows_cached=keep_rows_cached)
            _check(feeds)
            with borrow(index) as session:
                for feed in _going_on(feeds):
                    with feed.noting_errors(shard):
                        self._run_shard(feed, index, shard, session)
                # Its memory is given away when it is given back: the Daemon's must then be the last reference.
                del session
            _check(feeds)
        last = self._manifest.shards[-1]
        for feed in _going_on(feeds):
            with feed.noting_errors(last):
                self._finish(feed)
        _check(feeds)

    def _prepare(self, feed: Feed, index: int, shard: Shard, *, keep_rows_cached: bool) -> None:
        """Add a shard's inputs that no earlier shard makes."""
        if feed.stopper.stopped:
            raise ClosedError("The call was ended.")
        for alive in self._pieces(feed, index):
            for lookup in shard.lookups:
                alive[lookup.output] = self._rows(lookup, alive[lookup.indices], keep_cached=keep_rows_cached)
            if feed.positions and self._head and shard.name == self._head.shards[0]:
                hidden = to_array(alive[self._head.input])
                alive[self._head.input] = to_value(hidden[..., -feed.positions :, :])
        for name in shard.inputs:
            if name in feed.caches and feed.caches[name].shape()[LENGTH_AXIS] < feed.room:
                feed.caches[name] = to_value(with_room(to_array(feed.caches[name]), feed.room))

    def _run_shard(self, feed: Feed, index: int, shard: Shard, session: ShardSession) -> None:
        caches = feed.caches
        written = {name: self._in_place[name] for name in shard.outputs if name in self._in_place}
        for alive in self._pieces(feed, index):
            inputs = {name: caches[name] if name in caches else alive[name] for name in shard.inputs}
            in_place = {name: inputs[cache] for name, cache in written.items()}
            results = session.run(inputs, feed.stopper, in_place)
            del inputs
            made = dict(zip(shard.outputs, results, strict=True))
            del results
            caches.update((cache, made[name]) for name, cache in written.items())
            if shard.name in self._head_shards:
                feed.take_slice(to_array(made[shard.outputs[0]]))
            else:
                alive.update(made)
                feed.outputs.update((name, value) for name, value in made.items() if name in self._wanted)
            for name in [name for name in alive if self._last_use.get(name, -1) <= index]:
                del alive[name]

    def _pieces(self, feed: Feed, index: int) -> Sequence[dict[str, Value]]:
        """The pieces that a shard runs for: all but the last only need to reach the caches."""
        return feed.alive if index <= self._last_cached else feed.alive[-1:]

    def _finish(self, feed: Feed) -> None:
        outputs = feed.outputs
        if self._in_arena:
            # The arena could not shrink while the caller keeps an output that lies in it.
            outputs.update((name, to_value(to_array(value).copy())) for name, value in outputs.items())
        if self._head:
            feed.join_slices(self._head.output)

    def _rows(self, lookup: Lookup, indices: Value, *, keep_cached: bool) -> Value:
        try:
            rows = self._storage.read_rows(lookup, to_array(indices), keep_cached=keep_cached)
        except IndexError as error:
            raise ConfigError(f"'{lookup.indices}' is out of range: {error}.") from error
        return to_value(rows, lookup.table.memory_dtype)


def _going_on(feeds: Sequence[Feed]) -> list[Feed]:
    return [feed for feed in feeds if feed.error is None]


def _check(feeds: Sequence[Feed]) -> None:
    """Raise the first feed's error when none is left."""
    errors = [feed.error for feed in feeds]
    if errors[0] is not None and None not in errors:
        raise errors[0]
