"""Several inputs in one pass: joined along the first dimension, and taken apart again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["batches", "split_batch"]

Arrays: TypeAlias = dict[str, NDArray[Any]]


def batches(items: Iterable[Mapping[str, NDArray[Any]]], count: int) -> Iterator[tuple[Arrays, list[int]]]:
    """Items joined along the first dimension, up to `count` of them, as long as their other dimensions are equal.

    Yields:
        The joined arrays, and how many rows each item has.
    """
    group: list[dict[str, NDArray[Any]]] = []
    for item in items:
        arrays = dict(item)
        if group and _form(arrays) != _form(group[0]):
            yield _join(group)
            group = []
        group.append(arrays)
        # Not only when the next item comes: that may take a while.
        if len(group) == count:
            yield _join(group)
            group = []
    if group:
        yield _join(group)


def split_batch(outputs: Mapping[str, NDArray[Any]], rows: Sequence[int]) -> Iterator[Arrays]:
    """The outputs of each item of a batch.

    Args:
        outputs: arrays whose first dimension is the batch.
        rows: how many rows each item has.
    """
    if len(rows) == 1:
        yield dict(outputs)
        return
    begin = 0
    for count in rows:
        yield {name: array[begin : begin + count] for name, array in outputs.items()}
        begin += count


def _form(arrays: Mapping[str, Any]) -> object:
    rows = {len(a) if isinstance(a, np.ndarray) and a.ndim else None for a in arrays.values()}
    if len(rows) != 1 or None in rows:
        # What is no array, or has other rows than the rest, goes alone: the model says what is wrong with it.
        return object()
    return {name: (array.dtype, array.shape[1:]) for name, array in arrays.items()}


def _join(group: Sequence[Arrays]) -> tuple[Arrays, list[int]]:
    if len(group) == 1:
        return group[0], [1]
    joined = {name: np.concatenate([arrays[name] for arrays in group]) for name in group[0]}
    return joined, [len(next(iter(arrays.values()))) for arrays in group]
