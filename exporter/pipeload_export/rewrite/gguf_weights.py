"""An unsplit graph that was made of a GGUF file -> the same graph with the file's own blocks, not rounded again.

Which constant of the graph is which tensor of the file is found by value. transformers permutes the rows of some
tensors, and models join several; but a row of the graph's matrix is a row of the file: one of the same floats, told by
a hash of their bytes. A matrix is taken where all of its rows are found, in tensors of one type.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.notify import Notify
from pipeload_export.graph.graph import Graph
from pipeload_export.graph.load import load
from pipeload_export.graph.normalise import normalise
from pipeload_export.graph.save import GraphFile
from pipeload_export.rewrite.gguf_blocks import LAYOUTS, blocks_of
from pipeload_export.rewrite.matrices import Matrix, find_matrices, has_ranks, replace_matrices
from pipeload_export.source.gguf import QuantisedTensor, quantised_tensors
from pipeload_export.source.places import Weights

__all__ = ["KeptBlocks", "write_with_blocks"]

_GRAPH_NAME, _DATA_NAME = "model.onnx", "model.onnx_data"
_PIECE_BYTES = 16 << 20
_HASH_BYTES = 16
_STEP = "keep the blocks of the file"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptBlocks:
    """What became of a file's quantised tensors.

    Attributes:
        path: of the graph with blocks; None where no tensor was found in the graph.
        weights: type of GGUF -> weights of that type that are blocks in the graph.
        floats: names of the tensors that are floats there.
    """

    path: Path | None
    weights: dict[str, int]
    floats: tuple[str, ...]


def write_with_blocks(source: Path, stored: Weights | None, gguf: Path, folder: Path, progress: Notify) -> KeptBlocks:
    """Write the graph with those blocks of the file that products and lookups take, if there are any.

    Matrices stay floats where a type has no layout, where a table has minima, which lookups do not add, and where the
    values are others than the file's.

    Args:
        source: the unsplit graph, with the values of the file as float32.
        stored: those of its weights that lie in a checkpoint.
        gguf: the file.
        folder: an existing folder for the graph and its data.
        progress: called with the name of the step, the bytes of floats that were looked at, and all of them.
    """
    graph = load(source, stored)
    normalise(graph)
    tensors = quantised_tensors(gguf)
    known = [tensor for tensor in tensors if tensor.kind in LAYOUTS]
    matrices = find_matrices(graph)
    done, total = 0, 4 * sum(len(t.rows) * t.columns for t in known) + sum(m.constant.nbytes for m in matrices)
    index = _Rows(known)
    for nbytes in index.read():
        done += nbytes
        progress(_STEP, done, total)
    found: list[tuple[Matrix, _Place]] = []
    for matrix in matrices:
        place = index.find(matrix)
        if place is not None and _can_be_taken(graph, matrix, place.kind):
            found.append((matrix, place))
        done += matrix.constant.nbytes
        progress(_STEP, done, total)
        graph.forget()
    if found:
        replace_matrices(graph, [(matrix, LAYOUTS[place.kind]) for matrix, place in found])
        with GraphFile(folder / _GRAPH_NAME, _DATA_NAME) as file:
            for matrix, place in found:
                _write(file, matrix, place, known)
            file.finish(graph)
    weights: Counter[str] = Counter()
    for matrix, place in found:
        weights[place.kind] += prod(matrix.constant.shape)
    taken = {known[number].name for _, place in found for number in np.unique(place.tensors)}
    return KeptBlocks(
        path=folder / _GRAPH_NAME if found else None,
        weights=dict(weights),
        floats=tuple(tensor.name for tensor in tensors if tensor.name not in taken),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where the rows of a matrix are: for each one the number of a tensor, and of a row in it."""

    kind: str
    tensors: NDArray[np.intp]
    rows: NDArray[np.intp]


class _Rows:
    """The rows of tensors, by what they are as floats.

    Args:
        tensors: of types that have a layout.
    """

    def __init__(self, tensors: Sequence[QuantisedTensor]) -> None:
        self._tensors = tensors
        self._firsts = np.cumsum([0, *(len(tensor.rows) for tensor in tensors)])
        self._hashes = np.empty(self._firsts[-1], f"V{_HASH_BYTES}").view(f"S{_HASH_BYTES}")
        self._order = np.empty(0, np.intp)

    def read(self) -> Iterator[int]:
        """Read all tensors, a piece at a time; after each the bytes of its floats."""
        for first, tensor in zip(self._firsts, self._tensors, strict=False):
            for begin, rows in _pieces(tensor.rows, 4 * tensor.columns):
                values = tensor.floats(rows)
                self._hashes[first + begin : first + begin + len(rows)] = _hashes(values)
                yield values.nbytes
        self._order = np.argsort(self._hashes)
        self._hashes = self._hashes[self._order]

    def find(self, matrix: Matrix) -> _Place | None:
        """The rows of a matrix, if all of them are here in one type."""
        found = []
        for _, rows in _pieces(matrix.as_rows().load(), 4 * matrix.columns):
            wanted = _hashes(rows)
            places = np.searchsorted(self._hashes, wanted)
            if (places == len(self._hashes)).any() or (self._hashes[places] != wanted).any():
                return None
            found.append(self._order[places])
        numbers = np.concatenate(found)
        tensors = np.searchsorted(self._firsts, numbers, side="right") - 1
        kinds = {self._tensors[number].kind for number in np.unique(tensors)}
        if len(kinds) > 1:
            return None
        return _Place(kind=kinds.pop(), tensors=tensors, rows=numbers - self._firsts[tensors])


def _can_be_taken(graph: Graph, matrix: Matrix, kind: str) -> bool:
    return has_ranks(graph, matrix) and not (LAYOUTS[kind].has_minima and matrix.lookups)


def _write(file: GraphFile, matrix: Matrix, place: _Place, tensors: Sequence[QuantisedTensor]) -> None:
    parts: dict[str, list[NDArray[Any]]] = {}
    begin = file.begin()
    width = tensors[place.tensors[0]].rows.shape[1]
    for first, numbers in _pieces(place.rows, width):
        rows = np.empty((len(numbers), width), np.uint8)
        for number in np.unique(owners := place.tensors[first : first + len(numbers)]):
            rows[owners == number] = tensors[number].rows[numbers[owners == number]]
        blocks = blocks_of(rows, place.kind)
        file.write(blocks.blobs)
        parts.setdefault("scales", []).append(blocks.scales)
        if blocks.minima is not None:
            parts.setdefault("minima", []).append(blocks.minima)
    matrix.add(file, LAYOUTS[place.kind], begin, **{part: np.concatenate(found) for part, found in parts.items()})


def _pieces(array: NDArray[Any], row_bytes: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Some rows at a time, and the number of the first."""
    step = max(_PIECE_BYTES // row_bytes, 1)
    return ((begin, array[begin : begin + step]) for begin in range(0, len(array), step))


def _hashes(rows: NDArray[np.float32]) -> NDArray[np.bytes_]:
    made = (hashlib.blake2b(row.data, digest_size=_HASH_BYTES).digest() for row in np.ascontiguousarray(rows))
    return np.frombuffer(b"".join(made), f"S{_HASH_BYTES}")
