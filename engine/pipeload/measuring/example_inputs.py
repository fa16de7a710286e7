"""Made-up inputs of any size, to measure and try with: meaningful where the input's name tells, else seeded noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.format.caches import past_symbols
from pipeload.format.manifest import Manifest, TensorSpec, evaluate_dim

__all__ = ["example_inputs"]


def example_inputs(
    manifest: Manifest, dims: Mapping[str, int], vocabulary: int | None = None
) -> dict[str, NDArray[Any]]:
    """An array for every graph input, caches included; the same at each call.

    Positions count up behind the cached tokens, masks let everything through, token types are 0, and other integers are
    rows that the model's tables have. Caches of one shape share an array.

    Args:
        manifest: the model.
        dims: sizes of the symbolic dimensions.
        vocabulary: number of token ids, for a model without tables that are read by row, whose sizes would give it.
    """
    random = np.random.default_rng(0)
    cached = manifest.cache_inputs
    past = sum(dims[symbol] for symbol in past_symbols(manifest))
    shared: dict[tuple[object, ...], NDArray[Any]] = {}
    made: dict[str, NDArray[Any]] = {}
    for spec in manifest.inputs:
        shape = tuple(evaluate_dim(dim, dims) for dim in spec.shape)
        if spec.name in cached:
            if (spec.dtype, shape) not in shared:
                shared[spec.dtype, shape] = _as_type(random.standard_normal(shape, np.float32), spec.dtype)
            made[spec.name] = shared[spec.dtype, shape]
            continue
        rows = _table_rows(manifest, spec)
        if spec.name == "position_ids":
            positions = np.arange(past, past + shape[-1])
            array: NDArray[Any] = np.broadcast_to(np.minimum(positions, rows - 1) if rows else positions, shape)
        elif spec.name == "token_type_ids":
            array = np.zeros(shape)
        elif spec.name.endswith("mask") or spec.dtype == "bool":
            array = np.ones(shape)
        elif "int" in spec.dtype:
            array = random.integers(0, min(rows or vocabulary or 2, vocabulary or rows or 2), shape)
        else:
            array = random.standard_normal(shape, np.float32)
        made[spec.name] = _as_type(array, spec.dtype)
    return made


def _table_rows(manifest: Manifest, spec: TensorSpec) -> int | None:
    """Rows of the smallest table that the input may be an index of; None when no table is read by row."""
    inputs = {each.name for each in manifest.inputs}
    rows = {(lookup.indices, lookup.table.shape[0]) for shard in manifest.shards for lookup in shard.lookups}
    # A shard's output may depend on any of its inputs.
    own = [count for name, count in rows if name == spec.name] or [count for name, count in rows if name not in inputs]
    return min(own, default=None)


def _as_type(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "bfloat16":
        # NumPy does not have it: the upper half of float32, which appears as uint16.
        return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(dtype)
