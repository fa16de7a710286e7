"""An ONNX graph that is made to be taken apart: sorted nodes, and constants whose values stay where they are.

A constant's values are read on demand, so a graph takes memory for its structure only, not for its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from pipeload.errors import ExportError
from pipeload.format.dtypes import ONNX_DTYPES

__all__ = [
    "FLOATS",
    "PACKED",
    "SUBGRAPHS",
    "Constant",
    "Graph",
    "attribute",
    "dtype_name",
    "is_pure",
    "known_constant",
    "node_inputs",
    "operators",
    "row_pieces",
    "same_values",
    "storage_dtype",
    "tensor_proto",
    "sort_nodes",
]

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
PACKED = frozenset(
    getattr(TensorProto, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
    if hasattr(TensorProto, name)
)
_COMPARED_ROWS = 1024
SUBGRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A tensor that the model carries.

    Attributes:
        dtype: ONNX's number of the element type.
        shape: its dimensions.
        load: reads the values; the array is only borrowed, and may be a view of a file. bfloat16 and the types of
            8 bits appear in NumPy's view of them (`ml_dtypes`). Those of a weight that is stored in 16 bits may be
            float32, and become its type as they are written; those of a float32 weight may be floats of 16 bits, as
            the file that they are read from has them.
    """

    dtype: int
    shape: tuple[int, ...]
    load: Callable[[], NDArray[Any]]

    def values(self) -> NDArray[Any]:
        """The values in the type that the graph computes with: float32 where `load` gives floats of 16 bits."""
        array = self.load()
        return np.asarray(array, np.float32) if self.dtype == TensorProto.FLOAT else array

    @property
    def nbytes(self) -> int:
        """Bytes that the values occupy in a file."""
        bits = 4 if self.dtype in PACKED else 8 * storage_dtype(self.dtype).itemsize
        return -(-prod(self.shape) * bits // 8)

    @property
    def is_matrix(self) -> bool:
        """At least two dimensions are larger than one."""
        return sum(size > 1 for size in self.shape) >= 2


@dataclass(slots=True, eq=False)
class Graph:
    """A model's graph.

    Attributes:
        nodes: sorted, each after the nodes that make its inputs.
        constants: initializers by name.
        inputs: those that a caller passes; initializers are not among them.
        outputs: those that a caller gets.
        opsets: domain -> version.
        forget: gives back the memory of all values that were read from the model's files.
        types: name of a tensor -> (ONNX's element type, or 0 if unknown; shape, or None if unknown); in a shape, None
            is an unknown size.
    """

    nodes: list[NodeProto]
    constants: dict[str, Constant]
    inputs: list[ValueInfoProto]
    outputs: list[ValueInfoProto]
    opsets: dict[str, int]
    forget: Callable[[], None] = lambda: None
    types: dict[str, tuple[int, tuple[int | str | None, ...] | None]] = field(default_factory=dict)

    @property
    def output_names(self) -> list[str]:
        """Names of the graph's outputs, in order."""
        return [value.name for value in self.outputs]

    def producers(self) -> dict[str, NodeProto]:
        """Tensor -> the node that makes it."""
        return {name: node for node in self.nodes for name in node.output if name}

    def consumers(self) -> dict[str, list[NodeProto]]:
        """Tensor -> the nodes that take it, each once, in order."""
        result: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node_inputs(node)):
                result.setdefault(name, []).append(node)
        return result

    def constant_sources(self) -> dict[str, frozenset[str]]:
        """Constant tensor -> names of the initializers that it is made from; an initializer is made from itself."""
        result = {name: frozenset((name,)) for name in self.constants}
        for node in self.nodes:
            names = list(node_inputs(node))
            if names and is_pure(node) and all(name in result for name in names):
                result.update(dict.fromkeys(node.output, frozenset().union(*(result[name] for name in names))))
        return result


