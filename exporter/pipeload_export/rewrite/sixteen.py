"""An unsplit graph -> the same graph with float32 weights that have values of a 16-bit type only.

They stay float32 here. Whatever follows sees the rounded values, and a shard's weights are stored in 16 bits where that
loses nothing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from pipeload.errors import ExportError
from pipeload_export.graph.graph import Constant
from pipeload_export.graph.load import load
from pipeload_export.graph.save import GraphFile
from pipeload_export.source.places import Weights

__all__ = ["LEAST_BYTES", "write_with_16_bits"]

LEAST_BYTES = 16 << 10
"""Of smaller tensors nothing is gained: each has a node in the graph, and an array in memory."""
_TYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def write_with_16_bits(source: Path, stored: Weights | None, folder: Path, dtype: str) -> Path:
    """Write the graph with rounded weights.

    Args:
        source: the unsplit graph.
        stored: those of its weights that lie in a checkpoint.
        folder: an existing folder for the graph and its data.
        dtype: "bfloat16" or "float16". A tensor with a value that float16 has no room for stays as it is.

    Returns:
        The graph's file.

    Raises:
        ExportError: it has no weights of float32.
    """
    graph = load(source, stored)
    large = {
        name: Constant(constant.dtype, constant.shape, partial(_rounded, constant, _TYPES[dtype]))
        for name, constant in graph.constants.items()
        if constant.dtype == TensorProto.FLOAT and constant.nbytes >= LEAST_BYTES
    }
    if not large:
        raise ExportError(
            f"The graph has no weights of float32 that could be rounded, of at least {LEAST_BYTES >> 10} kB. Export it "
            "with --weights auto, which leaves weights as they are."
        )
    graph.constants |= large
    with GraphFile(folder / "model.onnx", "model.onnx_data") as file:
        file.finish(graph)
    return folder / "model.onnx"


def _rounded(constant: Constant, kind: Any) -> NDArray[np.float32]:
    values: NDArray[np.float32] = constant.values()
    with np.errstate(over="ignore"):
        rounded = values.astype(kind).astype(np.float32)
    return rounded if np.array_equal(np.isfinite(rounded), np.isfinite(values)) else values
