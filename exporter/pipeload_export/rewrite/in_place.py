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

`Attention` always computes in float32. Caches of fp16 are cast in front of it, those of one layer at a time:
onnxruntime has no products of fp16 on most CPUs, and computes the graph's own attention in float32 too, from the scores
to the result. Its `Attention` of fp16 rounds in between, and takes the least number for minus infinity.

A layer is only rewritten when every reader of its caches is understood; otherwise the whole graph stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from pipeload.format.manifest import symbols
from pipeload_export.graph.graph import Graph, attribute, known_constant, sort_nodes
from pipeload_export.graph.normalise import drop_dead
from pipeload_export.graph.types import infer_types
from pipeload_export.rewrite.attention import FLOAT_TYPES, ForeignError, Layer, find_layers, shapes_of

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
_UNCHANGED_SINCE = {"ReduceMax": 18, "ReduceMin": 18, "Round": 11, "TopK": 11}
"""The same for operators that meant something else before the version that is given."""
_LENGTH_AXIS = 2
"""Of caches: batch, heads, length, size of a head."""
_LOWEST = np.float32(-1e30)
"""Hides as well as the least number does, which onnxruntime takes for minus infinity: a row of that alone is zero."""
_HIDES = -1000.0
"""Scores that are chosen this low or lower have no part in a softmax with others."""
_TOTAL, _PAST, _WHERE = "pipeload.total_length", "pipeload.past_length", "pipeload.write_indices"


def write_in_place(graph: Graph) -> dict[str, str]:
    """Rewrite a decoder's graph, or leave it as it is and return nothing.

    An input that is written in place is then declared with room for the new tokens, and its output has that shape.

    Returns:
        The caches that are now written in place: graph input -> graph output.
    """
    caches = list(_caches(graph))
    lengths = _lengths(graph, {cache.past for cache in caches})
    if not caches or lengths is None or not _is_newer_the_same(graph):
        return {}
    try:
        nodes = _Rewriter(graph, caches, *lengths).rewritten()
    except ForeignError:
        return {}
    graph.nodes = sort_nodes(nodes, {*graph.constants, *(value.name for value in graph.inputs)})
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    name, axis = lengths[0]
    total = values[name].type.tensor_type.shape.dim[axis]
    for cache in caches:
        # Not as the output is declared: torch writes formulas there, which are no sizes.
        values[cache.past].type.tensor_type.shape.dim[_LENGTH_AXIS].CopyFrom(total)
        values[cache.present].type.CopyFrom(values[cache.past].type)
    graph.opsets[""] = max(graph.opsets[""], _OPSET)
    drop_dead(graph)
    graph.types = infer_types(graph)
    return {cache.past: cache.present for cache in caches}


@dataclass(frozen=True, slots=True)
class _Cache:
    """A cache, and the nodes that append to it.

    Attributes:
        past: the graph input.
        present: the graph output.
        concat: the node that appends.
        casts: nodes that cast past or present where the graph computes with another float type than it takes.
    """

    past: str
    present: str
    concat: NodeProto
    casts: tuple[NodeProto, ...] = ()

    @property
    def appended(self) -> str:
        """What the graph reads; the present itself, where that is not cast."""
        return str(self.concat.output[0])


