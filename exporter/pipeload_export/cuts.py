"""Where the blocks of a transformer begin and end, found by structure and never by names.

```
            source                  one tensor alive: a boundary
              |                            |
   embeddings v   c0      layer 0    c1    v    layer 1    c2         head
   ----------[+]--o--[norm-attention-add]--o--[norm-...-add]--o--[norm-matmul]--> main output
                  |   ^ mask, rotary tables, shapes: shared, they do not count
                  '--- segment: the nodes between two boundaries
```

The *activation* is what flows from one source to the main output: all the nodes on any path from the node where the
longest path begins (the embedding, the patch convolution) to the output at its end. Everything else that is not
constant is shared: masks, positions, shapes, but also side branches with weights of their own, such as tables of
relative positions. A *boundary* is an activation tensor that every one of those paths passes. Blocks are the longest
run of segments that repeats: same operators, same shapes of the weights, other weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper

from pipeload.errors import ExportError
from pipeload_export.graph import FLOATS, Graph, node_inputs

__all__ = ["Cuts", "find_cuts"]

_BYTES = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4})
_SHAPE_OPS = frozenset({"Shape", "Size"})
_COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum", "Mean"})
_SPREAD = 1 / 3
"""A tensor that is read directly over more than this part of the model's depth is shared."""
_NEARLY = 0.9
"""Runs that cover this part of the best run's weights are as good: the one with the most repetitions wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """The activation's way through a graph, and which part of it repeats.

    Attributes:
        output: name of the main output, where the activation ends.
        boundaries: names of the boundary tensors, in order; the last is `output`.
        segments: for each boundary, what the nodes between the boundary before and this one make, itself included.
        segment_bytes: weights that each segment uses.
        first: the segment at which the run of blocks begins.
        period: segments in one block.
        count: number of blocks; 0 for a model that was not cut.
    """

    output: str
    boundaries: tuple[str, ...]
    segments: tuple[tuple[str, ...], ...]
    segment_bytes: tuple[int, ...]
    first: int = 0
    period: int = 0
    count: int = 0

    @property
    def block_bytes(self) -> int:
        """Weights of the largest block; of everything, for a model that was not cut."""
        if not self.count:
            return sum(self.segment_bytes)
        places = range(self.first, self.first + self.period * self.count, self.period)
        return max(sum(self.segment_bytes[place : place + self.period]) for place in places)

    @property
    def coverage(self) -> int:
        """Weights in all blocks together."""
        return sum(self.segment_bytes[self.first : self.first + self.period * self.count])


def find_cuts(graph: Graph, *, whole: bool = False) -> Cuts:
    """Find the blocks of a normalised graph.

    Args:
        graph: sorted and normalised.
        whole: return cuts without blocks when nothing repeats, instead of failing.

    Raises:
        ExportError: nothing repeats, so there are no blocks to stream.
    """
    flow = _Flow(graph)
    found = [cuts for inputs in (False, True) if (cuts := _cuts_from(flow, graph, float_inputs=inputs)) is not None]
    best = max(found, key=lambda cuts: cuts.coverage, default=None)
    if best is None:
        raise ExportError(
            "No output of the graph depends on a weight matrix: there is no transformer to cut. Is it the right file?"
        )
    if best.count or whole:
        return best
    raise ExportError(
        f"The graph has no repeating blocks: {len(best.boundaries)} places were found where one activation is alive, "
        f"but the longest run of equal structure between them is 1. {_suspect(best)}"
        "Pass whole=True (--whole) to put the model into one shard."
    )


def _suspect(cuts: Cuts) -> str:
    total = sum(cuts.segment_bytes)
    largest = max(cuts.segment_bytes, default=0)
    if not total or largest < total // 2:
        return ""
    place = cuts.segment_bytes.index(largest)
    return f"The part that ends at '{cuts.boundaries[place]}' holds {largest * 100 // total} % of the weights. "


@dataclass(slots=True)
class _Flow:
    """A graph as the search sees it; everything by index of the node."""

    graph: Graph
    constant: dict[str, frozenset[str]] = field(init=False)
    inputs: list[list[str]] = field(init=False, default_factory=list)
    heavy: list[bool] = field(init=False, default_factory=list)
    blocked: list[bool] = field(init=False, default_factory=list)
    sources: list[frozenset[str]] = field(init=False, default_factory=list)
    consumers: dict[str, list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.constant = self.graph.constant_sources()
        for index, node in enumerate(self.graph.nodes):
            names = list(dict.fromkeys(node_inputs(node)))
            inputs = [name for name in names if name not in self.constant]
            self.inputs.append(inputs)
            self.sources.append(frozenset().union(*(self.constant.get(name, ()) for name in names)))
            self.heavy.append(bool(inputs) and any(self._is_weight(n) for n in names if n in self.constant))
            self.blocked.append(not inputs or node.op_type in _SHAPE_OPS)
            for name in inputs:
                self.consumers.setdefault(name, []).append(index)

    def _is_weight(self, name: str) -> bool:
        if name in self.graph.constants:
            dtype, shape = self.graph.constants[name].dtype, self.graph.constants[name].shape
            return dtype in FLOATS | _BYTES and sum(size > 1 for size in shape) >= 2
        dtype, known = self.graph.types.get(name, (0, None))
        sizes = (2, 2) if known is None else [size if isinstance(size, int) else 2 for size in known]
        return (not dtype or dtype in FLOATS) and sum(size > 1 for size in sizes) >= 2

    def bytes_of(self, nodes: Iterable[int]) -> int:
        """Bytes of the initializers that the nodes use, directly or through arithmetic on constants."""
        names = frozenset().union(*(self.sources[index] for index in nodes))
        return sum(self.graph.constants[name].nbytes for name in names)

    def is_float(self, name: str) -> bool:
        """Whether a tensor is of a float type, or of a type that could not be inferred."""
        dtype = self.graph.types.get(name, (0, None))[0]
        return not dtype or dtype in FLOATS


_Depth = tuple[int, int, int]
"""Nodes with weights on the longest path to a tensor, those with any constant, and all."""


def _cuts_from(flow: _Flow, graph: Graph, *, float_inputs: bool) -> Cuts | None:
    """The cuts for one kind of source: nodes with weights, or the graph's float inputs as well."""
    begins = (
        {v.name for v in graph.inputs if flow.is_float(v.name) and _rank(graph, v.name) >= 2} if float_inputs else ()
    )
    shared: set[str] = set()
    while True:
        depths = _depths(flow, begins, shared)
        reached = [name for name in graph.output_names if name in depths]
        if not reached:
            return None
        # Of equal depths the first output wins, as max does.
        output = max(reached, key=lambda name: depths[name])
        source = _source(flow, depths, output, shared, begins)
        active = _between(flow, source, output, shared)
        spread = _spread_tensors(flow, active, shared) - {output}
        if not spread:
            break
        shared |= spread
    boundaries, segments = _segments(flow, active, output, source)
    sizes = [flow.bytes_of(segment) for segment in segments]
    if not any(sizes):
        return None
    signatures = [
        _signature(flow, segment, begin, end)
        for segment, begin, end in zip(segments[1:], boundaries, boundaries[1:], strict=False)
    ]
    first, period, count = _longest_run(signatures, sizes[1:])
    return Cuts(
        output=output,
        boundaries=tuple(boundaries),
        segments=tuple(tuple(n for i in segment for n in graph.nodes[i].output if n) for segment in segments),
        segment_bytes=tuple(sizes),
        first=first + 1,
        period=period,
        count=count,
    )


