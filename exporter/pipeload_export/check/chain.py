"""Run the shards one after another, or the unsplit graph, in plain onnxruntime with nothing of the engine's tricks.

Optimisation and prepacking are off, unless it is asked for. So the unsplit graph's external weights are mapped, not
copied, and a model that is larger than memory can be verified, slowly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeload.errors import ExportError
from pipeload.foreign import first_line, foreign_errors
from pipeload.format.caches import length_input
from pipeload.format.manifest import Manifest, Shard
from pipeload.notify import Notify
from pipeload.pipeline.cache_room import with_room
from pipeload.storage.weights import Storage
from pipeload_export.check.cases import Case
from pipeload_export.graph.runtime import (
    LEVEL,
    NOT_APPLIED,
    dtype_of,
    open_session,
    raise_shortage,
    run,
    session_options,
)

__all__ = ["needs_of", "run_session", "run_shard", "run_shards", "run_unsplit", "with_rooms"]

Arrays = dict[str, NDArray[Any]]

_HIDES = 1e4
"""Masks have numbers of at least this size."""


def run_unsplit(
    path: Path,
    wanted: Iterable[str],
    cases: Sequence[Case],
    progress: Notify,
    *,
    narrowed: Collection[str] = (),
    optimised: bool = False,
) -> list[Arrays]:
    """The outputs `wanted` of the unsplit graph for each case.

    Args:
        path: its file.
        wanted: names of outputs.
        cases: the inputs.
        progress: called with the number of cases that are done.
        narrowed: inputs that the cases have as float32, and the graph as float32 or float16.
        optimised: optimise it first, as the exporter optimises shards.

    Raises:
        ExportError: it does not open or run, or takes or makes something else than the cases have.
    """
    import onnx  # needs the extra [export], which importing this module does not

    from pipeload_export.graph.external_data import check_places
    from pipeload_export.rewrite.settings import SETTINGS

    # onnxruntime would read wherever the graph points.
    with foreign_errors(ExportError, f"onnx does not open the unsplit graph {path}", "Fetch or export it again."):
        model = onnx.load(path, load_external_data=False)
    check_places(model, path)
    del model
    options = session_options()
    if optimised:
        options.graph_optimization_level = LEVEL
    session = open_session(path, f"the unsplit graph {path}", options, disabled=NOT_APPLIED if optimised else ())
    names = [output.name for output in session.get_outputs()]
    given = {name for case in cases for name in case.inputs}
    taken = {value.name: value.shape for value in session.get_inputs()}
    settings = {name: np.zeros([1] * len(taken[name]), np.int64) for name in (SETTINGS & taken.keys()) - given}
    _check_names(path, "takes", (taken.keys() - settings.keys()) ^ given, given)
    _check_names(path, "makes", set(wanted) - set(names), set(wanted))
    types = {
        value.name: dtype_of(value.type.removeprefix("tensor(").removesuffix(")")) for value in session.get_inputs()
    }
    results = []
    for number, case in enumerate(cases):
        progress("run the unsplit model", number, len(cases))
        inputs = {name: a.astype(types[name]) if name in narrowed else a for name, a in case.inputs.items()}
        results.append(run_session(session, names, {**inputs, **settings}, f"The unsplit graph ({case.name})"))
    progress("run the unsplit model", len(cases), len(cases))
    return results


def _check_names(path: Path, does: str, different: set[str], expected: set[str]) -> None:
    if different:
        name = min(different)
        which = f"it {does} no '{name}'" if name in expected else f"it {does} '{name}', and the shards do not"
        more = f" ({len(different)} such differences)" if len(different) > 1 else ""
        raise ExportError(
            f"{path} is the graph of another model than the shards: {which}{more}. "
            "Pass the .onnx file that the shards were made from."
        )


def run_shards(
    directory: Path,
    manifest: Manifest,
    cases: Sequence[Case],
    progress: Notify,
    *,
    rounded: bool = False,
    sampled: bool = False,
) -> list[Arrays]:
    """The outputs of the chain of shards for each case. Each shard is opened once, and freed before the next.

    Args:
        directory: the sharded model directory.
        manifest: its manifest.
        cases: the inputs.
        progress: called with the bytes of the shards that are done.
        rounded: move the float16 edges by as much as one more rounding would.
        sampled: of shards that are built alike, and take the same edges but for those that are theirs alone, only the
            first runs, and the others are taken to make what it makes. The outputs are not those of the model, but
            they are made by every kind of shard that it has, in the time of a few of them.

    Raises:
        ExportError: a shard does not run.
    """
    storage = Storage(directory, manifest, verify=False)
    states: list[Arrays] = [with_rooms(manifest, case.inputs) for case in cases]
    outputs = {spec.name for spec in manifest.outputs}
    slices = {} if manifest.head is None else {name: number for number, name in enumerate(manifest.head.shards)}
    heads: list[list[NDArray[Any]]] = [[] for _ in cases]
    narrow = {edge.name for edge in manifest.edges if edge.dtype == "float16"} if rounded else set()
    random = np.random.default_rng(0)
    kinds = _kinds(manifest)
    known: dict[Hashable, list[list[NDArray[Any]]]] = {}
    done, total = 0, sum(shard.nbytes for shard in manifest.shards)
    for number, shard in enumerate(manifest.shards):
        progress("run the shards", done, total)
        results = known.get(kinds[number])
        if results is None:
            results = _run_cases(directory, storage, shard, cases, states)
            if sampled:
                known[kinds[number]] = results
        later = {name for other in manifest.shards[number + 1 :] for name in needs_of(other)} | outputs
        for state, head, arrays in zip(states, heads, results, strict=True):
            made = dict(zip(shard.outputs, arrays, strict=True))
            made |= {name: _rounded_again(made[name], random) for name in narrow.intersection(made)}
            if shard.name in slices:
                head.append(made[shard.outputs[0]])
            else:
                state.update(made)
            for name in state.keys() - later:
                del state[name]
        done += shard.nbytes
    progress("run the shards", total, total)
    if manifest.head is not None:
        for state, head in zip(states, heads, strict=True):
            state[manifest.head.output] = np.concatenate(head, axis=-1)
    return [{name: state[name] for name in outputs} for state in states]


def _kinds(manifest: Manifest) -> list[Hashable]:
    """Of each shard its structure, and those of the edges that it takes that other shards take too, such as masks.

    Its cache is its own, also where the prologue learns the length of texts from it.
    """
    taken = Counter(name for shard in manifest.shards for name in shard.inputs)
    common = {name for name, count in taken.items() if count > 1} - {cache.input for cache in manifest.caches}
    return [(shard.structure, *(name if name in common else "" for name in shard.inputs)) for shard in manifest.shards]


def _run_cases(
    directory: Path, storage: Storage, shard: Shard, cases: Sequence[Case], states: Sequence[Arrays]
) -> list[list[NDArray[Any]]]:
    """For each case what the shard makes, in order."""
    session = open_session(directory / shard.graph.path, f"shard '{shard.name}'")
    results = []
    for case, state in zip(cases, states, strict=True):
        made = run_shard(session, storage, shard, state, f"Shard '{shard.name}' ({case.name})")
        results.append([made[name] for name in shard.outputs])
    return results


def run_shard(session: ort.InferenceSession, storage: Storage, shard: Shard, state: Arrays, what: str) -> Arrays:
    """What a shard makes of the tensors that are there, by name.

    Raises:
        ExportError: it does not run; `what` names it.
    """
    fetched = {
        lookup.output: storage.read_rows(lookup, state[lookup.indices], keep_cached=True) for lookup in shard.lookups
    }
    inputs = {name: fetched[name] if name in fetched else state[name] for name in shard.inputs}
    return run_session(session, list(shard.outputs), inputs, what)


def _rounded_again(array: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
    """Float16 values as another rounding might have left them: one in twelve is the next one up or down.

    An error that is anywhere within half a step has the same variance. What hides positions stays as it is.
    """
    moved = (random.random(array.shape) < 1 / 12) & (np.abs(array) < _HIDES)
    ends = np.where(random.random(array.shape) < 0.5, -np.inf, np.inf).astype(array.dtype)
    with np.errstate(over="ignore"):
        return np.where(moved, np.nextafter(array, ends), array)


def with_rooms(manifest: Manifest, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """The inputs, with caches that are written in place as long as they will be."""
    caches = [cache.input for cache in manifest.caches if cache.in_place]
    if not caches:
        return dict(inputs)
    length, axis = length_input(manifest)
    return {**inputs, **{name: with_room(inputs[name], inputs[length].shape[axis]) for name in caches}}


def needs_of(shard: Shard) -> list[str]:
    """The tensors that must be there before a shard runs: its inputs, and the indices of its lookups."""
    return [*shard.inputs, *(lookup.indices for lookup in shard.lookups)]


def run_session(
    session: ort.InferenceSession, names: list[str], inputs: Mapping[str, NDArray[Any]], what: str
) -> Arrays:
    """The outputs `names` by name. Raises ExportError, which names `what`, if the graph does not run."""
    try:
        return dict(zip(names, run(session, names, inputs), strict=True))
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise_shortage(error)
        raise ExportError(
            f"{what} does not run: {first_line(error)}. Export the model to an .onnx file that takes inputs of this "
            "size, and pass that."
        ) from error