def _caches(graph: Graph) -> Iterator[_Cache]:
    inputs, outputs = {value.name for value in graph.inputs}, set(graph.output_names)
    makers, consumers = graph.producers(), graph.consumers()
    for node in graph.nodes:
        axis = attribute(node, "axis", 0)
        if node.op_type != "Concat" or len(node.input) != 2 or axis not in (_LENGTH_AXIS, _LENGTH_AXIS - 4):
            continue
        past, present = node.input[0], node.output[0]
        casts = [makers[past]] if past in makers else []
        if casts:
            casts += [one for one in consumers.get(present, []) if outputs.intersection(one.output)]
            if len(casts) != 2 or any(one.op_type != "Cast" for one in casts):
                continue
            past, present = casts[0].input[0], casts[1].output[0]
        dtype, shape = graph.types.get(past, (0, None))
        if past in inputs and present in outputs and dtype in FLOAT_TYPES and len(shape or ()) == 4:
            yield _Cache(past, present, node, tuple(casts))


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
    def __init__(self, graph: Graph, caches: Sequence[_Cache], total: tuple[str, int], text: tuple[str, int]) -> None:
        self._graph = graph
        self._caches = caches
        self._total, self._text = total, text
        self._consumers = graph.consumers()
        self._replaced: dict[int, list[NodeProto]] = {}
        self._presents = {cache.appended: cache.present for cache in caches}
        self._count = 0

    def rewritten(self) -> list[NodeProto]:
        """All nodes of the new graph. Raises ForeignError."""
        for layer in find_layers(self._graph, self._presents):
            self._replaced[id(layer.product)] = list(self._attention(layer))
            for view, exchanged in layer.views:
                # Heads are repeated before a cache is made flat, so a flat layer has views of both kinds.
                is_flat = len(self._graph.types[view][1] or ()) == 3
                like = layer.flat_queries if is_flat else layer.queries
                for node in shapes_of(self._consumers, view):
                    self._replaced[id(node)] = list(self._shape(node, _TOTAL, like=like, exchanged=exchanged))
        for cache in self._caches:
            self._replaced[id(cache.concat)] = list(self._write(cache))
            lengths = {cache.past: _PAST, cache.concat.input[0]: _PAST, cache.appended: _TOTAL, cache.present: _TOTAL}
            for name, length in lengths.items():
                for node in shapes_of(self._consumers, name):
                    self._replaced[id(node)] = list(self._shape(node, length, like=cache.past))
        nodes = [*self._counts()]
        for node in self._graph.nodes:
            nodes += self._replaced.get(id(node), [node])
        return nodes

    def _write(self, cache: _Cache) -> Iterator[NodeProto]:
        """The nodes that write new tokens into a cache. Raises ForeignError."""
        readers = [*self._consumers[cache.past], *self._consumers[cache.concat.input[0]]]
        known = {id(node) for node in (cache.concat, *cache.casts)}
        if any(id(node) not in known and node.op_type != "Shape" for node in readers):
            raise ForeignError
        new = cache.concat.input[1]
        if cache.casts:
            new = self._name("new")
            yield helper.make_node("Cast", [cache.concat.input[1]], [new], to=self._graph.types[cache.past][0])
        yield helper.make_node("TensorScatter", [cache.past, new, _WHERE], [cache.present], axis=_LENGTH_AXIS)
        if cache.casts:
            self._replaced[id(cache.casts[1])] = []
            # Only until unused nodes are dropped.
            yield helper.make_node("Cast", [cache.present], [cache.appended], to=self._graph.types[cache.appended][0])

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

    def _shape(self, node: NodeProto, length: str, *, like: str, exchanged: bool = False) -> Iterator[NodeProto]:
        """The shape that a cache, or a view of it, would have without room.

        Args:
            node: asks for it.
            length: the name of its length.
            like: a tensor with the same batch, heads and size.
            exchanged: length and size are.
        """
        parts = [self._name("shape") for _ in range(3)]
        yield helper.make_node("Shape", [like], [parts[0]], start=0, end=-2)
        yield helper.make_node("Shape", [like], [parts[1]], start=-1)
        start, end = attribute(node, "start", 0), attribute(node, "end", 4)
        whole = node.output[0] if (start, end) == (0, 4) else parts[2]
        last = [parts[1], length] if exchanged else [length, parts[1]]
        yield helper.make_node("Concat", [parts[0], *last], [whole], axis=0)
        if whole != node.output[0]:
            bounds = [self._constant(np.array([place], np.int64)) for place in (start, end)]
            yield helper.make_node("Slice", [whole, *bounds], [node.output[0]])

    def _attention(self, layer: Layer) -> Iterator[NodeProto]:
        names = {name: self._name("float") for name in self._narrow(layer)}
        for name, wide in names.items():
            yield helper.make_node("Cast", [name], [wide], to=TensorProto.FLOAT)
        for name in sorted(layer.flat_masks):
            whole = self._name("mask")
            yield from self._reshape(names.get(name, name), whole, (layer.queries, 0, 2), (name, 1, 3))
            names[name] = whole
        queries = names.get(layer.queries, layer.queries)
        for kind, number in layer.factors:
            name = self._name("queries")
            yield helper.make_node(kind, [queries, names.get(number, number)], [name])
            queries = name
        mask = ""
        for place, (kind, given) in enumerate(layer.mask):
            if kind == "Where":
                given = (given[0], *(self._chosen(name, layer.mask[place + 1 :]) for name in given[1:]))
            operands = [names.get(name, name) for name in given]
            if kind == "Add" and not mask:
                mask = "".join(operands)
                continue
            before, mask = mask or self._constant(np.array(0, np.float32)), self._name("mask")
            yield helper.make_node(kind, [name or before for name in operands], [mask])
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
        yield helper.make_node("Shape", [self._presents[layer.keys]], [size], start=_LENGTH_AXIS, end=_LENGTH_AXIS + 1)
        yield helper.make_node("Sub", [size, _TOTAL], [room])
        yield helper.make_node("Concat", [zeros, room], [pads], axis=0)
        nothing = self._constant(np.array(-np.inf, np.float32))
        yield helper.make_node("Pad", [mask, pads, nothing], [padded])
        caches = [names.get(name, name) for name in self._caches_of(layer)]
        (result,) = layer.product.output
        is_narrow = self._graph.types.get(result, (0, None))[0] == TensorProto.FLOAT16
        whole = self._name("mixed") if layer.flat_queries else result
        mixed = self._name("mixed") if is_narrow else whole
        yield helper.make_node("Attention", [queries, *caches, padded], [mixed], scale=1.0)
        if is_narrow:
            yield helper.make_node("Cast", [mixed], [whole], to=TensorProto.FLOAT16)
        if layer.flat_queries:
            yield from self._reshape(whole, result, (layer.flat_queries, 0, 2), (whole, 3, 4))

    def _reshape(self, name: str, made: str, *parts: tuple[str, int, int]) -> Iterator[NodeProto]:
        """A tensor in a shape that is put together of other tensors' dimensions: (tensor, first, end)."""
        sizes = [self._name("shape") for _ in parts]
        for size, (other, start, end) in zip(sizes, parts, strict=True):
            yield helper.make_node("Shape", [other], [size], start=start, end=end)
        shape = self._name("shape")
        yield helper.make_node("Concat", sizes, [shape], axis=0)
        yield helper.make_node("Reshape", [name, shape], [made])

    def _chosen(self, name: str, later: Sequence[tuple[str, tuple[str, ...]]]) -> str:
        """What a mask adds to scores where the graph chooses the number `name` in their place.

        The least number of float32 swallows any score. Others do not, those of fp16 among them: a row of them alone
        would not be even.

        Args:
            name: of the number; "" for the scores.
            later: what is done to the scores then.
        """
        constant = self._graph.constants.get(name)
        if constant is None:
            if name in self._graph.types and self._graph.types[name][0] == TensorProto.FLOAT16:
                raise ForeignError
            return name
        most = float(constant.load().max(initial=-np.inf))
        if most <= _LOWEST:
            return name
        if most > _HIDES or any(kind in ("Add", "Where") for kind, _ in later):
            raise ForeignError
        return self._constant(np.array(_LOWEST))

    def _caches_of(self, layer: Layer) -> tuple[str, str]:
        """A layer's keys and values as the graph hands them out."""
        return self._presents[layer.keys], self._presents[layer.values]

    def _narrow(self, layer: Layer) -> dict[str, None]:
        """The tensors of fp16 that a layer's attention is computed from."""
        read = [layer.queries, *self._caches_of(layer), *(number for _, number in layer.factors)]
        read += [name for _, names in layer.mask for name in names]
        return {name: None for name in read if self._graph.types.get(name, (0, None))[0] == TensorProto.FLOAT16}
