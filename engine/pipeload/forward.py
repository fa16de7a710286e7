"""One pass: values travel through the shards, in order, whoever provides the sessions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ClosedError, ConfigError
from pipeload.footprint import in_arena
from pipeload.manifest import Lookup, Manifest, Shard
from pipeload.session import ShardSession, Stopper, Value, to_array, to_value
from pipeload.storage import Storage

__all__ = ["Forward"]


class Forward:
    """Runs passes over a model's shards.

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
        self._last_use: dict[str, int] = {}
        for index, shard in enumerate(manifest.shards):
            for name in (*shard.inputs, *(lookup.indices for lookup in shard.lookups)):
                self._last_use[name] = index

    def run(
        self,
        inputs: Mapping[str, Value],
        borrow: Callable[[int], AbstractContextManager[ShardSession]],
        stopper: Stopper,
        *,
        last_position: bool = False,
        keep_rows_cached: bool = False,
    ) -> dict[str, Value]:
        """All graph outputs for all graph inputs.

        Args:
            inputs: every graph input, caches included.
            borrow: gives shard i's session for the time that it runs; called once for each shard, in order.
            stopper: ends the pass when it is used.
            last_position: run a cut head for the last position only; its output then has one position.
            keep_rows_cached: leave the table rows that were read in the page cache.

        Raises:
            ConfigError: an index is beyond its table.
            RunError, ShardError, LoadError: a shard failed.
            ClosedError: the stopper was used.
        """
        alive = dict(inputs)
        outputs: dict[str, Value] = {}
        slices: list[NDArray[Any]] = []
        for index, shard in enumerate(self._manifest.shards):
            if stopper.stopped:
                raise ClosedError("The call was ended.")
            for lookup in shard.lookups:
                alive[lookup.output] = self._rows(lookup, alive[lookup.indices], keep_cached=keep_rows_cached)
            if last_position and self._head and shard.name == self._head.shards[0]:
                hidden = to_array(alive[self._head.input])
                alive[self._head.input] = to_value(hidden[..., -1:, :])
            results = self._run_shard(shard, index, alive, borrow, stopper)
            if shard.name in self._head_shards:
                slices.append(to_array(results[0]))
            else:
                made = dict(zip(shard.outputs, results, strict=True))
                alive.update(made)
                outputs.update((name, value) for name, value in made.items() if name in self._wanted)
            del results
            for name in [name for name in alive if self._last_use.get(name, -1) <= index]:
                del alive[name]
        if self._in_arena:
            # The caller may keep outputs for long, and the arena could not shrink.
            outputs = {name: to_value(to_array(value).copy()) for name, value in outputs.items()}
        if self._head:
            outputs[self._head.output] = to_value(np.concatenate(slices, axis=-1))
        return outputs

    def _run_shard(
        self,
        shard: Shard,
        index: int,
        alive: Mapping[str, Value],
        borrow: Callable[[int], AbstractContextManager[ShardSession]],
        stopper: Stopper,
    ) -> list[Value]:
        with borrow(index) as session:
            return list(session.run({name: alive[name] for name in shard.inputs}, stopper))

    def _rows(self, lookup: Lookup, indices: Value, *, keep_cached: bool) -> Value:
        try:
            rows = self._storage.read_rows(lookup, to_array(indices), keep_cached=keep_cached)
        except IndexError as error:
            raise ConfigError(f"'{lookup.indices}' is out of range: {error}.") from error
        return to_value(rows, lookup.table.dtype)
