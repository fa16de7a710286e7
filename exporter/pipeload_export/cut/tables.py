"""Embedding tables leave the graph: the engine reads the rows that it needs, instead of loading the table.

```
Gather(table, ids)                       -> rows of the table, fetched by the engine
Gather(Mul(Cast(quantised), scale), ids) -> Mul(Cast(rows of quantised), rows of scale)
GatherBlockQuantized(bytes, ids, scales) -> GatherBlockQuantized(rows of bytes, 0 1 2 ..., rows of scales)
```
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, helper

from pipeload.format.dtypes import ONNX_DTYPES
from pipeload_export.graph.graph import Constant, Graph, attribute, known_constant, node_inputs
from pipeload_export.graph.types import table_shape

__all__ = ["Lift", "lift_again", "lift_tables"]

_LEAST_BYTES, _LEAST_ROUNDED_BYTES = 64 << 10, 8 << 10
"""Of a table that is worth looking up by row. A rounded one may have an eighth of the bytes of its floats."""
_LEAST_SHARE = 1 / 4
"""A table whose indices the graph computes needs one shard more in every pass: below this part of a block, the table
is cheaper to load."""
_BLOCKS = "GatherBlockQuantized"
_ROW_WISE = frozenset({"Cast", "Identity", "Mul", "Sub", "Add", "Div"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Lift:
    """A table that was taken out of the graph: `output` is `Gather(table, indices)`."""

    table: str
    indices: str
    output: str


def lift_tables(graph: Graph, *, block_bytes: int, activation: Collection[str]) -> list[Lift]:
    """Take large tables out of a normalised graph, which changes if any are returned; they stay among its constants.

    Args:
        graph: normalised.
        block_bytes: weights of one block.
        activation: names of the tensors on the way to the main output; indices that depend on one stay.
    """
    constant = graph.constant_sources()
    producers = graph.producers()
    given = {value.name for value in graph.inputs}
    candidates = [node for node in graph.nodes if _nbytes(graph, node, constant) >= _least_bytes(node)]
    stops = set(activation) | {node.output[0] for node in candidates}
    shapes: dict[str, NodeProto] = {}

    def may_go(node: NodeProto) -> bool:
        indices = node.input[1]
        return indices in given or not (
            _nbytes(graph, node, constant) < block_bytes * _LEAST_SHARE
            or _depends_on(producers, indices, stops, shapes)
        )

    return _lifted(graph, candidates, may_go, shapes)


def lift_again(graph: Graph) -> list[Lift]:
    """Take the tables out of a graph that has lookups of tables alone, all of which were lifted before."""
    return _lifted(graph, [node for node in graph.nodes if node.op_type in ("Gather", _BLOCKS)], lambda _: True, {})


def _lifted(
    graph: Graph, candidates: Iterable[NodeProto], may_go: Callable[[NodeProto], bool], shapes: dict[str, NodeProto]
) -> list[Lift]:
    """Lift the tables of those nodes that may go, one after another, and put those that did into `shapes`."""
    constant, producers = graph.constant_sources(), graph.producers()
    lifts: list[Lift] = []
    replaced: dict[str, list[NodeProto]] = {}
    for node in candidates:
        if not may_go(node):
            continue
        output = node.output[0]
        rows = _Rows(graph, producers, constant, node)
        if _take_blocks(graph, node, rows) if node.op_type == _BLOCKS else rows.take():
            lifts += rows.lifts
            replaced[output] = rows.nodes
            shapes[output] = node
    for lift in lifts:
        shape = graph.types.get(lift.indices, (0, None))[1]
        constant_table = graph.constants[lift.table]
        known = None if shape is None else (*shape, *constant_table.shape[1:])
        graph.types[lift.output] = (constant_table.dtype, known)
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if node.output[0] in replaced:
            nodes += replaced[node.output[0]]
        elif node.op_type == "Shape" and node.input[0] in shapes and not node.attribute:
            nodes += _shape_of_rows(graph, shapes[node.input[0]], node)
        else:
            nodes.append(node)
    graph.nodes = nodes
    return lifts


def _least_bytes(node: NodeProto) -> int:
    return _LEAST_ROUNDED_BYTES if node.op_type == _BLOCKS else _LEAST_BYTES


def _nbytes(graph: Graph, node: NodeProto, constant: Mapping[str, frozenset[str]]) -> int:
    """Bytes of the table that a Gather takes rows of; 0 for every other node."""
    if node.op_type == _BLOCKS and node.domain == "com.microsoft":
        shape = table_shape(graph, node)
        if shape is None or node.input[1] in constant or node.output[0] in graph.output_names:
            return 0
        return graph.constants[node.input[0]].nbytes
    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx") or attribute(node, "axis", 0) != 0:
        return 0
    table, indices = node.input
    if table not in constant or indices in constant or node.output[0] in graph.output_names:
        return 0
    return sum(graph.constants[name].nbytes for name in constant[table])


def _depends_on(
    producers: Mapping[str, NodeProto], name: str, stops: Collection[str], shapes: Mapping[str, NodeProto]
) -> bool:
    """Whether a tensor needs one of `stops`. The shapes of rows of lifted tables do not need the rows."""
    pending, seen = [name], set[str]()
    while pending:
        current = pending.pop()
        if current in stops:
            return True
        if current in seen or current not in producers:
            continue
        seen.add(current)
        node = producers[current]
        if node.op_type == "Shape" and node.input[0] in shapes and not node.attribute:
            pending.append(shapes[node.input[0]].input[1])
        else:
            pending.extend(node_inputs(node))
    return False


class _Rows:
    """Moves one Gather through the arithmetic by which its table is made, towards the constants."""

    def __init__(
        self,
        graph: Graph,
        producers: Mapping[str, NodeProto],
        constant: Collection[str],
        gather: NodeProto,
    ) -> None:
        self._graph = graph
        self._producers = producers
        self._constant = constant
        self._table, self._indices, self._output = gather.input[0], gather.input[1], gather.output[0]
        self._shape: tuple[int, ...] = ()
        self._new_constants: dict[str, Constant] = {}
        self.lifts: list[Lift] = []
        self.nodes: list[NodeProto] = []

    def take(self) -> bool:
        """Whether the table can be lifted; then `lifts` and `nodes` replace the Gather."""
        if self._table in self._graph.constants:
            constant = self._graph.constants[self._table]
            if len(constant.shape) < 2 or constant.dtype not in ONNX_DTYPES:
                return False
            self.lifts = [Lift(table=self._table, indices=self._indices, output=self._output)]
            return True
        _, shape = self._graph.types.get(self._table, (0, None))
        if shape is None or len(shape) < 2 or not all(isinstance(size, int) for size in shape):
            return False
        self._shape = tuple(int(size) for size in shape if isinstance(size, int))
        if self._rows(self._table, self._output) != self._output or not self.lifts:
            return False
        self._graph.constants.update(self._new_constants)
        return True

    def _rows(self, name: str, output: str | None = None) -> str | None:
        """Name of the rows of a constant tensor; the tensor's own name where it is the same for all rows."""
        if name in self._graph.constants:
            return self._constant_rows(name, self._graph.constants[name])
        node = self._producers[name]
        output = output or f"{self._output}.{name}"
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "DequantizeLinear":
            return self._dequantised_rows(node, output)
        if node.op_type not in _ROW_WISE:
            return None
        inputs = [self._rows(before) for before in node.input]
        if any(before is None for before in inputs) or inputs == list(node.input):
            return None
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = ""
        del copy.input[:], copy.output[:]
        copy.input.extend(before for before in inputs if before is not None)
        copy.output.append(output)
        self.nodes.append(copy)
        return output

    def _constant_rows(self, name: str, constant: Constant) -> str | None:
        if len(constant.shape) == len(self._shape) and constant.shape[0] == self._shape[0] > 1:
            return self._lookup(name, constant)
        # Fewer dimensions, or one row for all: broadcasting treats the rows as it treated the table.
        return name if len(constant.shape) < len(self._shape) or constant.shape[0] == 1 else None

    def _lookup(self, name: str, constant: Constant) -> str | None:
        if constant.dtype not in ONNX_DTYPES:
            return None
        output = f"{self._output}.{name}"
        if all(lift.output != output for lift in self.lifts):
            self.lifts.append(Lift(table=name, indices=self._indices, output=output))
        return output

    def _dequantised_rows(self, node: NodeProto, output: str) -> str | None:
        axis, rank = attribute(node, "axis", 1), len(self._shape)
        scale = self._graph.constants.get(node.input[1])
        rows = self._rows(node.input[0])
        if scale is None or rows is None or rows == node.input[0] or attribute(node, "block_size", 0):
            return None
        if not scale.shape or scale.shape == (1,):
            self.nodes.append(helper.make_node("DequantizeLinear", [rows, *node.input[1:]], [output]))
            return output
        if axis % rank == rank - 1:
            self.nodes.append(helper.make_node("DequantizeLinear", [rows, *node.input[1:]], [output], axis=-1))
            return output
        if axis % rank != 0 or scale.shape != self._shape[:1]:
            return None
        # One scale for each row: after the lookup there is one for each position, which the operator cannot take.
        terms = []
        for name in node.input[1:]:
            constant = self._graph.constants.get(name)
            if constant is None:
                return None
            column = self._column(name, constant, rank)
            found = self._lookup(column, self._new_constants[column])
            if found is None:
                return None
            terms.append(self._cast(found, scale.dtype))
        values = self._cast(rows, scale.dtype)
        if len(terms) == 2:
            self.nodes.append(helper.make_node("Sub", [values, terms[1]], [f"{output}.centred"]))
            values = f"{output}.centred"
        self.nodes.append(helper.make_node("Mul", [values, terms[0]], [output]))
        return output

    def _column(self, name: str, constant: Constant, rank: int) -> str:
        """The same constant with dimensions of size one behind, so that its rows broadcast over the table's rows."""
        column = f"{name}.column"
        shape = constant.shape + (1,) * (rank - 1)
        self._new_constants[column] = Constant(constant.dtype, shape, lambda: constant.load().reshape(shape))
        return column

    def _cast(self, name: str, dtype: int) -> str:
        output = f"{name}.{TensorProto.DataType.Name(dtype).lower()}"
        if all(output not in node.output for node in self.nodes):
            self.nodes.append(helper.make_node("Cast", [name], [output], to=dtype))
        return output