def _rank(graph: Graph, name: str) -> int:
    shape = graph.types.get(name, (0, None))[1]
    return len(shape) if shape is not None else 0


def _depths(flow: _Flow, begins: Iterable[str], shared: set[str]) -> dict[str, _Depth]:
    depths: dict[str, _Depth] = dict.fromkeys(begins, (1, 0, 0))
    for index, node in enumerate(flow.graph.nodes):
        if flow.blocked[index]:
            continue
        before = [depths[name] for name in flow.inputs[index] if name in depths and name not in shared]
        if not before and not flow.heavy[index]:
            continue
        weights, constants, nodes = max(before, default=(0, 0, 0))
        depth = weights + flow.heavy[index], constants + bool(flow.sources[index]), nodes + 1
        depths.update(dict.fromkeys(filter(None, node.output), depth))
    return depths


def _source(flow: _Flow, depths: dict[str, _Depth], output: str, shared: set[str], begins: Iterable[str]) -> int | str:
    """The node, or the graph input, at which the longest path to the output begins."""
    maker = {name: index for index, node in enumerate(flow.graph.nodes) for name in node.output if name}
    pending, seen, ends = [output], {output}, list[int | str]()
    while pending:
        name = pending.pop()
        index = maker.get(name)
        if index is None:
            ends.append(name)
            continue
        before = [n for n in flow.inputs[index] if n in depths and n not in shared]
        deepest = max((depths[n] for n in before), default=None)
        if deepest is None:
            ends.append(index)
        for n in before:
            if depths[n] == deepest and n not in seen:
                seen.add(n)
                pending.append(n)
    nodes = sorted({end for end in ends if isinstance(end, int)})
    if not nodes:
        return next(name for name in begins if name in ends)
    # Word and position embeddings often join at once; the largest table is the text's.
    return max(nodes, key=lambda i: (flow.bytes_of([i]), flow.graph.nodes[i].op_type))


