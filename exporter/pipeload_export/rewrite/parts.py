"""The parts of rounded matrices, made when they are first wanted, and kept in a file until their shard is written.

A matrix is rounded a piece at a time into a file of its own, so memory holds neither the floats nor what becomes of
them. The parts of a table stay until the end: several shards take rows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeload_export.graph.graph import Constant, storage_dtype
from pipeload_export.graph.save import TensorFile, TensorPlace

__all__ = ["Parts", "Write"]

Write: TypeAlias = Callable[[TensorFile], Iterable[int]]
"""Writes the parts of a matrix, and yields now and then."""


class _Made:
    """The parts of one matrix: the file that they are in, once they are wanted."""

    def __init__(self, path: Path, write: Write) -> None:
        self._path = path
        self._write = write
        self._places: Mapping[str, TensorPlace] = {}

    def load(self, name: str) -> NDArray[Any]:
        if not self._places:
            with TensorFile(self._path) as file:
                for _ in self._write(file):
                    pass
            self._places = file.places
        place = self._places[name]
        return np.memmap(self._path, storage_dtype(place.dtype), "r", place.offset, place.shape)

    def forget(self) -> None:
        if self._places:
            self._path.unlink()
            self._places = {}


class Parts:
    """The parts of all matrices of a model.

    Args:
        folder: an existing folder for their files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: list[tuple[_Made, bool]] = []

    def constants(
        self, declared: Mapping[str, tuple[int, tuple[int, ...]]], write: Write, *, stay: bool
    ) -> dict[str, Constant]:
        """The parts of one matrix as constants.

        Args:
            declared: their names, element types and shapes.
            write: writes tensors of these names.
            stay: keep them when others are forgotten.
        """
        made = _Made(self._folder / f"{len(self._made)}.parts", write)
        self._made.append((made, stay))
        return {name: Constant(dtype, shape, partial(made.load, name)) for name, (dtype, shape) in declared.items()}

    def forget(self) -> None:
        """Remove the files of all matrices that do not stay; a part that is wanted again is made again."""
        for made, stays in self._made:
            if not stays:
                made.forget()
