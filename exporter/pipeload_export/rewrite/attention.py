"""A layer's attention over KV caches, recognised in the small operators that exporters write.

```
softmax(q @ repeat(present_k)' * scale + mask) @ repeat(present_v)
```

Where a graph is fp16, some of it may be float32, with casts between the two. Bloom computes the two products, or more,
on *flat* tensors, with batch and heads in one dimension: `[batch * heads, length, size]`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import NodeProto, TensorProto

from pipeload_export.graph.graph import Graph, attribute

__all__ = ["FLOAT_TYPES", "ForeignError", "Layer", "find_layers", "shapes_of"]

FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)
"""Element types that caches may have, and what is computed with them."""
_EXCHANGED = {False: [0, 1, 3, 2], True: [0, 2, 1]}
"""Whether a tensor is flat -> the order of its dimensions with length and size exchanged."""


@dataclass(slots=True)
class Layer:
    """One layer's attention.

    Attributes:
        keys, values: its caches, as the graph appends to them.
        views: (tensor, whether length and size are exchanged) for what is made of these caches on their way to the
            products: with heads that are repeated for the queries' heads that share them, flat, and transposed.
        queries: the tensor that is multiplied with the keys, before it is made flat.
        flat_queries: the same as a flat tensor; "" in a layer that computes with all four dimensions.
        factors: (Mul or Div, a number) by which queries or scores are changed.
        mask: (operator, its inputs, "" for the scores) for each change of the scores from the first mask on, in order;
            a Mul or Div there is one of the factors too.
        flat_masks: those inputs that are flat too.
        guarded: queries that see no key get zeros.
        product: the node that makes the result, which is flat where the queries are.
    """

    keys: str
    values: str = ""
    views: tuple[tuple[str, bool], ...] = ()
    queries: str = ""
    flat_queries: str = ""
    factors: list[tuple[str, str]] = field(default_factory=list)
    mask: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    flat_masks: set[str] = field(default_factory=set)
    guarded: bool = False
    product: NodeProto = field(default_factory=NodeProto)


@dataclass(slots=True)
class _Way:
    """From a cache towards the product that reads it.

    Attributes:
        name: the tensor that was reached.
        reader: the node that reads it.
        views: see `Layer`.
        flat: batch and heads are one dimension.
    """

    name: str
    reader: NodeProto
    views: tuple[tuple[str, bool], ...] = ()
    flat: bool = False


class ForeignError(Exception):
    """A part of the graph is not understood, so the graph stays as it is."""


def find_layers(graph: Graph, presents: Mapping[str, str]) -> list[Layer]:
    """The layers that read the caches.

    Args:
        graph: the model's.
        presents: the caches, as the graph appends to them, and the graph outputs that they are, maybe behind a cast.

    Raises:
        ForeignError: a cache is read in a way that is not understood.
    """
    reader = _Reader(graph, presents.values())
    ways = {name: reader.opened(name) for name in presents}
    values = {id(way.reader): name for name, way in ways.items() if _is_values_product(way)}
    layers = []
    for name in [name for name in presents if name not in values.values()]:
        layer = reader.layer(name, ways[name])
        if id(layer.product) not in values:
            raise ForeignError
        layer.values = values.pop(id(layer.product))
        if ways[layer.values].flat != ways[name].flat:
            raise ForeignError
        layer.views += ways[layer.values].views
        layers.append(layer)
    if values:
        raise ForeignError
    return layers


def shapes_of(consumers: Mapping[str, Sequence[NodeProto]], name: str) -> list[NodeProto]:
    """The nodes that take a tensor's shape."""
    return [node for node in consumers.get(name, []) if node.op_type == "Shape"]


def _is_values_product(way: _Way) -> bool:
    """Whether the tensor holds values, to be multiplied with probabilities; keys are transposed before."""
    return bool(way.reader.op_type == "MatMul" and way.reader.input[1] == way.name)


def _is_cast(node: NodeProto) -> bool:
    return node.op_type == "Cast" and attribute(node, "to") in FLOAT_TYPES


