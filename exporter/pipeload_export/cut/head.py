"""The vocabulary head leaves the graph: it is cut along the vocabulary into slices of at most a block's size.

Each slice is a tiny graph over the rows [begin, end) of a table of shape [vocabulary, hidden]:

```
head.input [..., hidden] --FusedMatMul(transB)-- rows of the table --(Add bias)--> a part of the output's last axis
```

A head that is tied to the embedding has no copy of it: its slices point into the table of the embedding. Where the rows
are rounded, MatMulNBits takes the place of FusedMatMul, and the rows' scales are cut like the rows.

Measured without prepacking on 2 cores, K = 1600, N = 6000, milliseconds (median) for 1 / 8 / 128 positions:
MatMul over [K, N] 1.6 / 4.6 / 15.8, FusedMatMul(transB) 1.6 / 3.6 / 14.2, Gemm(transB) with reshapes 1.7 / 3.7 / 14.6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import gcd, prod

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from pipeload.format.manifest import PAGE_BYTES
from pipeload_export.graph.graph import Constant, Graph, attribute, same_values, tensor_proto
from pipeload_export.rewrite.activations import Activations, halved

__all__ = ["HeadCut", "cut_head", "slice_graph"]

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_ROUNDED_PARTS = 3
"""Blocks, scales and zeros. A product that takes more does something else as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCut:
    """A head that was taken out of the graph.

    Attributes:
        input: the tensor that every slice takes.
        output: the graph output, of which every slice makes a part.
        table: name of the constant that is its weights as [vocabulary, hidden], or their rounded blocks.
        tied: name of the table with the same bytes that was lifted out of the graph already, or None.
        scales: names of the constants with a row for each of the table's, scales and zeros of rounded blocks.
        product: the node that multiplies with rounded blocks; None for floats.
        in_halves: it takes the halves of the input (`rewrite.activations`), which each slice makes.
        bias: name of a constant of shape [vocabulary], or None.
        rows: (begin, end) of each slice.
    """

    input: str
    output: str
    table: str
    tied: str | None
    scales: tuple[str, ...] = ()
    product: NodeProto | None = None
    in_halves: bool = False
    bias: str | None
    rows: tuple[tuple[int, int], ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """The constants that are cut by rows."""
        return self.table, *self.scales

    def cut(self, graph: Graph, index: int) -> dict[str, Constant]:
        """The constants of one slice, by the names that they have in its graph."""
        begin, end = self.rows[index]
        return {f"{name}[{begin}:{end}]": _rows_of(graph.constants[name], begin, end) for name in self.parts}


def cut_head(
    graph: Graph,
    *,
    block_bytes: int,
    tables: Iterable[str],
    item_bytes: Callable[[Constant], int],
    again: bool = False,
) -> HeadCut | None:
    """Take the vocabulary head out of the graph, if it is tied to a lifted table or larger than a block.

    The graph is changed unless None is returned.

    Args:
        graph: normalised.
        block_bytes: weights of one block.
        tables: names of the constants that were lifted.
        item_bytes: of an element of a constant, as it is stored.
        again: it was cut before, so it is cut whatever its size.
    """
    tails = [tail for name in graph.output_names if (tail := _tail(graph, name)) is not None]
    tail = max(tails, key=lambda t: t.rows.nbytes, default=None)
    if tail is None:
        return None
    tied = next((name for name in dict.fromkeys(tables) if _same_rows(graph.constants[name], tail.rows)), None)
    row_bytes = sum(constant.nbytes // constant.shape[0] for constant in (tail.rows, *tail.scales.values()))
    stored_bytes = row_bytes if tail.scales else item_bytes(tail.rows) * tail.rows.shape[1]
    count = tail.rows.shape[0]
    if tied is None and not again and count * row_bytes <= block_bytes:
        return None
    table = tied if tied and not tail.scales else tail.weight
    if table == tail.weight:
        graph.constants |= {tail.weight: tail.rows, **tail.scales}
    gone = {id(node) for node in tail.nodes}
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]
    graph.types[tail.output] = graph.types.get(tail.output, (tail.rows.dtype, None))
    return HeadCut(
        input=tail.input,
        output=tail.output,
        table=table,
        tied=tied,
        scales=tuple(tail.scales),
        product=tail.nodes[-1] if tail.scales else None,
        in_halves=tail.in_halves,
        bias=tail.bias,
        rows=tuple(_slices(count, row_bytes, stored_bytes, block_bytes)),
    )


def slice_graph(
    graph: Graph, head: HeadCut, index: int, shape: Sequence[int | str] | None
) -> tuple[ModelProto, dict[str, Constant]]:
    """The graph of one slice, without its weights, and the weights by name. `shape` is that of the head's input."""
    begin, end = head.rows[index]
    output, weights = f"{head.output}[{begin}:{end}]", head.cut(graph, index)
    made = output if head.bias is None else f"{output}.product"
    opset = graph.opsets.get("", 17)
    values: list[TensorProto] = []
    if head.product is None:
        dtype = graph.constants[head.table].dtype
        nodes = [helper.make_node("FusedMatMul", [head.input, *weights], [made], domain="com.microsoft", transB=1)]
    else:
        dtype = graph.constants[head.scales[0]].dtype
        activations = Activations(opset)
        nodes = list(_rounded_product(graph, head, list(weights), made, end - begin, activations))
        values += [tensor_proto(name, constant) for name, constant in activations.constants.items()]
    if head.bias is not None:
        part = np.ascontiguousarray(graph.constants[head.bias].values()[begin:end])
        values.append(helper.make_tensor("bias", dtype, part.shape, part.tobytes(), raw=True))
        nodes.append(helper.make_node("Add", [made, "bias"], [output]))
    made_shape = None if shape is None else [*shape[:-1], end - begin]
    proto = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info(head.input, dtype, shape)],
        [helper.make_tensor_value_info(output, dtype, made_shape)],
        values,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(proto, opset_imports=opsets), weights