def _between(flow: _Flow, source: int | str, output: str, shared: set[str]) -> list[int]:
    """Indices of the nodes on any path from the source to the output that leads through activation only."""
    tainted: set[str] = {source} if isinstance(source, str) else set()
    touched: list[int] = []
    for index, node in enumerate(flow.graph.nodes):
        if flow.blocked[index]:
            continue
        if index == source or any(name in tainted for name in flow.inputs[index]):
            tainted.update(name for name in node.output if name and name not in shared)
            touched.append(index)
    needed, active = {output}, list[int]()
    for index in reversed(touched):
        if needed.intersection(flow.graph.nodes[index].output):
            needed.update(name for name in flow.inputs[index] if name in tainted)
            active.append(index)
    return active[::-1]


def _spread_tensors(flow: _Flow, active: Sequence[int], shared: set[str]) -> set[str]:
    """Activation tensors that are read directly all over the model: they behave like a mask, not like a state.

    A node stands where its result is needed: so many nodes with weights lie between it and the output at most.
    """
    place: dict[int, int] = {}
    for index in reversed(active):
        users = {user for name in flow.graph.nodes[index].output for user in flow.consumers.get(name, ())}
        place[index] = flow.heavy[index] + max((place[user] for user in users if user in place), default=0)
    total = max(place.values(), default=0)
    result = set()
    for index in active:
        for name in filter(None, flow.graph.nodes[index].output):
            places = sorted(place[user] for user in flow.consumers.get(name, ()) if user in place)
            # Without the last one: a state may be read again at the end, where all states are put together.
            if len(places) >= 3 and places[-1] - places[1] > total * _SPREAD and name not in shared:
                result.add(name)
    return result


def _segments(flow: _Flow, active: Sequence[int], output: str, source: int | str) -> tuple[list[str], list[list[int]]]:
    """Boundaries, and before each its segment.

    Every active node lies on a path from the source to the output. Therefore a tensor is on all of those paths
    exactly when, in any topological order, no other active tensor is alive just after it was made.
    """
    members, last_use = set(active), dict[str, int]()
    for place, index in enumerate(active):
        last_use.update(dict.fromkeys(flow.inputs[index], place))
    alive: set[str] = {source} if isinstance(source, str) else set()
    boundaries: list[str] = []
    segments: list[list[int]] = []
    current: list[int] = []
    if alive:
        boundaries, segments = [str(source)], [[]]
    for place, index in enumerate(active):
        current.append(index)
        made = [
            name
            for name in filter(None, flow.graph.nodes[index].output)
            if name == output or any(user in members for user in flow.consumers.get(name, ()))
        ]
        alive = {name for name in alive if last_use[name] > place} | set(made)
        if len(alive) == 1 and len(made) == 1 and flow.is_float(made[0]):
            boundaries.append(made[0])
            segments.append(current)
            current = []
    if not boundaries or boundaries[-1] != output:
        boundaries.append(output)
        segments.append(current)
    return boundaries, segments


