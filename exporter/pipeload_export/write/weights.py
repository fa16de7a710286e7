"""Constants -> a safetensors file whose data begins at a page, written piece by piece.

The library's own writer holds all tensors in memory and cannot pad its header; files written here open with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.format.dtypes import ONNX_DTYPES, SAFETENSORS_DTYPES
from pipeload.format.manifest import PAGE_BYTES, FileRecord, WeightSpec, WeightsRange
from pipeload.storage.digests import FileDigests
from pipeload_export.graph.graph import Constant, row_pieces, storage_dtype
from pipeload_export.write.journal import Finished, Journal

__all__ = ["WeightsFile", "in_order", "write_weights"]

_PIECE_BYTES = 16 << 20
_ALIGNED_BYTES = 64
_STRIP_COLUMNS = 16
"""Of float32 as many as a line of the cache has. Larger strips of 16 bits took longer, too."""
_SAFETENSORS_NAMES = {name: short for short, name in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """A file that was written.

    Attributes:
        record: the whole file.
        range: its data, where one shard loads all of it; None of a file of tables.
        slices: (name of a tensor, first row) -> these rows, for those that were asked for.
        tensors: the tensors in it, in order.
    """

    record: FileRecord
    range: WeightsRange | None
    slices: dict[tuple[str, int], WeightsRange]
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
    path: Path,
    constants: Sequence[tuple[str, Constant]],
    *,
    tables: bool = False,
    widened: Mapping[str, str] | None = None,
    rows: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    runs: Mapping[tuple[str, int], Sequence[str]] | None = None,
    journal: Journal | None = None,
    written: Callable[[int], None] | None = None,
) -> WeightsFile:
    """Write tensors in the given order, and hash each byte once on the way.

    Args:
        path: the file to make, in the folder of the shards.
        constants: names and values.
        tables: the file is no shard's: shards load at most slices of it.
        widened: name of a tensor that is stored in 16 bits -> name of what the graph casts it to.
        rows: name of a tensor -> the slices of it that shards load alone, first row and end.
        runs: key of a slice -> the tensors, one behind the other, that a shard loads alone.
        journal: has the files that killed exports have finished; such a one is taken, and no tensor is read.
        written: called with the number of bytes of each piece that was written.
    """
    entries: dict[str, dict[str, Any]] = {}
    position = 0
    for name, constant in constants:
        dtype = _SAFETENSORS_NAMES[ONNX_DTYPES[constant.dtype]]
        end = position + constant.nbytes
        entries[name] = {"dtype": dtype, "shape": list(constant.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % PAGE_BYTES)
    begin = 8 + len(header)
    prefix = len(header).to_bytes(8, "little") + header
    size = begin + position
    spans = {
        (name, first): _rows_span(begin + entries[name]["data_offsets"][0], constant, first, end)
        for name, constant in constants
        for first, end in (rows or {}).get(name, ())
    }
    for key, names in (runs or {}).items():
        spans[key] = begin + entries[names[0]]["data_offsets"][0], begin + entries[names[-1]]["data_offsets"][1]
    ranges = [*([] if tables else [(begin, size)]), *spans.values()]
    plan = hashlib.sha256(prefix + repr(ranges).encode()).hexdigest()
    finished = journal.take(path, plan) if journal else None
    if finished is None:
        digests = FileDigests(ranges, apart=True)
        _write(path, prefix, constants, digests, written)
        if digests.position != size:
            raise AssertionError(f"{path} got {digests.position - begin} bytes of weights, expected {position}")
        finished = Finished(
            path=journal.name(path) if journal else path.name,
            plan=plan,
            nbytes=size,
            sha256=digests.sha256,
            ranges=tuple((*span, digests.range_sha256(*span)) for span in ranges),
        )
        if journal:
            journal.add(path, finished)
    elif written:
        written(position)
    relative = f"{path.parent.name}/{path.name}"
    return WeightsFile(
        record=FileRecord(path=relative, nbytes=size, sha256=finished.sha256, ranges_apart=True),
        range=None if tables else _range(relative, finished, begin, size),
        slices={key: _range(relative, finished, *span) for key, span in spans.items()},
        tensors=tuple(
            WeightSpec(
                name=name,
                dtype=ONNX_DTYPES[constant.dtype],
                shape=constant.shape,
                offset=begin + entries[name]["data_offsets"][0],
                widened=(widened or {}).get(name),
            )
            for name, constant in constants
        ),
    )


def _rows_span(offset: int, constant: Constant, first: int, end: int) -> tuple[int, int]:
    """Where rows lie in the file: first byte and end."""
    row_bytes = constant.nbytes // constant.shape[0]
    return offset + first * row_bytes, offset + end * row_bytes


def _range(path: str, finished: Finished, begin: int, end: int) -> WeightsRange:
    sha256 = finished.range_sha256(begin, end)
    return WeightsRange(path=path, offset=begin, nbytes=end - begin, sha256=sha256)


def _write(
    path: Path,
    prefix: bytes,
    constants: Sequence[tuple[str, Constant]],
    digests: FileDigests,
    written: Callable[[int], None] | None,
) -> None:
    """Write the file; while one piece is hashed and written, the next one is read from the checkpoint, and turned."""
    with path.open("wb") as file, ThreadPoolExecutor(1, "pipeload-writer") as writer:

        def write(piece: memoryview) -> None:
            digests.update(piece)
            file.write(piece)

        before = writer.submit(write, memoryview(prefix))
        for _, constant in constants:
            for piece in _pieces(constant):
                before.result()
                before = writer.submit(write, piece)
                if written:
                    written(len(piece))
        before.result()


def _pieces(constant: Constant) -> Iterator[memoryview]:
    """The bytes of a constant in C order; of a view, or of values of another type, only a piece at a time is copied."""
    array, dtype = constant.load(), storage_dtype(constant.dtype)
    if not array.nbytes:
        return
    if array.dtype == dtype and dtype.itemsize in (1, 2, 4, 8):
        # As integers: NumPy copies its own types much faster.
        array, dtype = array.view(f"u{dtype.itemsize}"), np.dtype(f"u{dtype.itemsize}")
    for piece in row_pieces(array, _PIECE_BYTES // array.itemsize):
        yield _in_c_order(piece, dtype).reshape(-1).view(np.uint8).data


def _in_c_order(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The array as it lies in the file; a matrix that lies by columns, as a transpose, is copied strip by strip."""
    if array.ndim != 2 or array.flags.c_contiguous or array.strides[0] >= array.strides[1]:
        return np.ascontiguousarray(array, dtype)
    made = np.empty(array.shape, dtype)
    for begin in range(0, array.shape[1], _STRIP_COLUMNS):
        # NumPy reads along the rows of what it writes: of wide ones each element would be in another line of the cache.
        made[:, begin : begin + _STRIP_COLUMNS] = array[:, begin : begin + _STRIP_COLUMNS]
    return made
