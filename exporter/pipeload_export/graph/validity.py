"""Is a graph valid ONNX? Its weights need not be there, and shapes that are not known yet do not count.

onnxruntime has a few operators of its own in ONNX's name, which its optimiser writes into graphs of any version:
LayerNormalization before ONNX had it, and SimplifiedLayerNormalization, which ONNX calls RMSNormalization. A graph that
came with them keeps them, and is judged without them.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, helper

from pipeload.errors import ExportError
from pipeload.foreign import first_line
from pipeload_export.graph.external_data import without_external_data
from pipeload_export.graph.graph import SUBGRAPHS

__all__ = ["check_model", "runtime_ops", "version_of"]

_RUNTIME_OPS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})
_RUNTIME_DOMAIN = "ai.onnxruntime"
"""Any domain that ONNX's checker does not know."""


def version_of(model: ModelProto) -> int:
    """The version of ONNX's own operators."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def runtime_ops(model: ModelProto) -> frozenset[str]:
    """The operators of a graph that are onnxruntime's own in ONNX's name."""
    version = version_of(model)
    return frozenset(node.op_type for node in _nodes(model.graph) if _is_runtimes(node, version))


def check_model(model: ModelProto) -> None:
    """Check a graph; the values of large weights are not looked at.

    Raises:
        ExportError: it is not valid ONNX; the message is the checker's first line.
    """
    try:
        copy = without_external_data(model)
        version = version_of(model)
        for node in _nodes(copy.graph):
            if _is_runtimes(node, version):
                node.domain = _RUNTIME_DOMAIN
        copy.opset_import.append(helper.make_opsetid(_RUNTIME_DOMAIN, 1))
        unknown = [v for v in (*copy.graph.input, *copy.graph.output) if not v.type.tensor_type.HasField("shape")]
        for value in unknown:
            value.type.tensor_type.shape.SetInParent()
        # Types and shapes can only be checked through operators whose schema the checker has.
        standard = not unknown and all(node.domain in ("", "ai.onnx") for node in _nodes(copy.graph))
        # Not the path: the checker would refuse weights files with a second name (hard links), which load and run.
        onnx.checker.check_model(copy, full_check=standard)
    except (DecodeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(first_line(error)) from error


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes, those of subgraphs too."""
    for node in graph.node:
        yield node
        for item in node.attribute:
            if item.type in SUBGRAPHS:
                for inner in (item.g, *item.graphs):
                    yield from _nodes(inner)


def _is_runtimes(node: NodeProto, version: int) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type not in _RUNTIME_OPS:
        return False
    try:
        onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return True
    return False