def _signature(flow: _Flow, segment: Sequence[int], begin: str, end: str) -> bytes:
    """Equal for segments that do the same with weights of the same shapes, whatever they are called."""
    graph = flow.graph
    digests: dict[str, bytes] = {begin: b"begin"}

    def digest_of(name: str) -> bytes:
        if name in digests:
            return digests[name]
        if name in graph.constants:
            # Not the values: neighbouring layers may differ in a mask or a scale.
            return repr(("constant", graph.constants[name].dtype, graph.constants[name].shape)).encode()
        dtype, shape = graph.types.get(name, (0, None))
        if name in flow.constant:
            return repr(("computed constant", dtype, shape)).encode()
        if dtype in FLOATS and any(value.name == name for value in graph.inputs):
            sizes = [size if isinstance(size, int) else None for size in shape or ()]
            return repr(("input", dtype, sizes)).encode()
        return b"shared"

    for index in segment:
        node = graph.nodes[index]
        inputs = [digest_of(name) if name else b"none" for name in node.input]
        if node.op_type in _COMMUTATIVE:
            inputs.sort()
        parts = [node.domain.encode(), node.op_type.encode(), *_attributes(node, graph.opsets), *inputs]
        base = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()
        digests.update((name, base + bytes([place])) for place, name in enumerate(node.output) if name)
    return digests[end] + flow.bytes_of(segment).to_bytes(8, "little")


def _attributes(node: NodeProto, opsets: dict[str, int]) -> list[bytes]:
    """A node's attributes without those that have the operator's default value, which exporters may write or not."""
    defaults: dict[str, AttributeProto] = {}
    if onnx.defs.has(node.op_type, node.domain):
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
        defaults = {name: item.default_value for name, item in schema.attributes.items()}
    return sorted(
        _attribute_bytes(item)
        for item in node.attribute
        if item.name not in defaults or not _same_value(item, defaults[item.name])
    )


def _same_value(one: AttributeProto, two: AttributeProto) -> bool:
    return one.type == two.type and bool(helper.get_attribute_value(one) == helper.get_attribute_value(two))


def _attribute_bytes(item: AttributeProto) -> bytes:
    if item.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        # Names inside subgraphs differ from layer to layer.
        nodes: list[NodeProto] = [node for graph in (item.g, *item.graphs) for node in graph.node]
        return f"{item.name}:{[node.op_type for node in nodes]}".encode()
    return bytes(item.SerializeToString(deterministic=True))


def _longest_run(signatures: Sequence[bytes], sizes: Sequence[int]) -> tuple[int, int, int]:
    """(first segment, period, count) of the repetition that covers the most weights with the smallest blocks."""
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    runs: list[tuple[int, int, int, int]] = []
    for period in range(1, len(signatures) // 2 + 1):
        begin = 0
        for place in range(len(signatures) - period + 1):
            if place < len(signatures) - period and signatures[place] == signatures[place + period]:
                continue
            length, count = place - begin, (place - begin) // period + 1
            if count >= 2:
                for first in range(begin, begin + length % period + 1):
                    coverage = total[first + period * count] - total[first]
                    runs.append((coverage, count, first, period))
            begin = place + 1
    best = max((run[0] for run in runs), default=0)
    if not best:
        return 0, 0, 0
    _, count, first, period = max(
        (run for run in runs if run[0] >= best * _NEARLY), key=lambda run: (run[1], run[0], run[2], -run[3])
    )
    return first, period, count
