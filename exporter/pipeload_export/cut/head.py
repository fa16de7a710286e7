"""The vocabulary head leaves the graph: it is cut along the vocabulary into slices of at most a block's size.

Each slice is a tiny graph over the rows [begin, end) of a table of shape [vocabulary, hidden]:

```
head.input [..., hidden] --FusedMatMul(transB)-- rows of the table --(Add bias)--> a part of the output's last axis
```

A head that is tied to the embedding has no copy of it: its slices point into the table of the embedding.

Measured without prepacking on 2 cores, K = 1600, N = 6000, milliseconds (median) for 1 / 8 / 128 positions:
MatMul over [K, N] 1.6 / 4.6 / 15.8, FusedMatMul(transB) 1.6 / 3.6 / 14.2, Gemm(transB) with reshapes 1.7 / 3.7 / 14.6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from pipeload.format.manifest import PAGE_BYTES
from pipeload_export.graph.graph import Constant, Graph, attribute

__all__ = ["HeadCut", "cut_head", "slice_graph"]

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_COMPARED_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCut:
    """A head that was taken out of the graph.

    Attributes:
        input: the tensor that every slice takes.
        output: the graph output, of which every slice makes a part.
        table: name of the constant that is its weights as [vocabulary, hidden].
        tied: whether that is a table that was lifted out of the graph already.
        bias: name of a constant of shape [vocabulary], or None.
        rows: (begin, end) of each slice.
    """

    input: str
    output: str
    table: str
    tied: bool
    bias: str | None
    rows: tuple[tuple[int, int], ...]


def cut_head(
    graph: Graph, *, block_bytes: int, tables: Iterable[str], item_bytes: Callable[[Constant], int]
) -> HeadCut | None:
    """Take the vocabulary head out of the graph, if it is tied to a lifted table or larger than a block.

    The graph is changed unless None is returned.

    Args:
        graph: normalised.
        block_bytes: weights of one block.
        tables: names of the constants that were lifted.
        item_bytes: of an element of a constant, as it is stored.
    """
    tails = [tail for name in graph.output_names if (tail := _tail(graph, name)) is not None]
    tail = max(tails, key=lambda t: t.rows.nbytes, default=None)
    if tail is None:
        return None
    tied = next((name for name in dict.fromkeys(tables) if _same_rows(graph.constants[name], tail.rows)), None)
    if tied is None and tail.rows.nbytes <= block_bytes:
        return None
    table = tied or tail.weight
    if tied is None:
        graph.constants[tail.weight] = tail.rows
    gone = {id(node) for node in tail.nodes}
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]
    graph.types[tail.output] = graph.types.get(tail.output, (tail.rows.dtype, None))
    return HeadCut(
        input=tail.input,
        output=tail.output,
        table=table,
        tied=tied is not None,
        bias=tail.bias,
        rows=tuple(_slices(graph.constants[table], block_bytes, item_bytes(graph.constants[table]))),
    )


def slice_graph(
    graph: Graph, head: HeadCut, index: int, shape: Sequence[int | str] | None
) -> tuple[ModelProto, dict[str, Constant]]:
    """The graph of one slice, without its weights, and the weights by name. `shape` is that of the head's input."""
    begin, end = head.rows[index]
    table = graph.constants[head.table]
    name, output = f"{head.table}[{begin}:{end}]", f"{head.output}[{begin}:{end}]"
    weights = {name: Constant(table.dtype, (end - begin, table.shape[1]), lambda: table.load()[begin:end])}
    made = output if head.bias is None else f"{output}.product"
    nodes = [helper.make_node("FusedMatMul", [head.input, name], [made], domain="com.microsoft", transB=1)]
    values = []
    if head.bias is not None:
        part = np.ascontiguousarray(graph.constants[head.bias].values()[begin:end])
        values.append(helper.make_tensor("bias", table.dtype, part.shape, part.tobytes(), raw=True))
        nodes.append(helper.make_node("Add", [made, "bias"], [output]))
    made_shape = None if shape is None else [*shape[:-1], end - begin]
    proto = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info(head.input, table.dtype, shape)],
        [helper.make_tensor_value_info(output, table.dtype, made_shape)],
        values,
    )
    opsets = [helper.make_opsetid("", graph.opsets.get("", 17)), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(proto, opset_imports=opsets), weights


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tail:
    input: str
    output: str
    weight: str
    rows: Constant
    bias: str | None
    nodes: tuple[NodeProto, ...]


def _tail(graph: Graph, output: str) -> _Tail | None:
    """The product at the end of the graph that makes an output, if there is one."""
    producers, consumers = graph.producers(), graph.consumers()
    node = producers.get(output)
    if node is None or consumers.get(output):
        return None
    nodes, bias = [node], None
    if node.op_type == "Add":
        sides = [name for name in node.input if name not in graph.constants]
        given = [name for name in node.input if name in graph.constants]
        if len(sides) != 1 or len(given) != 1 or len(consumers[sides[0]]) != 1 or sides[0] not in producers:
            return None
        if sides[0] in graph.output_names:
            return None
        node, bias = producers[sides[0]], given[0]
        nodes.append(node)
    weight = node.input[1] if len(node.input) >= 2 else ""
    constant = graph.constants.get(weight)
    if (
        constant is None
        or len(constant.shape) != 2
        or constant.dtype not in _FLOATS
        or node.input[0] in graph.constants
    ):
        return None
    transposed = True
    if node.op_type == "Gemm":
        if any(attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta")) or attribute(node, "transA", 0):
            return None
        transposed = not attribute(node, "transB", 0)
        if len(node.input) == 3 and node.input[2]:
            if bias is not None or node.input[2] not in graph.constants:
                return None
            bias = node.input[2]
    elif node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
        return None
    rows = Constant(constant.dtype, constant.shape[::-1], lambda: constant.load().T) if transposed else constant
    if bias is not None and graph.constants[bias].shape != rows.shape[:1]:
        return None
    return _Tail(input=node.input[0], output=output, weight=weight, rows=rows, bias=bias, nodes=tuple(nodes))


def _same_rows(table: Constant, rows: Constant) -> bool:
    """Whether two tables have equal contents, compared piece by piece."""
    if table.shape != rows.shape or table.dtype != rows.dtype:
        return False
    first, second = table.load(), rows.load()
    pieces = range(0, table.shape[0], _COMPARED_ROWS)
    return all(np.array_equal(first[i : i + _COMPARED_ROWS], second[i : i + _COMPARED_ROWS]) for i in pieces)


def _slices(table: Constant, block_bytes: int, item_bytes: int) -> list[tuple[int, int]]:
    """Equal parts of the rows, none above a block's bytes, each beginning at a page of the file."""
    row_bytes = table.nbytes // table.shape[0]
    step = PAGE_BYTES // gcd(PAGE_BYTES, table.shape[1] * item_bytes)
    most = max(block_bytes // (row_bytes * step), 1) * step
    count = -(-table.shape[0] // most)
    each = -(-table.shape[0] // (count * step)) * step
    return [(begin, min(begin + each, table.shape[0])) for begin in range(0, table.shape[0], each)]
