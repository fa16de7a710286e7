"""Shards of a directory beside those of its rounded copy: what each one's rounding does, and what all of it does.

Both run in plain onnxruntime, one shard of each at a time; rounded weights are packed, as the engine packs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.format.manifest import Manifest, Shard, ShardError
from pipeload.notify import Notify
from pipeload.storage.weights import Storage
from pipeload_export.check.accuracy import compared_outputs, output_error
from pipeload_export.check.cases import Case
from pipeload_export.check.chain import needs_of, run_shard, with_rooms
from pipeload_export.graph.runtime import open_session, packed_options, session_options

__all__ = ["HEAD", "Units", "compare_shards", "run_chosen"]

HEAD = "head"
"""The name of all slices of a head together: how many there are depends on their bytes."""
_STEP = "run shards beside the source's"

Arrays = dict[str, NDArray[Any]]


class Units:
    """A directory's shards by name; the slices of a head are one.

    Args:
        directory: the sharded model directory.
        manifest: its manifest.

    Attributes:
        manifest: the same.
        shards: name -> the shard, or all slices in order.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._storage = Storage(directory, manifest, verify=False)
        self.manifest = manifest
        self.shards: dict[str, list[Shard]] = {}
        for shard in manifest.shards:
            self.shards.setdefault(HEAD if shard.role == "head" else shard.name, []).append(shard)

    def run(self, name: str, states: Sequence[Arrays]) -> list[Arrays]:
        """What a unit makes of the tensors of each case.

        Raises:
            ExportError: a shard does not run.
        """
        made: list[Arrays] = [{} for _ in states]
        for shard in self.shards[name]:
            options = packed_options() if shard.packed else session_options()
            what = f"Shard '{shard.name}'"
            session = open_session(self._directory / shard.graph.path, what, options)
            for state, found in zip(states, made, strict=True):
                found |= run_shard(session, self._storage, shard, state, what)
        head = self.manifest.head
        if name != HEAD or head is None:
            return made
        parts = [shard.outputs[0] for shard in self.shards[HEAD]]
        return [{head.output: np.concatenate([found[part] for part in parts], axis=-1)} for found in made]


def compare_shards(
    floats: Units, rounded: Units, cases: Sequence[Case], progress: Notify
) -> tuple[list[Arrays], tuple[ShardError, ...]]:
    """The source's answers, and the error of each rounded shard when it takes what the source's shards make.

    Args:
        floats: the source.
        rounded: a copy of it with other weights.
        cases: inputs, with caches.
        progress: called with the number of shards that are done.

    Returns:
        For each case the `compared_outputs`; and the errors, in the order of the shards.
    """
    errors: list[ShardError] = []

    def compared(name: str, states: Sequence[Arrays]) -> list[Arrays]:
        wanted = floats.run(name, states)
        errors.append(_shard_error(name, wanted, rounded.run(name, states)))
        return wanted

    return _answers((floats, rounded), cases, compared, progress), tuple(errors)


def run_chosen(chosen: Mapping[str, Units], cases: Sequence[Case], progress: Notify) -> list[Arrays]:
    """The `compared_outputs` of a model whose shards are those of several directories.

    Args:
        chosen: the directory for each shard, in their order.
        cases: inputs, with caches.
        progress: called with the number of shards that are done.
    """
    return _answers(tuple(chosen.values()), cases, lambda name, states: chosen[name].run(name, states), progress)


def _answers(
    directories: Sequence[Units],
    cases: Sequence[Case],
    run: Callable[[str, Sequence[Arrays]], list[Arrays]],
    progress: Notify,
) -> list[Arrays]:
    manifest, names = directories[0].manifest, list(directories[0].shards)
    outputs = set(compared_outputs(manifest))
    states: list[Arrays] = [with_rooms(manifest, case.inputs) for case in cases]
    for number, name in enumerate(names):
        progress(_STEP, number, len(names))
        shards = [shard for other in names[number + 1 :] for units in directories for shard in units.shards[other]]
        later = {taken for shard in shards for taken in needs_of(shard)} | outputs
        for state, made in zip(states, run(name, states), strict=True):
            state |= made
            for gone in state.keys() - later:
                del state[gone]
    progress(_STEP, len(names), len(names))
    return [{name: state[name] for name in outputs} for state in states]


def _shard_error(shard: str, wanted: Sequence[Arrays], found: Sequence[Arrays]) -> ShardError:
    names = [name for name, array in wanted[0].items() if array.dtype.kind == "f"]
    errors = [output_error(name, [one[name] for one in wanted], [one[name] for one in found]) for name in names]
    worst = max(errors, key=lambda one: one.max_rel_error, default=None)
    if worst is None or not worst.max_rel_error:
        return ShardError(shard=shard, max_rel_error=0.0, mean_rel_error=0.0)
    part = worst.max_rel_error / worst.max_abs_error
    return ShardError(shard=shard, max_rel_error=worst.max_rel_error, mean_rel_error=worst.mean_abs_error * part)
