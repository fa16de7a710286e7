"""Do the shards give the answers of the unsplit model?"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ExportError
from pipeload.format.closeness import range_of
from pipeload.format.manifest import Cache, Manifest, Verification
from pipeload.notify import Notify
from pipeload_export.check.cases import Case
from pipeload_export.check.chain import run_shards

__all__ = ["Unsplit", "compare", "distance", "limit_of", "limit_of_source"]

_LIMITS = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference that is allowed, in parts of the output's range. Float16 has 11 bits and bfloat16 has 8, and an
output is the end of many operations whose fused forms round at other places."""
_INT8_LIMIT = 0.1
"""The same where caches are int8: each of their values is off by up to 1 / 254 of the largest one of its head, and each
layer passes the rest of that on. Over 3 layers 0.004 was seen, over 30 layers 0.03."""
_OWN_LIMIT = 0.1
"""The most that onnxruntime's own optimisation of the unsplit graph, where it changes answers by more than the limit,
allows the shards. Over static int8 with seeded weights 0.5 was seen: there the shards must be like one of the two."""

_ROUNDINGS, _ROUNDED_LIMIT = 2.0, 0.05
"""What one more rounding of each float16 edge changes, times the first and at most the second, is allowed too: shards
round edges that the unsplit graph keeps as float32. SmolLM2's 30 layers in float16 differ by 0.0175."""

_EFFECTS = 10
"""An answer may differ from the source's by this many times of what the rounding of the source's own embeddings does to
it: every operation of a model rounds, not only the first."""
_MOST_SOURCE_LIMIT = 0.01
"""In parts of the range. A source that rounding moves further has no answer that could be compared."""
_SMALL_LIMIT = 1.0
"""The same where weights were rounded: the difference is reported. Answers that differ by all of their range are those
of another model."""
_BLOCKS_LIMIT = 0.01
"""The blocks of a GGUF file have the source's values, and products nearly its activations: SmolLM2 is 0.0005 off."""

Arrays = dict[str, NDArray[Any]]


class Unsplit(Protocol):
    """Answers as the unsplit model does: `run_unsplit` or `run_parts` of its graph."""

    def __call__(
        self,
        wanted: Iterable[str],
        cases: Sequence[Case],
        progress: Notify,
        *,
        narrowed: Collection[str] = (),
        optimised: bool = False,
    ) -> list[Arrays]:
        """The outputs `wanted` for each case."""


def compare(
    directory: Path, manifest: Manifest, unsplit: Unsplit, cases: list[Case], progress: Notify
) -> tuple[Verification, ...]:
    """For each output of the model, the worst difference over all cases.

    Raises:
        ExportError: an output differs by more than its limit, or is of another type or shape; or a cache is paired
            with the output that continues another one.
    """
    outputs = {cache.input: cache.output for cache in manifest.caches}
    given = {cache.input: cache.scale for cache in manifest.caches if cache.scale}
    made = {outputs[cache]: outputs[scale] for cache, scale in given.items()}
    specs = [spec for spec in manifest.outputs if spec.name not in made.values()]
    if given:
        cases = _with_own_caches(directory, manifest, cases, progress)
    # Sessions are made one after another, and the first is gone before the second comes.
    plain = [replace(case, inputs=_dequantised(case.inputs, given)) for case in cases]
    names = [spec.name for spec in specs]
    wanted = unsplit(names, plain, progress, narrowed=given)
    found = run_shards(directory, manifest, cases, progress)
    _check_caches(manifest, cases, found)
    found = [_dequantised(arrays, made, like=wanted[0]) for arrays in found]
    inner = _inner(manifest)
    # Caches that are int8 in the manifest are floats in the unsplit model.
    known = {name: limit_of(array.dtype.name, inner) for name, array in wanted[0].items()}
    limits = {name: max(known[name], _INT8_LIMIT if made and known[name] else 0) for name in names}
    differences = partial(_differences, manifest, cases, limits, inner)
    worst = differences(wanted, found)
    if any(map(_fails, worst)):
        # onnxruntime's own optimisation changes the answers where they are rounded coarsely: like with like.
        optimised = unsplit(names, plain, progress, narrowed=given, optimised=True)
        own, alike = differences(wanted, optimised), differences(optimised, found)
        worst = tuple(map(_best, worst, alike, own))
    has_narrow = any(edge.dtype == "float16" for edge in manifest.edges)
    if has_narrow and any(map(_fails, worst)):
        rounded = run_shards(directory, manifest, cases, progress, rounded=True)
        effects = differences(found, [_dequantised(arrays, made, like=wanted[0]) for arrays in rounded])
        worst = tuple(map(_allowing, worst, effects))
    for result in worst:
        if _fails(result):
            raise ExportError(
                f"Output '{result.output}' of the shards differs from the unsplit model by {result.max_abs_error:.3g}, "
                f"which is {result.max_rel_error:.3g} of its range; the limit is {result.limit:.3g}. "
                "If the shards were made from that very graph, please report the model."
            )
    return worst


