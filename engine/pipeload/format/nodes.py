"""The nodes of a graph, each behind those that make its inputs, and the tensors that lie in the graph. Pure.

Source: onnx.proto (https://github.com/onnx/onnx).
"""

from __future__ import annotations

import graphlib
from dataclasses import dataclass, field

from pipeload.format.inline import Inline, read_inline
from pipeload.format.protobuf import fields, packed, signed, text

__all__ = ["Attribute", "Graph", "Node", "graphs_of", "inner_graph"]


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute of a node; the parts that it does not have are empty."""

    whole: int = 0
    real: bytes = b""
    tensor: memoryview | None = None
    sparse: tuple[memoryview, ...] = ()
    graphs: tuple[memoryview, ...] = ()
    wholes: tuple[int, ...] = ()
    reals: bytes = b""


@dataclass(frozen=True, slots=True)
class Node:
    """One node. An input that is left out is the empty text."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute]


@dataclass(slots=True)
class Graph:
    """A graph, or the body of a function.

    Attributes:
        nodes: in an order in which they may run.
        inline: name -> a tensor that lies in the graph, or elsewhere.
        sparse: tensors of which only some values are told.
        inputs: their names.
    """

    nodes: list[Node] = field(default_factory=list)
    inline: dict[str, Inline] = field(default_factory=dict)
    sparse: list[memoryview] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)


def graphs_of(model: memoryview) -> list[Graph]:
    """The graph of a model, and the bodies of its functions.

    Raises:
        ValueError, IndexError: it is damaged, or its nodes wait for each other.
    """
    outermost, functions = Graph(), []
    for number, value in fields(model):
        if number == 7 and not isinstance(value, int):
            _read(value, outermost)
        elif number == 25 and not isinstance(value, int):
            functions.append(function := Graph())
            function.nodes += [_node(part) for key, part in fields(value) if key == 7 and not isinstance(part, int)]
    for graph in (outermost, *functions):
        _sort(graph)
    return [outermost, *functions]


def inner_graph(data: memoryview) -> Graph:
    """The graph in an attribute; errors as `graphs_of`."""
    graph = Graph()
    _read(data, graph)
    _sort(graph)
    return graph


def _read(data: memoryview, graph: Graph) -> None:
    for number, value in fields(data):
        if isinstance(value, int):
            continue
        if number == 1:
            graph.nodes.append(_node(value))
        elif number == 5:
            name, tensor = read_inline(value)
            graph.inline[name] = tensor
        elif number == 11:
            graph.inputs += [text(part) for key, part in fields(value) if key == 1]
        elif number == 15:
            graph.sparse.append(value)


def _node(data: memoryview) -> Node:
    inputs, outputs, kind, attributes = [], [], "", {}
    for number, value in fields(data):
        if number == 1:
            inputs.append(text(value))
        elif number == 2:
            outputs.append(text(value))
        elif number == 4:
            kind = text(value)
        elif number == 5 and not isinstance(value, int):
            name, attribute = _attribute(value)
            attributes[name] = attribute
    return Node(kind, tuple(inputs), tuple(outputs), attributes)


def _attribute(data: memoryview) -> tuple[str, Attribute]:
    name, whole, real, tensor = "", 0, b"", None
    graphs, sparse, wholes, reals = list[memoryview](), list[memoryview](), list[int](), list[memoryview]()
    for number, value in fields(data):
        if number == 1:
            name = text(value)
        elif number == 3 and isinstance(value, int):
            whole = signed(value)
        elif number == 8:
            wholes += [signed(value)] if isinstance(value, int) else map(signed, packed(value))
        elif isinstance(value, int):
            continue
        elif number == 2:
            real = bytes(value)
        elif number == 5:
            tensor = value
        elif number in (6, 11):
            graphs.append(value)
        elif number == 7:
            reals.append(value)
        elif number in (22, 23):
            sparse.append(value)
    return name, Attribute(whole, real, tensor, tuple(sparse), tuple(graphs), tuple(wholes), b"".join(reals))


def _sort(graph: Graph) -> None:
    makers = {name: place for place, node in enumerate(graph.nodes) for name in node.outputs if name}
    needed = {place: {makers[name] for name in node.inputs if name in makers} for place, node in enumerate(graph.nodes)}
    if all(before < place for place, several in needed.items() for before in several):
        return  # as nearly all files have it; bodies of branches may take names of nodes before theirs
    try:
        graph.nodes = [graph.nodes[place] for place in graphlib.TopologicalSorter(needed).static_order()]
    except graphlib.CycleError as error:
        raise ValueError("its nodes wait for each other") from error
