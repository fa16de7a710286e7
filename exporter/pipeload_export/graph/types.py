"""Element types and shapes of every tensor of a graph."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from pipeload.errors import ExportError
from pipeload.format.dtypes import ONNX_DTYPES
from pipeload_export.graph.graph import Graph, attribute, tensor_proto
from pipeload_export.graph.runtime import dtype_of, open_session

__all__ = ["SMALL_BYTES", "elem_type_of", "infer_types", "plain_model", "table_shape", "type_of"]

SMALL_BYTES = 64 << 10
"""Up to this size a result may be larger than its inputs."""


def infer_types(graph: Graph) -> dict[str, tuple[int, tuple[int | str | None, ...] | None]]:
    """Types and shapes from ONNX's shape inference; for tensors without a type there, the types of onnxruntime."""
    large = {n: c for n, c in graph.constants.items() if c.nbytes >= SMALL_BYTES}
    small = [tensor_proto(n, c) for n, c in graph.constants.items() if n not in large]
    # Values of large constants do not matter for shapes, and a proto cannot hold more than 2 GB of them.
    inputs = [*graph.inputs, *(helper.make_tensor_value_info(n, c.dtype, c.shape) for n, c in large.items())]
    outputs = [helper.make_empty_tensor_value_info(value.name) for value in graph.outputs]
    nodes, stand_ins = _understood(graph)
    model = plain_model(graph, nodes, [*inputs, *stand_ins], outputs, small)
    # A graph that ONNX cannot infer may still run; its types are then taken from onnxruntime.
    with suppress(Exception):
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    known: dict[str, tuple[int, tuple[int | str | None, ...] | None]]
    known = {name: (constant.dtype, constant.shape) for name, constant in graph.constants.items()}
    known |= {value.name: type_of(value) for value in (*inputs, *model.graph.value_info, *model.graph.output)}
    known |= {value.name: type_of(value) for value in graph.outputs if value.type.HasField("tensor_type")}
    unknown = [n for node in graph.nodes for n in node.output if n and not known.get(n, (0, None))[0]]
    return known | {name: (dtype, None) for name, dtype in _ask_session(model, unknown).items()}


def _understood(graph: Graph) -> tuple[list[NodeProto], list[ValueInfoProto]]:
    """The nodes, with ONNX's operators for those of rounded weights, and the inputs that stand for their floats."""
    nodes: list[NodeProto] = []
    stand_ins = []
    for node in graph.nodes:
        shape: tuple[int, int] | None = None
        if node.domain == "com.microsoft" and node.op_type == "MatMulNBits":
            shape = attribute(node, "K"), attribute(node, "N")
            weight, place, like = f"{node.output[0]}.floats", 1, helper.make_node("MatMul", node.input[:1], node.output)
        elif node.domain == "com.microsoft" and node.op_type == "GatherBlockQuantized":
            shape = table_shape(graph, node)
            weight, place = f"{node.output[0]}.floats", 0
            like = helper.make_node("Gather", node.input[1:2], node.output, axis=attribute(node, "gather_axis", 0))
        if shape is None:
            nodes += _like_integers(node) if node.op_type == "MatMulIntegerToFloat" else [node]
            continue
        like.input.insert(place, weight)
        nodes.append(like)
        stand_ins.append(helper.make_tensor_value_info(weight, _type_of_scales(graph, node), shape))
    return nodes, stand_ins


def _like_integers(node: NodeProto) -> list[NodeProto]:
    """ONNX's operators that make a tensor of the same type and shape."""
    integers = f"{node.output[0]}.integers"
    product = helper.make_node("MatMulInteger", node.input[:2], [integers])
    return [product, helper.make_node("Cast", [integers], node.output, to=TensorProto.FLOAT)]


def table_shape(graph: Graph, node: NodeProto) -> tuple[int, int] | None:
    """Rows and columns of the floats that a GatherBlockQuantized finds in a constant matrix; None where there is none.

    Several values may share a byte.
    """
    table = graph.constants.get(node.input[0])
    if table is None or len(table.shape) != 2:
        return None
    packed = 8 // attribute(node, "bits", 4) if table.dtype == TensorProto.UINT8 else 1
    return table.shape[0], table.shape[1] * packed


def _type_of_scales(graph: Graph, node: NodeProto) -> int:
    scales = graph.constants.get(node.input[2])
    return scales.dtype if scales else TensorProto.FLOAT


def _ask_session(model: ModelProto, names: list[str]) -> dict[str, int]:
    """Element types of tensors, as onnxruntime finds them when it opens the graph; large weights are inputs there."""
    if not names:
        return {}
    kept = [value.name for value in model.graph.output]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in kept)
    try:
        session = open_session(model.SerializeToString(), "the graph")
    except (ExportError, ValueError):  # onnxruntime refuses it, or it is too large; unknown types may be floats
        return {}
    types = {value.name: elem_type_of(value.type) for value in session.get_outputs()}
    return {name: types[name] for name in names if types.get(name)}


def elem_type_of(text: str) -> int:
    """ONNX's number for onnxruntime's name of a tensor type, such as "tensor(float)"."""
    name = dtype_of(text.removeprefix("tensor(").removesuffix(")"))
    return next((number for number, known in ONNX_DTYPES.items() if known == name), 0)


def plain_model(
    graph: Graph, nodes: list[NodeProto], inputs: list[Any], outputs: list[Any], values: list[TensorProto]
) -> ModelProto:
    """The nodes as a model of their own, with the opsets of the graph that they are from."""
    proto = helper.make_graph(nodes, "constants", inputs, outputs, values)
    opsets = [helper.make_opsetid(domain, version) for domain, version in graph.opsets.items()]
    return helper.make_model(proto, opset_imports=opsets, ir_version=10)


def type_of(value: onnx.ValueInfoProto) -> tuple[int, tuple[int | str | None, ...] | None]:
    """Element type, and shape where it is known; a dimension without a name or size is None."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    sizes = (d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    return tensor.elem_type, tuple(sizes)