def _fails(result: Verification) -> bool:
    """Whether a difference is above its limit, or no number."""
    return not result.max_rel_error <= result.limit


def distance(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """How far each value is from its counterpart; 0 where both are the same infinity, or no number."""
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    apart: NDArray[np.float64] = np.subtract(one, other, where=~same, out=np.zeros(one.shape), dtype=np.float64)
    return np.abs(apart)


def limit_of(dtype: str, inner: Iterable[str] = ()) -> float:
    """The largest allowed difference of an output of that element type, in parts of its range; 0 for integers.

    Args:
        dtype: of the output.
        inner: of the tensors that it is made from; the coarsest of them counts.
    """
    return _LIMITS[_coarsest(dtype, inner)] if dtype in _LIMITS else 0.0


def limit_of_source(manifest: Manifest, effect: float, span: float) -> float:
    """The largest allowed difference from an answer of the source, float32, in parts of its range.

    Args:
        manifest: of the model that was compared.
        effect: how far the answer moves when the source's embeddings change by their rounding.
        span: the range.
    """
    if manifest.small_weights:
        return _BLOCKS_LIMIT if manifest.small_weights.gguf else _SMALL_LIMIT
    limit = min(max(limit_of("float32"), _EFFECTS * effect / span), _MOST_SOURCE_LIMIT)
    return max(limit, _INT8_LIMIT) if any(cache.scale for cache in manifest.caches) else limit


def _coarsest(dtype: str, inner: Iterable[str]) -> str:
    return max((dtype, *inner), key=lambda name: _LIMITS.get(name, 0.0))


def _inner(manifest: Manifest) -> set[str]:
    """Element types of weights and edges."""
    weights = {spec.memory_dtype for shard in manifest.shards for spec in shard.tensors}
    tables = {lookup.table.memory_dtype for shard in manifest.shards for lookup in shard.lookups}
    return weights | tables | {spec.dtype for spec in manifest.edges}


def _best(one: Verification, alike: Verification, own: Verification) -> Verification:
    """The smaller of two differences, and a limit that onnxruntime's own levels keep.

    Args:
        one: from the graph as it is.
        alike: from the graph as onnxruntime optimises it.
        own: between these two.
    """
    best = min(one, alike, key=lambda result: result.max_rel_error)
    return replace(best, limit=max(best.limit, min(own.max_rel_error, _OWN_LIMIT)) if best.limit else 0.0)


def _allowing(one: Verification, effect: Verification) -> Verification:
    """A difference, with a limit that allows what one more rounding of the edges changes."""
    allowed = min(_ROUNDINGS * effect.max_rel_error, _ROUNDED_LIMIT)
    return replace(one, limit=max(one.limit, allowed) if one.limit else 0.0)


def _with_own_caches(directory: Path, manifest: Manifest, cases: list[Case], progress: Notify) -> list[Case]:
    """The cases with caches that the model itself has made in the first one.

    After noise the answers of some models are noise too, and rounding changes them a lot.
    """
    (made,) = run_shards(directory, manifest, cases[:1], progress)

    def own(case: Case, cache: Cache) -> NDArray[Any]:
        return made[cache.output][tuple(map(slice, case.inputs[cache.input].shape))]

    return [
        replace(case, inputs={**case.inputs, **{cache.input: own(case, cache) for cache in manifest.caches}})
        for case in cases
    ]


def _dequantised(arrays: Arrays, scales: Mapping[str, str], like: Arrays | None = None) -> Arrays:
    """The arrays with caches as floats, and without their scales.

    Args:
        arrays: of the shards.
        scales: a cache's name -> that of its scales.
        like: the caches have the float types of these arrays; None for float32.
    """
    floats = {name: arrays[name] * arrays[scale] for name, scale in scales.items()}
    floats |= {name: array.astype(like[name].dtype) for name, array in floats.items()} if like else {}
    return {name: floats.get(name, array) for name, array in arrays.items() if name not in scales.values()}


def _check_caches(manifest: Manifest, cases: list[Case], found: list[dict[str, NDArray[Any]]]) -> None:
    """Values of a cache come out of the output that the manifest pairs with it, not of another one.

    The samples' caches are all different, so a wrong pair shows. Caches whose values change are left alone.
    """
    for case, outputs in zip(cases, found, strict=True):
        for cache in manifest.caches:
            present = outputs[cache.output]

            def kept(name: str, case: Case = case, present: NDArray[Any] = present) -> bool:
                past = case.inputs[name]
                return past.size > 0 and np.array_equal(past, present[tuple(map(slice, past.shape))])

            if not kept(cache.input) and (others := [c.input for c in manifest.caches if kept(c.input)]):
                raise ExportError(
                    f"Output '{cache.output}' continues the cache '{others[0]}', and the manifest pairs it with "
                    f"'{cache.input}'. Please report the model."
                )


def _differences(
    manifest: Manifest,
    cases: list[Case],
    limits: Mapping[str, float],
    inner: set[str],
    wanted: list[Arrays],
    found: list[Arrays],
) -> tuple[Verification, ...]:
    """For each output that has a limit, the worst difference over all cases."""
    # A cache also holds the sample that went in; its range is that of the values that the model puts there.
    pasts = {cache.output: cache.input for cache in manifest.caches}
    return tuple(
        _difference(
            name,
            [one[name] for one in wanted],
            [one[name] for one in found],
            cases,
            [n for n, case in enumerate(cases) if name not in pasts or not case.inputs[pasts[name]].size],
            limit,
            inner,
        )
        for name, limit in limits.items()
    )


def _difference(
    name: str,
    wanted: list[NDArray[Any]],
    found: list[NDArray[Any]],
    cases: list[Case],
    ranged: list[int],
    limit: float,
    inner: Iterable[str] = (),
) -> Verification:
    """The worst difference over all cases, and as a part of the range that the output has over the `ranged` ones."""
    for one, other, case in zip(wanted, found, cases, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise ExportError(
                f"Output '{name}' of the shards is {other.dtype} {list(other.shape)} for {case.name}; the unsplit "
                f"model makes {one.dtype} {list(one.shape)}. Please report the model."
            )
    a, b = (np.concatenate([array.astype(np.float64).ravel() for array in arrays]) for arrays in (wanted, found))
    # Where the unsplit model gives NaN or infinity, the shards must give the same.
    apart = distance(a, b)
    if not apart.any():
        return Verification(output=name, max_abs_error=0.0, max_rel_error=0.0, limit=limit)
    error = float(apart.max())
    values = np.concatenate([wanted[number].astype(np.float64).ravel() for number in ranged]) if ranged else a
    relative = error / range_of(values, _coarsest(wanted[0].dtype.name, inner)) if np.isfinite(error) else float("inf")
    return Verification(output=name, max_abs_error=error, max_rel_error=relative, limit=limit)
