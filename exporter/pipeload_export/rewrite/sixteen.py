"""A graph -> the same graph with float32 weights that have values of a 16-bit type only.

They stay float32 here. Whatever follows sees the rounded values, and a shard's weights are stored in 16 bits where that
loses nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from pipeload_export.graph.graph import Constant, Graph

__all__ = ["LEAST_BYTES", "round_to_16_bits"]

LEAST_BYTES = 16 << 10
"""Of smaller tensors nothing is gained: each has a node in the graph, and an array in memory."""
_TYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def round_to_16_bits(graph: Graph, dtype: str) -> int:
    """Round the weights of float32, each time that they are read.

    Args:
        graph: the model's, or a shard's; it changes.
        dtype: "bfloat16" or "float16". A tensor with a value that float16 has no room for stays as it is.

    Returns:
        How many weights there are.
    """
    large = {
        name: Constant(constant.dtype, constant.shape, partial(_rounded, constant, _TYPES[dtype]))
        for name, constant in graph.constants.items()
        if constant.dtype == TensorProto.FLOAT and constant.nbytes >= LEAST_BYTES
    }
    graph.constants |= large
    return len(large)


def _rounded(constant: Constant, kind: Any) -> NDArray[Any]:
    values: NDArray[np.float32] = constant.values()
    with np.errstate(over="ignore"):
        rounded: NDArray[Any] = values.astype(kind)
    return rounded if np.array_equal(np.isfinite(rounded), np.isfinite(values)) else values