def _take_blocks(graph: Graph, node: NodeProto, rows: _Rows) -> bool:
    """Whether the table of a GatherBlockQuantized can be lifted; then the operator takes rows that were looked up.

    It gets them in the order in which they are wanted, so that its own indices only count.
    """
    if len(node.input) != len(("table", "indices", "scales")) or not all(n in graph.constants for n in node.input[::2]):
        return False
    table, scales = (graph.constants[name] for name in node.input[::2])
    is_plain = attribute(node, "gather_axis", 0) == 0 and attribute(node, "quantize_axis", 1) in (-1, 1)
    if not is_plain or {table.dtype, scales.dtype} - ONNX_DTYPES.keys() or {len(table.shape), len(scales.shape)} != {2}:
        return False
    indices, output = node.input[1], node.output[0]
    names = {name: f"{output}.{name}" for name in ("shape", "count", "line", "order", "zero", "one")}
    for name, value in (("zero", 0), ("one", 1)):
        graph.constants[names[name]] = known_constant(np.array(value, np.int64))
    flat = []
    for what, name, constant in (("bytes", node.input[0], table), ("scales", node.input[2], scales)):
        found, width = f"{output}.{what}", f"{output}.{what}.width"
        rows.lifts.append(Lift(table=name, indices=indices, output=found))
        graph.constants[width] = known_constant(np.array([-1, constant.shape[1]], np.int64))
        rows.nodes.append(helper.make_node("Reshape", [found, width], [f"{found}.flat"]))
        flat.append(f"{found}.flat")
    rows.nodes += [
        helper.make_node("Shape", [indices], [names["shape"]]),
        helper.make_node("Size", [indices], [names["count"]]),
        helper.make_node("Range", [names["zero"], names["count"], names["one"]], [names["line"]]),
        helper.make_node("Reshape", [names["line"], names["shape"]], [names["order"]]),
    ]
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [flat[0], names["order"], flat[1]]
    rows.nodes.append(copy)
    return True


def _shape_of_rows(graph: Graph, gather: NodeProto, node: NodeProto) -> list[NodeProto]:
    """Shape(Gather(table, indices)) without the rows: the indices' shape, followed by a row's."""
    table = gather.input[0]
    if gather.op_type == _BLOCKS:
        shape: tuple[int | str | None, ...] | None = table_shape(graph, gather)
    else:
        shape = graph.constants[table].shape if table in graph.constants else graph.types[table][1]
    assert shape is not None
    row = np.array(shape[1:], np.int64)
    before, tail = f"{node.output[0]}.indices", f"{node.output[0]}.row"
    graph.constants[tail] = Constant(TensorProto.INT64, row.shape, lambda: row)
    graph.types[before] = (TensorProto.INT64, None)
    return [
        helper.make_node("Shape", [gather.input[1]], [before]),
        helper.make_node("Concat", [before, tail], [node.output[0]], axis=0),
    ]
