"""Weights that several shards have in common (ALBERT's layers) are stored once: later shards take the first one's."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import GraphProto

from pipeload_export.graph.graph import SUBGRAPHS, Constant, node_inputs
from pipeload_export.shard.fuse import Fused
from pipeload_export.write.weights import WeightsFile

__all__ = ["SharedWeights", "by_use"]


def by_use(fused: Fused) -> dict[str, Constant]:
    """The graph's external constants in the order in which its nodes take them, which is that of its structure."""
    taken = dict.fromkeys(name for node in fused.model.graph.node for name in node_inputs(node))
    order = [name for name in taken if name in fused.external]
    return {name: fused.external[name] for name in dict.fromkeys([*order, *fused.external])}


class SharedWeights:
    """The weights files of one model's shards."""

    def __init__(self) -> None:
        self._stored: dict[object, WeightsFile] = {}

    def share(self, written: WeightsFile, fused: Fused) -> WeightsFile | None:
        """An earlier file with the same tensors in the same places, whose names the graph takes over; None if none has.

        Args:
            written: the shard's own file.
            fused: the shard's graph.
        """
        begin = written.range.offset
        places = tuple((spec.dtype, spec.shape, spec.offset - begin) for spec in written.tensors)
        stored = self._stored.setdefault((written.range.sha256, places), written)
        if stored is written:
            return None
        names = {own.name: known.name for own, known in zip(written.tensors, stored.tensors, strict=True)}
        graph = fused.model.graph
        if _all_names(graph).difference(names).intersection(names.values()):
            return None
        _rename(graph, names)
        constants = {names[name]: constant for name, constant in fused.external.items()}
        fused.external.clear()
        fused.external.update(constants)
        return stored


def _all_names(graph: GraphProto) -> set[str]:
    found = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        found.update(node.output)
        for item in node.attribute:
            for inner in (item.g, *item.graphs) if item.type in SUBGRAPHS else ():
                found |= _all_names(inner)
    return found


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for item in node.attribute:
            for inner in (item.g, *item.graphs) if item.type in SUBGRAPHS else ():
                _rename(inner, names)
