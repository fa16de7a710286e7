"""Plain onnxruntime sessions: the only place in the exporter that makes them. It needs no onnx."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeload.errors import ExportError
from pipeload.foreign import first_line, system_error_in

__all__ = [
    "LEVEL",
    "NOT_APPLIED",
    "dtype_of",
    "open_session",
    "packed_options",
    "raise_shortage",
    "run",
    "session_options",
]

_SHORTAGE = re.compile(r"bad_alloc|bad allocation|failed to allocate memory|pthread_create", re.IGNORECASE)
LEVEL = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
"""The level at which shards are optimised: portable, unlike "all"."""
NOT_APPLIED = (
    "AttentionFusion",
    "ConvAddFusion",
    "ConvBNFusion",
    "ConvMulFusion",
    "DoubleQDQPairsRemover",
    "EmbedLayerNormFusion",
    "GatherSliceToSplitFusion",
    "GroupQueryAttentionFusion",
    "MatMulBNFusion",
    "MatMulNBitsFusion",
    "QDQPropagationTransformer",
    "TransposeOptimizer",
    "TransposeOptimizer_CPUExecutionProvider",
    "WeightBiasQuantization",
)
"""Optimisers that make new weights from old ones, which are zeros while a shard is fused."""

_BFLOAT16 = 16
"""ONNX's number of the type."""


def session_options() -> ort.SessionOptions:
    """Options of a session over the graph as it is: not optimised, nothing packed or kept, and silent."""
    options = _plain_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def packed_options() -> ort.SessionOptions:
    """Options of a session whose weights are packed, as the engine packs shards with weights of few bits.

    The basic optimisations make constants of scales that are stored in 16 bits: with scales that a `Cast` makes while
    the graph runs, onnxruntime's packed products are wrong.
    """
    options = _plain_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options


def _plain_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    return options


def open_session(
    graph: Path | bytes, what: str, options: ort.SessionOptions | None = None, *, disabled: Collection[str] = ()
) -> ort.InferenceSession:
    """A session on the CPU.

    Args:
        graph: the graph's file, beside its external data; or a graph with all of its data inside, serialised.
        what: a name of the graph, for the message.
        options: None takes `session_options`.
        disabled: names of optimisers that are not used.

    Raises:
        ExportError: onnxruntime refuses the graph.
        MemoryError: it has no memory or no thread for a session.
        OSError: the system does not let it read the file.
    """
    try:
        return ort.InferenceSession(
            graph if isinstance(graph, bytes) else str(graph),
            options or session_options(),
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(disabled),
            # Otherwise it prints "EP Error" to stdout and tries once more, without `disabled_optimizers`.
            enable_fallback=0,
        )
    except Exception as error:  # onnxruntime's exceptions have no common base
        if system := system_error_in(error, what if isinstance(graph, bytes) else str(graph)):
            raise system from error
        raise_shortage(error)
        reason = first_line(error)
        if isinstance(graph, Path):
            # It names a file that may be temporary; the message's reader knows it as `what`.
            reason = reason.replace(f"{graph.parent}/", "")
        raise ExportError(f"onnxruntime does not open {what}: {reason}. Fetch or export it again.") from error


def run(session: ort.InferenceSession, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The outputs `names`. NumPy has no bfloat16: such inputs may be `ml_dtypes`' arrays, or uint16."""
    wide = {value.name for value in session.get_inputs() if value.type == "tensor(bfloat16)"}
    given = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array).view(np.uint16), _BFLOAT16)
        if name in wide
        else array
        for name, array in inputs.items()
    }
    result: list[NDArray[Any]] = session.run(list(names), given)
    return result


def raise_shortage(error: Exception) -> None:
    """Raise MemoryError where onnxruntime failed because the machine is short of something: no graph is at fault."""
    if isinstance(error, MemoryError) or _SHORTAGE.search(str(error)):
        raise MemoryError(first_line(error)) from error


def dtype_of(name: str) -> str:
    """NumPy's name of an element type that onnxruntime calls `name`."""
    return {"float": "float32", "double": "float64"}.get(name, name)