_IMPURE = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def is_pure(node: NodeProto) -> bool:
    """Whether equal inputs always give equal outputs."""
    return node.op_type not in _IMPURE and not any(a.type in SUBGRAPHS for a in node.attribute)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def node_inputs(node: NodeProto) -> Iterator[str]:
    """Names that a node reads: its inputs, and those that its subgraphs take from the graph around them."""
    yield from filter(None, node.input)
    for item in node.attribute:
        if item.type in SUBGRAPHS:
            for graph in (item.g, *item.graphs):
                yield from _outer_names(graph)


def operators(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """The operators of nodes, and of the nodes in their subgraphs."""
    for node in nodes:
        yield node.op_type
        for item in node.attribute:
            if item.type in SUBGRAPHS:
                for graph in (item.g, *item.graphs):
                    yield from operators(graph.node)


def _outer_names(graph: GraphProto) -> Iterator[str]:
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own.update(name for node in graph.node for name in node.output)
    for node in graph.node:
        yield from (name for name in node_inputs(node) if name not in own)
    # A branch may hand out a tensor of the graph around it directly.
    yield from (value.name for value in graph.output if value.name not in own)


def dtype_name(elem_type: int) -> str:
    """The manifest's name of an element type.

    Raises:
        ExportError: tensors of this type cannot travel between shards.
    """
    if elem_type not in ONNX_DTYPES:
        name = TensorProto.DataType.Name(elem_type) if elem_type else "unknown"
        raise ExportError(f"Tensors of type {name} cannot be inputs, outputs or edges of shards.")
    return ONNX_DTYPES[elem_type]


def known_constant(array: NDArray[Any]) -> Constant:
    """A constant whose values are in memory."""
    return Constant(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, lambda: array)


def same_values(one: Constant, other: Constant) -> bool:
    """Whether two constants have the same type, shape and values, compared piece by piece."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.load is other.load:
        return True
    first, second = one.load(), other.load()
    if not one.shape:
        return bool(np.array_equal(first, second))
    pieces = range(0, one.shape[0], _COMPARED_ROWS)
    return all(np.array_equal(first[i : i + _COMPARED_ROWS], second[i : i + _COMPARED_ROWS]) for i in pieces)


def row_pieces(array: NDArray[Any], elements: int) -> Iterator[NDArray[Any]]:
    """An array in pieces of some rows, each with about `elements` of them and at least a row; a number is one row."""
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(elements * len(rows) // max(rows.size, 1), 1)
    return (rows[begin : begin + step] for begin in range(0, len(rows), step))


def tensor_proto(name: str, constant: Constant) -> TensorProto:
    """The constant as an initializer that carries its values inside."""
    proto: TensorProto = numpy_helper.from_array(np.asarray(constant.values(), order="C"), name)
    if proto.data_type != constant.dtype or tuple(proto.dims) != tuple(constant.shape):
        raise ExportError(
            f"Constant '{name}' is {proto.data_type}{tuple(proto.dims)}, expected {constant.dtype}{constant.shape}."
        )
    return proto


def storage_dtype(elem_type: int) -> np.dtype[Any]:
    """NumPy's type for the values of an element type."""
    dtype: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(elem_type)
    return dtype


def sort_nodes(nodes: list[NodeProto], available: Iterable[str]) -> list[NodeProto]:
    """The nodes, each after those that it depends on; a sorted list stays as it is.

    Raises:
        ExportError: there is a cycle, or an input that nothing makes.
    """
    known = set(available)
    producer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    result: list[NodeProto] = []
    done = [False] * len(nodes)
    for start in range(len(nodes)):
        stack = [] if done[start] else [(start, iter(list(node_inputs(nodes[start]))))]
        opened = {start}
        while stack:
            index, names = stack[-1]
            for name in names:
                if name in known:
                    continue
                if name not in producer:
                    raise ExportError(f"Node '{nodes[index].name}' takes '{name}', which nothing makes.")
                before = producer[name]
                if before in opened:
                    raise ExportError(f"The graph has a cycle through '{name}'.")
                opened.add(before)
                stack.append((before, iter(list(node_inputs(nodes[before])))))
                break
            else:
                stack.pop()
                opened.discard(index)
                done[index] = True
                known.update(filter(None, nodes[index].output))
                result.append(nodes[index])
    return result
