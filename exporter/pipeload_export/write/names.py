"""Names of tensors in a shard's graph, and in the graphs inside its nodes."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import GraphProto

from pipeload_export.graph.graph import SUBGRAPHS

__all__ = ["all_names", "rename"]


def all_names(graph: GraphProto) -> set[str]:
    """Names of all inputs, initializers and results."""
    found = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        found.update(node.output)
        for item in node.attribute:
            for inner in (item.g, *item.graphs) if item.type in SUBGRAPHS else ():
                found |= all_names(inner)
    return found


def rename(graph: GraphProto, names: Mapping[str, str], *, initializers: bool = True) -> None:
    """Give tensors other names, wherever nodes take or make them, and in the list of initializers if that is wanted."""
    for tensor in graph.initializer if initializers else ():
        tensor.name = names.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for item in node.attribute:
            for inner in (item.g, *item.graphs) if item.type in SUBGRAPHS else ():
                rename(inner, names, initializers=initializers)
