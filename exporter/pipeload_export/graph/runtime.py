"""A plain onnxruntime session over a graph, and onnxruntime's names of types."""

from __future__ import annotations

import onnxruntime as ort
from onnx import ModelProto

from pipeload_export.graph.graph import DTYPES

__all__ = ["elem_type_of", "plain_session"]


def plain_session(model: ModelProto) -> ort.InferenceSession:
    """A session over the graph as it is: not optimised, and silent."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


_ORT_TYPES = {"float": "float32", "double": "float64"}


def elem_type_of(text: str) -> int:
    """ONNX's number for onnxruntime's name of a tensor type, such as "tensor(float)"."""
    name = text.removeprefix("tensor(").removesuffix(")")
    name = _ORT_TYPES.get(name, name)
    return next((number for number, known in DTYPES.items() if known == name), 0)
