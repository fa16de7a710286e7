"""How the activation flows through a graph: its source, the nodes on its way, and the tensors beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from onnx import TensorProto

from pipeload_export.graph.graph import FLOATS, Graph, node_inputs

__all__ = ["Depth", "Flow", "depths_of", "nodes_between", "source_of", "spread_tensors"]

_BYTES = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4})
_SHAPE_OPS = frozenset({"Shape", "Size"})
_SPREAD = 1 / 3
"""A tensor that is read directly over more than this part of the model's depth is shared."""

Depth = tuple[int, int, int]
"""Nodes with weights on the longest path to a tensor, those with any constant, and all."""


@dataclass(slots=True)
class Flow:
    """A graph as the search sees it.

    Args:
        graph: sorted and normalised.

    Attributes:
        constant: constant tensor -> the initializers that it is made from.
        inputs: of each node, the inputs that are not constant.
        heavy: of each node, whether it takes a weight matrix and something that is not constant.
        blocked: of each node, whether no activation goes through it: it makes a shape, or a constant.
        sources: of each node, the initializers that it uses.
        consumers: tensor that is not constant -> the nodes that take it.
    """

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

    def is_state(self, name: str) -> bool:
        """Whether a tensor may be the activation: of floats, or quantised to bytes."""
        return self.is_float(name) or self.graph.types[name][0] in _BYTES

    def is_float(self, name: str) -> bool:
        """Whether a tensor is of a float type, or of a type that could not be inferred."""
        dtype = self.graph.types.get(name, (0, None))[0]
        return not dtype or dtype in FLOATS


def depths_of(flow: Flow, begins: Iterable[str], shared: set[str]) -> dict[str, Depth]:
    """How deep each tensor lies behind the sources: nodes with weights, and the tensors in `begins`."""
    depths: dict[str, Depth] = dict.fromkeys(begins, (1, 0, 0))
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


def source_of(flow: Flow, depths: dict[str, Depth], output: str, shared: set[str], begins: Iterable[str]) -> int | str:
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


def nodes_between(flow: Flow, source: int | str, output: str, shared: set[str]) -> list[int]:
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


def spread_tensors(flow: Flow, active: Sequence[int], shared: set[str]) -> set[str]:
    """Activation tensors that nodes all over the model read directly: they behave like a mask, not like a state.

    A node's place is where its result is needed: the most nodes with weights that lie between it and the output.
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
            # Of a state without the last one: it may be read again at the end, where all states are put together.
            first = 1 if flow.is_float(name) else 0
            if len(places) >= 3 and places[-1] - places[first] > total * _SPREAD and name not in shared:
                result.add(name)
    return result
