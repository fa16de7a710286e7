"""16-bit weights of a checkpoint -> float32 files, which are mapped instead of held in memory.

transformers maps the tensors of a safetensors file that have the type it is asked for, and the system reads them layer
by layer and drops them where memory is short. All others become copies that stay in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeload.format.safetensors import Entry
from pipeload_export.source.folder import NARROW, read_header

__all__ = ["MAPPED_FROM_BYTES", "widen"]

MAPPED_FROM_BYTES = 2 << 30
"""Smaller models (in float32) are held in memory, which is faster."""
_PIECE_BYTES = 32 << 20


def widen(view: Path) -> None:
    """Put float32 files in the place of a view's links to safetensors files that have 16-bit floats.

    Args:
        view: a folder of links to the files of a checkpoint.

    Raises:
        OSError: the disk is full.
    """
    for link in sorted(view.glob("*.safetensors")):
        with link.open("rb") as file:
            entries, metadata, begin = read_header(file)
            if not any(entry.dtype in NARROW for entry in entries.values()):
                continue
            made = link.with_name(f"{link.name}.widened")
            with made.open("wb") as target:
                _write(target, file, begin, entries, metadata)
        made.replace(link)


def _write(target: BinaryIO, file: BinaryIO, begin: int, entries: dict[str, Entry], metadata: Any) -> None:
    order = sorted(entries, key=lambda name: entries[name].data_offsets)
    wide: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    place = 0
    for name in order:
        entry = entries[name]
        narrow = entry.dtype in NARROW
        nbytes = 4 * prod(entry.shape) if narrow else entry.nbytes
        dtype = "F32" if narrow else entry.dtype
        wide[name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": [place, place + nbytes]}
        place += nbytes
    head = json.dumps(wide).encode()
    head += b" " * (-len(head) % 8)
    target.write(len(head).to_bytes(8, "little") + head)
    for name in order:
        entry = entries[name]
        file.seek(begin + entry.data_offsets[0])
        for piece in _pieces(file, entry.nbytes):
            target.write(_float32(piece, entry.dtype) if entry.dtype in NARROW else piece)


def _pieces(file: BinaryIO, nbytes: int) -> Iterator[bytes]:
    while nbytes > 0 and (piece := file.read(min(nbytes, _PIECE_BYTES))):
        nbytes -= len(piece)
        yield piece


def _float32(piece: bytes, dtype: str) -> bytes:
    if dtype == "F16":
        return np.frombuffer(piece, np.float16).astype(np.float32).tobytes()
    # bfloat16 is the upper half of a float32.
    return (np.frombuffer(piece, np.uint16).astype(np.uint32) << 16).tobytes()