class _Reader:
    def __init__(self, graph: Graph, ends: Collection[str]) -> None:
        self._graph = graph
        self._ends = frozenset(ends)
        self._consumers = graph.consumers()
        self._makers = graph.producers()

    def opened(self, name: str) -> _Way:
        """The way of a cache to where its heads are repeated and flat, if they are."""
        way = self._behind_casts(self._behind_repeat(self._behind_casts(_Way(name, self._reader(name)))))
        if way.reader.op_type == "Reshape":
            name = way.reader.output[0]
            self._check_flat(way.reader.input[0], name)
            way = self._behind_casts(_Way(name, self._reader(name), (*way.views, (name, False)), flat=True))
        return way

    def _behind_repeat(self, way: _Way) -> _Way:
        if way.reader.op_type != "Unsqueeze":
            return way
        axes = self._graph.constants.get(way.reader.input[1])
        if axes is None or axes.load().tolist() not in ([2], [-3]):
            raise ForeignError
        _, expand = self._next(way.reader)
        _, reshape = self._next(expand)
        if (expand.op_type, reshape.op_type) != ("Expand", "Reshape"):
            raise ForeignError
        name = reshape.output[0]
        return _Way(name, self._reader(name), ((name, False),))

    def _check_flat(self, whole: str, flat: str) -> None:
        """Raise ForeignError if the second tensor cannot be the first one with batch and heads in one dimension."""
        before, after = (self._graph.types.get(name, (0, None))[1] or () for name in (whole, flat))
        if (len(before), len(after)) != (4, 3) or before[-1] != after[-1]:
            raise ForeignError

    def layer(self, keys: str, way: _Way) -> Layer:
        """The layer of some keys, with its values still unknown.

        Args:
            keys: the cache.
            way: of the keys.
        """
        found = Layer(keys, views=way.views)
        name, reader = way.name, way.reader
        transposed = False
        while reader.op_type != "MatMul":
            made = reader.output[0]
            if reader.op_type == "Transpose" and attribute(reader, "perm") == _EXCHANGED[way.flat] and not transposed:
                transposed = True
                found.views += ((made, True),)
                name, reader = made, self._reader(made)
                continue
            if not _is_cast(reader):
                found.factors.append(self._factor(reader, name))
            name, reader = self._next(reader)
        if reader.input[1] != name or not transposed:
            raise ForeignError
        found.queries = reader.input[0]
        if way.flat:
            found.flat_queries = found.queries
            maker = self._makers.get(found.queries)
            if maker is None or maker.op_type != "Reshape":
                raise ForeignError
            found.queries = maker.input[0]
            self._check_flat(found.queries, found.flat_queries)
        name, reader = self._next(reader)
        flat = way.flat
        while reader.op_type != "Softmax":
            if reader.op_type == "Reshape" and way.flat:
                flat = self._is_now_flat(reader)
                name, reader = self._next(reader)
                continue
            is_mask = reader.op_type == "Add" or (reader.op_type == "Where" and name in reader.input[1:])
            # Scores that become narrower may become infinite.
            is_wider = reader.op_type == "Cast" and attribute(reader, "to") == TensorProto.FLOAT
            if not is_mask and not is_wider:
                found.factors.append(self._factor(reader, name))
            if is_mask or (found.mask and not is_wider):
                operands = tuple("" if n == name else n for n in reader.input)
                found.mask.append((reader.op_type, operands))
                found.flat_masks.update(self._flat(operands) if flat else ())
            name, reader = self._next(reader)
        if attribute(reader, "axis", -1) not in (-1, 2 if flat else 3) or not found.mask:
            raise ForeignError
        end = self._behind_guard(reader.output[0], found)
        if end.reader.op_type == "Reshape" and way.flat:
            flat = self._is_now_flat(end.reader)
            end = self._behind_casts(_Way(*self._next(end.reader)))
        found.product = end.reader
        if found.product.op_type != "MatMul" or found.product.input[0] != end.name or flat != way.flat:
            raise ForeignError
        return found

    def _is_now_flat(self, reshape: NodeProto) -> bool:
        """Whether scores are flat behind a Reshape. Raises ForeignError where they are neither that nor whole."""
        rank = len(self._graph.types.get(reshape.output[0], (0, None))[1] or ())
        if rank not in (3, 4):
            raise ForeignError
        return rank == 3

    def _flat(self, operands: Iterable[str]) -> Iterator[str]:
        """Those of what flat scores are combined with that have a row for each head of each text."""
        for name in filter(None, operands):
            shape = self._graph.types.get(name, (0, None))[1]
            if shape is None or (len(shape) == 3 and isinstance(shape[0], int)) or len(shape) > 3:
                raise ForeignError
            if len(shape) == 3:
                yield name

    def _behind_guard(self, name: str, found: Layer) -> _Way:
        """The way of probabilities to where a query that sees no key gets zeros, as it does from Attention."""
        readers = self._readers(name)
        while len(readers) == 1 and _is_cast(readers[0]):
            name, readers = readers[0].output[0], self._readers(readers[0].output[0])
        guards = [node for node in readers if node.op_type == "IsNaN"]
        if guards:
            (guard,) = guards
            choice = self._reader(guard.output[0])
            if choice.op_type != "Where" or list(choice.input[::2]) != [guard.output[0], name] or len(readers) != 2:
                raise ForeignError
            zero = self._graph.constants.get(choice.input[1])
            if zero is None or np.any(zero.load()):
                raise ForeignError
            found.guarded, name = True, choice.output[0]
        return self._behind_casts(_Way(name, self._reader(name)))

    def _behind_casts(self, way: _Way) -> _Way:
        while _is_cast(way.reader):
            name, reader = self._next(way.reader)
            way = replace(way, name=name, reader=reader)
        return way

    def _readers(self, name: str) -> list[NodeProto]:
        """The nodes that read a tensor's values, but for one that hands it out."""
        readers = [node for node in self._consumers.get(name, []) if node.op_type != "Shape"]
        return [node for node in readers if node.output[0] not in self._ends]

    def _reader(self, name: str) -> NodeProto:
        """The one node that reads a tensor's values."""
        readers = self._readers(name)
        if len(readers) != 1 or (name in self._graph.output_names and name not in self._ends):
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
