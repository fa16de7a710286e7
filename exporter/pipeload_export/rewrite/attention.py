"""A layer's attention over KV caches, recognised in the small operators that exporters write.

```
softmax(q @ repeat(present_k)' * scale + mask) @ repeat(present_v)
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto

from pipeload_export.graph.graph import Graph, attribute

__all__ = ["ForeignError", "Layer", "find_layers", "shapes_of"]


@dataclass(slots=True)
class Layer:
    """One layer's attention.

    Attributes:
        keys, values: its caches, as the graph makes them.
        repeated: the tensors with the heads of these caches, each repeated for the queries' heads that share it.
        queries: the tensor that is multiplied with the keys.
        factors: (Mul or Div, a number) by which queries or scores are changed.
        mask: (operator, its inputs, "" for the scores) for each change of the scores from the first mask on, in order;
            a Mul or Div there is one of the factors too.
        guarded: queries that see no key get zeros.
        product: the node that makes the result.
    """

    keys: str
    values: str = ""
    repeated: tuple[str, ...] = ()
    queries: str = ""
    factors: list[tuple[str, str]] = field(default_factory=list)
    mask: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    guarded: bool = False
    product: NodeProto = field(default_factory=NodeProto)


class ForeignError(Exception):
    """A part of the graph is not understood, so the graph stays as it is."""


def find_layers(graph: Graph, presents: Sequence[str]) -> list[Layer]:
    """The layers that read the caches.

    Args:
        graph: the model's.
        presents: the caches, as the graph makes them.

    Raises:
        ForeignError: a cache is read in a way that is not understood.
    """
    reader = _Reader(graph, presents)
    ends = {name: reader.behind_repeat(name) for name in presents}
    values = {id(node): name for name, (repeated, node) in ends.items() if _is_values_product(repeated, node)}
    layers = []
    for name in [name for name in presents if name not in values.values()]:
        layer = reader.layer(name, *ends[name])
        if id(layer.product) not in values:
            raise ForeignError
        layer.values = values.pop(id(layer.product))
        layer.repeated = (ends[name][0], ends[layer.values][0])
        layers.append(layer)
    if values:
        raise ForeignError
    return layers


def shapes_of(consumers: Mapping[str, Sequence[NodeProto]], name: str) -> list[NodeProto]:
    """The nodes that take a tensor's shape."""
    return [node for node in consumers.get(name, []) if node.op_type == "Shape"]


def _is_values_product(name: str, reader: NodeProto) -> bool:
    """Whether the tensor holds values, to be multiplied with probabilities; keys are transposed before."""
    return bool(reader.op_type == "MatMul" and reader.input[1] == name)


class _Reader:
    def __init__(self, graph: Graph, presents: Sequence[str]) -> None:
        self._graph = graph
        self._presents = frozenset(presents)
        self._consumers = graph.consumers()

    def behind_repeat(self, name: str) -> tuple[str, NodeProto]:
        """The heads of a cache, each repeated for the queries' heads that share it, and the node that reads them."""
        reader = self._reader(name)
        if reader.op_type != "Unsqueeze":
            return name, reader
        axes = self._graph.constants.get(reader.input[1])
        if axes is None or axes.load().tolist() not in ([2], [-3]):
            raise ForeignError
        _, expand = self._next(reader)
        _, reshape = self._next(expand)
        if (expand.op_type, reshape.op_type) != ("Expand", "Reshape"):
            raise ForeignError
        return reshape.output[0], self._reader(reshape.output[0])

    def layer(self, keys: str, name: str, reader: NodeProto) -> Layer:
        """The layer of some keys, with its values still unknown.

        Args:
            keys: the cache.
            name: the same with its heads repeated.
            reader: the node that reads that.
        """
        found = Layer(keys)
        transposed = False
        while reader.op_type != "MatMul":
            if reader.op_type == "Transpose" and attribute(reader, "perm") == [0, 1, 3, 2] and not transposed:
                transposed = True
            else:
                found.factors.append(self._factor(reader, name))
            name, reader = self._next(reader)
        if reader.input[1] != name or not transposed:
            raise ForeignError
        found.queries = reader.input[0]
        name, reader = self._next(reader)
        while reader.op_type != "Softmax":
            is_mask = reader.op_type == "Add" or (reader.op_type == "Where" and name in reader.input[1:])
            if not is_mask:
                found.factors.append(self._factor(reader, name))
            if is_mask or found.mask:
                found.mask.append((reader.op_type, tuple("" if n == name else n for n in reader.input)))
            name, reader = self._next(reader)
        if attribute(reader, "axis", -1) not in (-1, 3) or not found.mask:
            raise ForeignError
        name = reader.output[0]
        readers = [node for node in self._consumers.get(name, []) if node.op_type != "Shape"]
        guards = [node for node in readers if node.op_type == "IsNaN"]
        if guards:
            # A query that sees no key gets zeros, as it does from Attention.
            (guard,) = guards
            choice = self._reader(guard.output[0])
            if choice.op_type != "Where" or list(choice.input[::2]) != [guard.output[0], name] or len(readers) != 2:
                raise ForeignError
            zero = self._graph.constants.get(choice.input[1])
            if zero is None or np.any(zero.load()):
                raise ForeignError
            found.guarded, name = True, choice.output[0]
        found.product = self._reader(name)
        if found.product.op_type != "MatMul" or found.product.input[0] != name:
            raise ForeignError
        return found

    def _reader(self, name: str) -> NodeProto:
        """The one node that reads a tensor's values."""
        readers = [node for node in self._consumers.get(name, []) if node.op_type != "Shape"]
        if len(readers) != 1 or (name in self._graph.output_names and name not in self._presents):
            raise ForeignError
        return readers[0]

    def _next(self, node: NodeProto) -> tuple[str, NodeProto]:
        """A node's result, and the one node that reads it. Raises ForeignError if a node asks for its shape."""
        if shapes_of(self._consumers, node.output[0]):
            raise ForeignError
        return node.output[0], self._reader(node.output[0])

    def _factor(self, node: NodeProto, name: str) -> tuple[str, str]:
        """(Mul or Div, a number) by which a node changes the tensor `name`."""
        if node.op_type == "Mul":
            (number,) = (n for n in node.input if n != name) if set(node.input) != {name} else ("",)
        elif node.op_type == "Div" and node.input[0] == name:
            number = node.input[1]
        else:
            raise ForeignError
        if self._graph.types.get(number, (0, None))[1] not in ((), (1,)):
            raise ForeignError
        return node.op_type, number
