"""Constants -> a safetensors file whose data begins at a page, written piece by piece.

The library's own writer holds all tensors in memory and cannot pad its header; files written here open with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.format.manifest import PAGE_BYTES, FileRecord, WeightSpec, WeightsRange
from pipeload_export.graph.graph import DTYPES, Constant

__all__ = ["WeightsFile", "hash_range", "in_order", "write_weights"]

_PIECE_BYTES = 16 << 20
_ALIGNED_BYTES = 64
_SAFETENSORS_NAMES = {
    "bool": "BOOL", "int8": "I8", "uint8": "U8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """A file that was written.

    Attributes:
        record: the whole file.
        range: its data.
        tensors: what lies in it, in order.
    """

    record: FileRecord
    range: WeightsRange
    tensors: tuple[WeightSpec, ...]


def in_order(constants: Mapping[str, Constant]) -> list[tuple[str, Constant]]:
    """Tensors in an order that leaves nearly all of them aligned to 64 bytes, and every one to its element's size."""

    def key(item: tuple[str, Constant]) -> tuple[bool, int, int]:
        constant = item[1]
        odd = constant.nbytes % _ALIGNED_BYTES != 0
        item_bytes = constant.nbytes // max(int(np.prod(constant.shape)), 1)
        return odd, -item_bytes if odd else 0, -constant.nbytes

    return sorted(constants.items(), key=key)


def write_weights(
    path: Path, constants: Sequence[tuple[str, Constant]], *, written: Callable[[int], None] | None = None
) -> WeightsFile:
    """Write tensors in the given order.

    Args:
        path: the file to make, in the folder of the shards.
        constants: name and values.
        written: called with the number of bytes of each piece that was written.
    """
    entries: dict[str, dict[str, Any]] = {}
    position = 0
    for name, constant in constants:
        dtype = _SAFETENSORS_NAMES[DTYPES[constant.dtype]]
        end = position + constant.nbytes
        entries[name] = {"dtype": dtype, "shape": list(constant.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % PAGE_BYTES)
    begin = 8 + len(header)
    prefix = len(header).to_bytes(8, "little") + header
    whole, data = hashlib.sha256(prefix), hashlib.sha256()
    with path.open("wb") as file:
        file.write(prefix)
        for _, constant in constants:
            for piece in _pieces(constant.load()):
                file.write(piece)
                whole.update(piece)
                data.update(piece)
                if written:
                    written(len(piece))
        if file.tell() != begin + position:
            raise AssertionError(f"{path} got {file.tell() - begin} bytes of weights, expected {position}")
    relative = f"{path.parent.name}/{path.name}"
    return WeightsFile(
        record=FileRecord(path=relative, nbytes=begin + position, sha256=whole.hexdigest()),
        range=WeightsRange(path=relative, offset=begin, nbytes=position, sha256=data.hexdigest()),
        tensors=tuple(
            WeightSpec(
                name=name,
                dtype=DTYPES[constant.dtype],
                shape=constant.shape,
                offset=begin + entries[name]["data_offsets"][0],
            )
            for name, constant in constants
        ),
    )


def hash_range(path: Path, offset: int, nbytes: int) -> str:
    """The sha256 of a part of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while nbytes and (piece := file.read(min(nbytes, _PIECE_BYTES))):
            digest.update(piece)
            nbytes -= len(piece)
    return digest.hexdigest()


def _pieces(array: NDArray[Any]) -> Iterator[memoryview]:
    """The bytes of an array in C order; of a view, only a piece at a time is copied."""
    if not array.nbytes:
        return
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(_PIECE_BYTES * len(rows) // rows.nbytes, 1)
    for begin in range(0, len(rows), step):
        piece = np.ascontiguousarray(rows[begin : begin + step])
        yield piece.reshape(-1).view(np.uint8).data
