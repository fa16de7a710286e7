"""Weights of a graph that are read from a checkpoint's files, tensor by tensor."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from pipeload.errors import ExportError
from pipeload_export.graph.graph import Constant
from pipeload_export.source.places import Place, values_at

__all__ = ["constants_at"]


def constants_at(places: Mapping[str, Place]) -> tuple[dict[str, Constant], Callable[[], None]]:
    """Float32 weights at these places, and a function that gives back the memory of all values that were read.

    `load` gives the values in the type that the file has, as a view of the file; those of matrices of a GGUF file are
    made anew each time.

    Raises:
        ExportError: a file is missing, or ends before a weight does.
    """
    files = {name: _opened(Path(name)) for name in {place.file for place in places.values()}}
    for place in places.values():
        end = place.begin + place.nbytes
        if files[place.file].nbytes < end:
            raise ExportError(f"{place.file} ends before byte {end}, where a weight ends. Fetch it again.")
    constants = {
        name: Constant(TensorProto.FLOAT, place.shape, partial(values_at, place, files[place.file]))
        for name, place in places.items()
    }

    def forget() -> None:
        for mapped in files.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    return constants, forget


def _opened(path: Path) -> np.memmap[Any, np.dtype[np.uint8]]:
    if not path.is_file():
        raise ExportError(f"The checkpoint's file {path} is missing. Fetch it again.")
    return np.memmap(path, np.uint8, "r")