def _rounded_product(
    graph: Graph, head: HeadCut, weights: Sequence[str], output: str, count: int, activations: Activations
) -> Iterator[NodeProto]:
    """The product of the head's input with `count` rows of rounded blocks."""
    product = NodeProto()
    product.CopyFrom(head.product)
    next(item for item in product.attribute if item.name == "N").i = count
    given, made = head.input, output
    if head.in_halves:
        rank = len(graph.types[head.input][1] or ())
        given = activations.halves(head.input, rank, attribute(head.product, "block_size"))
        made = f"{output}.of_halves"
        yield from activations.take()
    product.input[:], product.output[:] = [given, *weights], [made]
    yield product
    if head.in_halves:
        activations.joined(made, output)
        yield from activations.take()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tail:
    input: str
    output: str
    weight: str
    rows: Constant
    bias: str | None
    nodes: tuple[NodeProto, ...]
    scales: dict[str, Constant] = field(default_factory=dict)
    in_halves: bool = False


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
    if found := halved(producers, node):
        return _rounded_tail(graph, found.product, output, (*nodes, found.product), bias, found.given)
    if node.op_type == "MatMulNBits":
        return _rounded_tail(graph, node, output, tuple(nodes), bias)
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


def _rounded_tail(
    graph: Graph, node: NodeProto, output: str, nodes: tuple[NodeProto, ...], bias: str | None, whole: str = ""
) -> _Tail | None:
    """The same for a product with rounded blocks, whose scales and zeros have a row for each row of the weight.

    `whole` is the tensor of which it takes halves, if it does.
    """
    names = list(node.input[1:])
    count = attribute(node, "N")
    if len(names) > _ROUNDED_PARTS or not all(name in graph.constants for name in names) or not node.input[0]:
        return None
    blobs, *scales = (graph.constants[name] for name in names)
    if blobs.shape[0] != count or any(prod(constant.shape) % count for constant in scales):
        return None
    if bias is not None and graph.constants[bias].shape != (count,):
        return None
    return _Tail(
        input=whole or node.input[0],
        in_halves=bool(whole),
        output=output,
        weight=names[0],
        rows=blobs,
        bias=bias,
        nodes=nodes,
        scales={name: _reshaped(one, (count, -1)) for name, one in zip(names[1:], scales, strict=True)},
    )


def _reshaped(constant: Constant, shape: tuple[int, int]) -> Constant:
    known = shape[0], prod(constant.shape) // shape[0]
    return Constant(constant.dtype, known, lambda: constant.load().reshape(known))


def _rows_of(constant: Constant, begin: int, end: int) -> Constant:
    return Constant(constant.dtype, (end - begin, *constant.shape[1:]), lambda: constant.load()[begin:end])


def _same_rows(table: Constant, rows: Constant) -> bool:
    """Whether a table has the same rows, in whatever shape."""
    if not table.shape or not rows.shape or table.shape[0] != rows.shape[0] or table.nbytes != rows.nbytes:
        return False
    count = table.shape[0]
    return same_values(_reshaped(table, (count, -1)), _reshaped(rows, (count, -1)))


def _slices(count: int, row_bytes: int, stored_bytes: int, block_bytes: int) -> list[tuple[int, int]]:
    """Equal parts of the rows, none above a block's bytes, each beginning at a page of the file.

    A row has `row_bytes` as the model has it, and `stored_bytes` in the file.
    """
    step = PAGE_BYTES // gcd(PAGE_BYTES, stored_bytes)
    most = max(block_bytes // (row_bytes * step), 1) * step
    parts = -(-count // most)
    each = -(-count // (parts * step)) * step
    return [(begin, min(begin + each, count)) for begin in range(0, count, each)]
