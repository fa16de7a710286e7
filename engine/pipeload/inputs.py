"""Arrays for the graph's inputs: checked against the manifest, joined along the first dimension, and split again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError
from pipeload.format.manifest import Manifest, evaluate_dim, match_dims, symbols

__all__ = [
    "INPUTS_FACT",
    "INPUTS_REMEDY",
    "Arrays",
    "GraphInputs",
    "batches",
    "check_batches",
    "numpy_dtype",
    "split_batch",
]

INPUTS_FACT, INPUTS_REMEDY = "The inputs could not be brought into the pipeline", "Pass smaller inputs."

Arrays: TypeAlias = dict[str, NDArray[Any]]


class GraphInputs:
    """The inputs of a model's graph.

    Args:
        manifest: the model.

    Attributes:
        specs: name -> the graph input.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self.specs = {spec.name: spec for spec in manifest.inputs}
        self._caches = [cache.input for cache in manifest.caches]
        self._free = manifest.free_inputs

    def check(
        self, inputs: Mapping[str, NDArray[Any]], cached: Mapping[str, tuple[int, ...]] | None = None
    ) -> tuple[Arrays, dict[str, int]]:
        """Check arrays against the manifest.

        Args:
            inputs: by name. Caches may be left out, and are then empty.
            cached: shapes of the caches that a decode state holds.

        Returns:
            An array for every graph input that is not in `cached`, and the sizes of all symbolic dimensions.

        Raises:
            ConfigError: an input is missing, unknown, or of the wrong dtype or shape; all faults at once.
        """
        _check_mapping(inputs)
        cached = cached or {}
        faults = [f"'{name}' is no input of the model" for name in inputs if name not in self.specs]
        faults += [f"'{spec.name}' is missing" for spec in self._free if spec.name not in inputs]
        for name, array in inputs.items():
            spec = self.specs.get(name)
            if not isinstance(array, np.ndarray):
                faults.append(f"'{name}' is a {type(array).__name__}, not a NumPy array")
            elif spec and array.dtype != (wanted := numpy_dtype(spec.dtype)):
                faults.append(f"'{name}' has dtype {array.dtype}, the model takes {wanted}")
        given = [name for name in self._caches if name in inputs or name in cached]
        left_out = [self.specs[name] for name in self._caches if name not in given]
        if given:
            faults += [f"cache '{spec.name}' is missing: pass all caches, or none" for spec in left_out]
        shapes = {name: array.shape for name, array in inputs.items() if isinstance(array, np.ndarray)} | dict(cached)
        # Caches that were left out are empty: their length, which only they and sums have, is 0.
        bound = {dim for spec in self._free for dim in spec.shape}
        lengths = {symbol for spec in left_out for dim in spec.shape for symbol in symbols(dim)} - bound
        dims, misfits = match_dims(self._manifest.inputs, shapes, dict.fromkeys(lengths, 0))
        if faults or misfits:
            takes = ", ".join(f"{spec.name}: {spec.dtype}{list(spec.shape)}" for spec in self._free)
            raise ConfigError(f"The inputs do not fit the model: {'; '.join(faults + misfits)}. It takes {takes}.")
        dims = {symbol: dims.get(symbol, 0) for symbol in self._manifest.dims}
        arrays = dict(inputs)
        for spec in left_out:
            arrays[spec.name] = np.zeros([evaluate_dim(dim, dims) for dim in spec.shape], numpy_dtype(spec.dtype))
        return arrays, dims


def numpy_dtype(dtype: str) -> str:
    """NumPy's name of a dtype; it has no bfloat16, which appears as uint16."""
    return "uint16" if dtype == "bfloat16" else dtype


def check_batches(items: object, batch: object) -> None:
    """Raise ConfigError unless these are items, and the most that are joined."""
    if not isinstance(batch, int | np.integer) or batch < 1:
        raise ConfigError(f"batch is {batch!r}; it must be a whole number, at least 1.")
    if not isinstance(items, Iterable):
        raise ConfigError(f"items is {items!r}; it must be an iterable of inputs.")


def batches(items: Iterable[Mapping[str, NDArray[Any]]], count: int) -> Iterator[tuple[Arrays, list[int]]]:
    """Items joined along the first dimension, up to `count` of them, as long as their other dimensions are equal.

    Yields:
        The joined arrays, and the number of rows of each item.
    """
    group: list[dict[str, NDArray[Any]]] = []
    for item in items:
        _check_mapping(item)
        arrays = dict(item)
        if group and _form(arrays) != _form(group[0]):
            yield _join(group)
            group = []
        group.append(arrays)
        # Now, without waiting for the next item: that may take a while.
        if len(group) == count:
            yield _join(group)
            group = []
    if group:
        yield _join(group)


def split_batch(outputs: Mapping[str, NDArray[Any]], rows: Sequence[int]) -> Iterator[Arrays]:
    """The outputs of each item of a batch.

    Args:
        outputs: arrays whose first dimension is the batch.
        rows: the number of rows of each item.
    """
    if len(rows) == 1:
        yield dict(outputs)
        return
    begin = 0
    for count in rows:
        yield {name: array[begin : begin + count] for name, array in outputs.items()}
        begin += count


def _check_mapping(inputs: object) -> None:
    if not isinstance(inputs, Mapping):
        raise ConfigError(f"Inputs are arrays by name, such as {{'input_ids': array}}, not {type(inputs).__name__}.")


def _form(arrays: Mapping[str, Any]) -> object:
    rows = {len(a) if isinstance(a, np.ndarray) and a.ndim else None for a in arrays.values()}
    if len(rows) != 1 or None in rows:
        # An item that is no array, or has other rows than the rest, goes alone: the model names its fault.
        return object()
    return {name: (array.dtype, array.shape[1:]) for name, array in arrays.items()}


def _join(group: Sequence[Arrays]) -> tuple[Arrays, list[int]]:
    if len(group) == 1:
        return group[0], [1]
    joined = {name: np.concatenate([arrays[name] for arrays in group]) for name in group[0]}
    return joined, [len(next(iter(arrays.values()))) for arrays in group]
