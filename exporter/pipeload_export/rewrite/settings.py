"""Inputs that are settings of a call, not data: they get the value under which the graph computes everything.

A decoder's `num_logits_to_keep` says of how many of the last positions it makes logits; 0 means all. The engine takes
the positions that a call wants itself, and gives only those to the head.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from pipeload_export.graph.graph import Graph, known_constant

__all__ = ["SETTINGS", "fix_settings"]

SETTINGS = frozenset({"logits_to_keep", "num_logits_to_keep"})
"""Names of such inputs: one int64 each, whose value for everything is 0."""


def fix_settings(graph: Graph) -> None:
    """Make constants of the graph's inputs that are settings."""
    for value in [value for value in graph.inputs if value.name in SETTINGS]:
        tensor = value.type.tensor_type
        if tensor.elem_type == TensorProto.INT64 and all(dim.dim_value == 1 for dim in tensor.shape.dim):
            graph.inputs.remove(value)
            graph.constants[value.name] = known_constant(np.zeros([1] * len(tensor.shape.dim), np.int64))
