"""KV caches that are copied to grow -> caches with room to grow, which are written in place.

```
before    present = Concat(past, new)             a copy of the whole cache for every token
          softmax(q @ repeat(present_k)' * scale + mask) @ repeat(present_v)
after     present = TensorScatter(past, new)      the new tokens only, when past and present are the same memory
          Attention(q * scale, present_k, present_v, mask)
```

After the rewriting, `past` and `present` have the same shape, with any room behind the tokens. The number of tokens
follows from the inputs: a mask is as long as cache and text together. Both operators are ONNX's own, since
version 24.

A layer is only rewritten when every reader of its caches is understood; otherwise the whole graph stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from pipeload.format.manifest import symbols
from pipeload_export.graph.graph import Graph, attribute, known_constant, sort_nodes
from pipeload_export.graph.normalise import drop_dead
from pipeload_export.graph.types import infer_types
from pipeload_export.rewrite.attention import ForeignError, Layer, find_layers, shapes_of

__all__ = ["write_in_place"]

_OPSET = 24
"""The first version of ONNX with TensorScatter and with Attention over a cache."""
_UNCHANGED = frozenset(
    {
        *("Cast", "CastLike", "Constant", "ConstantOfShape", "Equal", "Flatten", "Identity", "If", "Loop", "Pad"),
        *("QuantizeLinear", "DequantizeLinear", "QLinearMatMul", "Reshape", "Scan", "Shape", "Size", "Squeeze"),
        *("Transpose", "Unsqueeze", "IsNaN", "IsInf", "Cos", "Sin", "Elu", "HardSigmoid", "HardSwish", "Mish", "Round"),
        *("Softplus", "Softsign"),
    }
)
"""Operators that later versions of ONNX took over as they were, for more element types."""
_UNCHANGED_SINCE = {"ReduceMax": 18, "ReduceMin": 18, "TopK": 11}
"""The same for operators that meant something else before the version that is given."""
_LENGTH_AXIS = 2
"""Of caches: batch, heads, length, size of a head."""
_LOWEST = np.float32(-1e30)
"""Hides as well as the least number does, which onnxruntime takes for minus infinity: a row of that alone is zero."""
_TOTAL, _PAST, _WHERE = "pipeload.total_length", "pipeload.past_length", "pipeload.write_indices"


def write_in_place(graph: Graph) -> dict[str, str]:
    """Rewrite a decoder's graph, or leave it as it is and return nothing.

    An input that is written in place is then declared with room for the new tokens, and its output has that shape.

    Returns:
        The caches that are now written in place: graph input -> graph output.
    """
    concats = dict(_concats(graph))
    lengths = _lengths(graph, set(concats))
    if not concats or lengths is None or not _is_newer_the_same(graph):
        return {}
    try:
        layers = _Rewriter(graph, concats, *lengths)
        nodes = layers.rewritten()
    except ForeignError:
        return {}
    graph.nodes = sort_nodes(nodes, {*graph.constants, *(value.name for value in graph.inputs)})
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    name, axis = lengths[0]
    total = values[name].type.tensor_type.shape.dim[axis]
    for name, node in concats.items():
        # Not as the output is declared: torch writes formulas there, which are no sizes.
        values[name].type.tensor_type.shape.dim[_LENGTH_AXIS].CopyFrom(total)
        values[node.output[0]].type.CopyFrom(values[name].type)
    graph.opsets[""] = max(graph.opsets[""], _OPSET)
    drop_dead(graph)
    graph.types = infer_types(graph)
    return {name: node.output[0] for name, node in concats.items()}


def _concats(graph: Graph) -> Iterator[tuple[str, NodeProto]]:
    """Caches, and the nodes that append to them."""
    inputs, outputs = {value.name for value in graph.inputs}, set(graph.output_names)
    for node in graph.nodes:
        axis = attribute(node, "axis", 0)
        if node.op_type == "Concat" and len(node.input) == 2 and axis in (_LENGTH_AXIS, _LENGTH_AXIS - 4):
            dtype, shape = graph.types.get(node.input[0], (0, None))
            is_cache = dtype == TensorProto.FLOAT and len(shape or ()) == 4
            if node.input[0] in inputs and node.output[0] in outputs and is_cache:
                yield node.input[0], node


def _lengths(graph: Graph, caches: set[str]) -> tuple[tuple[str, int], tuple[str, int]] | None:
    """(input, axis) as long as cache and text together, and (input, axis) as long as the text."""
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.inputs}
    pasts = {shapes[name][_LENGTH_AXIS] for name in caches}
    others = {name: shape for name, shape in shapes.items() if name not in caches}
    if len(pasts) != 1:
        return None
    (past,) = pasts
    texts = {dim: (name, axis) for name, shape in others.items() for axis, dim in enumerate(shape)}
    for name, shape in others.items():
        for axis, dim in enumerate(shape):
            parts = symbols(dim)
            if len(parts) == 2 and past in parts:
                text = next(part for part in parts if part != past)
                if text in texts and texts[text][0] in others:
                    return (name, axis), texts[text]
    return None


def _is_newer_the_same(graph: Graph) -> bool:
    """Whether the graph means the same under the newer version of ONNX."""
    before = graph.opsets.get("", 0)
    for kind in {node.op_type for node in graph.nodes if node.domain in ("", "ai.onnx")} - _UNCHANGED:
        try:
            old = onnx.defs.get_schema(kind, before, "").since_version
            new = onnx.defs.get_schema(kind, max(before, _OPSET), "").since_version
        except onnx.defs.SchemaError:
            return False
        if old != new and old < _UNCHANGED_SINCE.get(kind, new):
            return False
    return True


class _Rewriter:
    def __init__(
        self, graph: Graph, concats: Mapping[str, NodeProto], total: tuple[str, int], text: tuple[str, int]
    ) -> None:
        self._graph = graph
        self._concats = concats
        self._total, self._text = total, text
        self._consumers = graph.consumers()
        self._replaced: dict[int, list[NodeProto]] = {}
        self._grown = {node.output[0] for node in concats.values()}
        self._count = 0

    def rewritten(self) -> list[NodeProto]:
        """All nodes of the new graph, sorted. Raises ForeignError."""
        for layer in find_layers(self._graph, [node.output[0] for node in self._concats.values()]):
            self._replaced[id(layer.product)] = list(self._attention(layer))
            for repeated in set(layer.repeated) - self._grown:
                for node in shapes_of(self._consumers, repeated):
                    self._replaced[id(node)] = list(self._shape(node, _TOTAL, heads_of=layer.queries))
        for past, node in self._concats.items():
            scatter = helper.make_node(
                "TensorScatter", [past, node.input[1], _WHERE], [node.output[0]], axis=_LENGTH_AXIS
            )
            self._replaced[id(node)] = [scatter]
        for name, length in [*((past, _PAST) for past in self._concats), *((grown, _TOTAL) for grown in self._grown)]:
            for node in shapes_of(self._consumers, name):
                self._replaced[id(node)] = list(self._shape(node, length, heads_of=name))
        nodes = [*self._counts()]
        for node in self._graph.nodes:
            nodes += self._replaced.get(id(node), [node])
        return nodes

    def _name(self, what: str) -> str:
        self._count += 1
        return f"pipeload.{what}.{self._count}"

    def _constant(self, value: np.ndarray) -> str:
        name = self._name("constant")
        self._graph.constants[name] = known_constant(value)
        return name

    def _counts(self) -> Iterator[NodeProto]:
        """Lengths of cache and text together, and of the cache, and where the text goes."""
        (total, axis), (text, text_axis) = self._total, self._text
        yield helper.make_node("Shape", [total], [_TOTAL], start=axis, end=axis + 1)
        yield helper.make_node("Shape", [text], ["pipeload.text_length"], start=text_axis, end=text_axis + 1)
        yield helper.make_node("Sub", [_TOTAL, "pipeload.text_length"], [_PAST])
        yield helper.make_node("Shape", [text], ["pipeload.batch"], start=0, end=1)
        yield helper.make_node("Expand", [_PAST, "pipeload.batch"], [_WHERE])

    def _shape(self, node: NodeProto, length: str, *, heads_of: str) -> Iterator[NodeProto]:
        """The shape that a cache would have without room, with the batch, heads and size of another tensor."""
        parts = [self._name("shape") for _ in range(3)]
        yield helper.make_node("Shape", [heads_of], [parts[0]], start=0, end=_LENGTH_AXIS)
        yield helper.make_node("Shape", [heads_of], [parts[1]], start=_LENGTH_AXIS + 1)
        start, end = attribute(node, "start", 0), attribute(node, "end", 4)
        whole = node.output[0] if (start, end) == (0, 4) else parts[2]
        yield helper.make_node("Concat", [parts[0], length, parts[1]], [whole], axis=0)
        if whole != node.output[0]:
            bounds = [self._constant(np.array([place], np.int64)) for place in (start, end)]
            yield helper.make_node("Slice", [whole, *bounds], [node.output[0]])

    def _attention(self, layer: Layer) -> Iterator[NodeProto]:
        queries = layer.queries
        for kind, number in layer.factors:
            name = self._name("queries")
            yield helper.make_node(kind, [queries, number], [name])
            queries = name
        mask = ""
        for kind, names in layer.mask:
            if kind == "Add" and not mask:
                mask = "".join(names)
                continue
            before, mask = mask or self._constant(np.array(0, np.float32)), self._name("mask")
            yield helper.make_node(kind, [name or before for name in names], [mask])
        if not layer.guarded:
            # The least numbers hide nothing in rows that have nothing else.
            infinite, raised, name = self._name("infinite"), self._name("mask"), self._name("mask")
            yield helper.make_node("IsInf", [mask], [infinite])
            yield helper.make_node("Max", [mask, self._constant(np.array(_LOWEST))], [raised])
            yield helper.make_node("Where", [infinite, mask, raised], [name])
            mask = name
        # A mask has a row for every query here, even where all rows are the same.
        rows, every, name = self._name("rows"), self._name("shape"), self._name("mask")
        one, two = (self._constant(np.ones(count, np.int64)) for count in (1, 2))
        yield helper.make_node("Shape", [queries], [rows], start=_LENGTH_AXIS, end=_LENGTH_AXIS + 1)
        yield helper.make_node("Concat", [two, rows, one], [every], axis=0)
        yield helper.make_node("Expand", [mask, every], [name])
        mask = name
        # The mask is as long as cache and text; there may be more room than that.
        room, pads, padded = self._name("room"), self._name("pads"), self._name("mask")
        size, zeros = self._name("size"), self._constant(np.zeros(7, np.int64))
        yield helper.make_node("Shape", [layer.keys], [size], start=_LENGTH_AXIS, end=_LENGTH_AXIS + 1)
        yield helper.make_node("Sub", [size, _TOTAL], [room])
        yield helper.make_node("Concat", [zeros, room], [pads], axis=0)
        nothing = self._constant(np.array(-np.inf, np.float32))
        yield helper.make_node("Pad", [mask, pads, nothing], [padded])
        yield helper.make_node(
            "Attention", [queries, layer.keys, layer.values, padded], list(layer.product.output), scale=1.0
        )
