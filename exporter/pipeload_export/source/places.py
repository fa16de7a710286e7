"""Where the weights of a graph lie in the files of a checkpoint: safetensors, or GGUF.

A weight of a graph is a tensor of the checkpoint, or a view of one: its transpose, or a slice of a fused one.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeload.machine.files import open_file
from pipeload_export.source.folder import read_header

__all__ = [
    "ITEM_BYTES",
    "WEIGHTS_NAME",
    "Place",
    "Places",
    "Weights",
    "bytes_at",
    "elements_of",
    "first_values",
    "place_of",
    "places_in",
    "same_values",
    "values_at",
]


WEIGHTS_NAME = "weights.json"
"""File beside a graph that tells where its weights lie in the checkpoint."""

ITEM_BYTES: Mapping[str, int] = {"BF16": 2, "F16": 2, "F32": 4}
"""Types of tensors that become weights, and the bytes of an element."""

_PIECE_ELEMENTS = 1 << 20
"""About as many elements of two weights are compared at a time."""
_FIRST_ELEMENTS = 64
"""Weights that differ do so among the first, but for padding."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where one weight lies.

    Attributes:
        file: path of the file.
        dtype: of the tensor in the file, as its header names it: in a GGUF file it may be a type of blocks.
        begin: the tensor's first byte in the file.
        elements: number of elements of the tensor.
        shape: of the weight.
        strides: for each dimension of the weight, the elements of the tensor from one to the next.
        offset: the tensor's element that is the weight's first.
        columns: of a matrix of a GGUF file, whose elements are no plain part of the file; 0 of others.
        order: for each row of such a tensor, the row of the file; None for the same.
    """

    file: str
    dtype: str
    begin: int
    elements: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    columns: int = 0
    order: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor in the file."""
        if self.dtype in ITEM_BYTES:
            return self.elements * ITEM_BYTES[self.dtype]
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.dtype]]
        return int(self.elements // block_elements * block_bytes)


Places: TypeAlias = dict[str, Place]
"""Name of a weight -> where it lies."""


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """The weights of a graph that was traced without them.

    Attributes:
        places: of those that the graph has no values of; they are among its inputs.
        order: names of all of its weights, in the order in which it would have them.
    """

    places: Places
    order: list[str]


def places_in(files: Iterable[Path]) -> Places:
    """Where each tensor of the files lies. Only their headers are read.

    Raises:
        ValueError: a header is damaged.
    """
    found: Places = {}
    for path in files:
        with path.open("rb") as file:
            entries, _, begin = read_header(file)
        for name, entry in entries.items():
            shape = entry.shape
            found[name] = Place(
                file=str(path.resolve()),
                dtype=entry.dtype,
                begin=begin + entry.data_offsets[0],
                elements=prod(shape),
                shape=shape,
                strides=tuple(prod(shape[axis + 1 :]) for axis in range(len(shape))),
            )
    return found


def place_of(tensor: Place, shape: Iterable[int], strides: Iterable[int], offset: int) -> Place:
    """Where a view of a whole tensor lies."""
    return msgspec.structs.replace(tensor, shape=tuple(shape), strides=tuple(strides), offset=offset)


@contextmanager
def bytes_at(place: Place) -> Iterator[memoryview]:
    """The bytes of the whole tensor in the file, mapped and never written. They are gone behind the context."""
    first = place.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    before = place.begin - first
    with open_file(Path(place.file)) as descriptor:
        mapped = mmap.mmap(descriptor, before + place.nbytes, mmap.MAP_PRIVATE, offset=first)
    with mapped, memoryview(mapped) as whole, whole[before:] as part:
        yield part


def values_at(place: Place, file: NDArray[np.uint8]) -> NDArray[Any]:
    """The values of a weight: a view of the file, in its type; or float32, of a matrix of a GGUF file.

    Args:
        place: of the weight.
        file: the bytes of its file.
    """
    flat = (_matrix(place, file) if place.columns else _plain(place, file))[place.offset :]
    strides = [stride * flat.itemsize for stride in place.strides]
    return np.lib.stride_tricks.as_strided(flat, place.shape, strides, writeable=False)


def elements_of(place: Place) -> NDArray[np.float32]:
    """All elements of a matrix of a GGUF file, one behind another."""
    return _matrix(place, np.memmap(place.file, np.uint8, "r"))


def _plain(place: Place, file: NDArray[np.uint8]) -> NDArray[Any]:
    import ml_dtypes  # it comes with onnx

    dtypes = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
    data = file[place.begin : place.begin + place.nbytes]
    if place.begin % ITEM_BYTES[place.dtype]:
        data = data.copy()
    return data.view(dtypes[place.dtype])


def _matrix(place: Place, file: NDArray[np.uint8]) -> NDArray[np.float32]:
    from gguf import GGMLQuantizationType, dequantize

    rows = file[place.begin : place.begin + place.nbytes].reshape(place.elements // place.columns, -1)
    values: NDArray[np.float32] = dequantize(rows, GGMLQuantizationType[place.dtype])
    if place.order is not None:
        values = values[list(place.order)]
    return values.reshape(-1)


def first_values(place: Place) -> bytes:
    """The first elements of a weight, the same bytes for the same values of any type."""
    first: NDArray[np.float32] = _weight(place).flat[:_FIRST_ELEMENTS].astype(np.float32)
    return (first + np.float32(0)).tobytes()  # -0 equals 0


def same_values(one: Place, other: Place) -> bool:
    """Whether two weights of one shape are equal, read in pieces; one with a NaN equals none."""
    first, second = _weight(one), _weight(other)
    rows = max(1, _PIECE_ELEMENTS * len(first) // max(1, first.size))
    return all(
        np.array_equal(first[row : row + rows].astype(np.float32), second[row : row + rows].astype(np.float32))
        for row in range(0, len(first), rows)
    )


def _weight(place: Place) -> NDArray[Any]:
    return np.atleast_1d(values_at(place, np.memmap(place.file, np.uint8, "r")))
