"""The matrices of a graph that products and lookups take, and the nodes that take blocks of few bits instead.

```
before    MatMul(x, weight), Gemm(x, weight, bias), FusedMatMul(x, weight)
after     MatMulNBits(x, blobs, scales)                          and, for Gemm, Add(..., bias)
          Add(..., MatMul(sums of the blocks of x, minima))      where blocks have minima
          ReduceSum(MatMulNBits(halves of x, blobs, scales))     where activations are not rounded
before    Gather(table, ids)
after     GatherBlockQuantized(table as rows of bytes, ids, scales)
```

A table that is the weight of a product too, as that of a tied vocabulary head, is one matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from pipeload_export.graph.graph import Constant, Graph, attribute, known_constant, same_values
from pipeload_export.graph.normalise import drop_dead
from pipeload_export.graph.save import TensorFile
from pipeload_export.rewrite.activations import Activations

__all__ = [
    "LEAST_BYTES",
    "NARROWING",
    "Layout",
    "Matrix",
    "blob_shape",
    "find_matrices",
    "has_ranks",
    "replace_matrices",
]

LEAST_BYTES = 4 << 10
"""Smaller weights are not worth it: a classifier of few labels, for one, would lose more than it saves."""
NARROWING = 2
"""A product that narrows this much, as the second one of a feed-forward, sums over activations with outliers. Of what 4
bits add to SmolLM2-135M's perplexity those products make more than half, with a quarter of the weights."""
_LEAST_SIDE, _LEAST_TABLE_BYTES = 16, 64 << 10
_ACCURACY_LEVEL = 4
"""MatMulNBits rounds activations to 8 bits too: the only level that is fast, and that takes weights of 8 bits."""
_ONNX, _DOMAIN = ("", "ai.onnx"), "com.microsoft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The blocks of a matrix.

    Attributes:
        bits: 8 or 4, of each weight.
        block_size: weights that have one scale.
        has_zeros: each block has a zero of its own; else zero lies in the middle of the range.
        has_minima: a float is added to all weights of a block.
        in_halves: products take the halves of activations, so that these are not rounded to 8 bits (`activations`).
    """

    bits: int
    block_size: int
    has_zeros: bool = False
    has_minima: bool = False
    in_halves: bool = False


def blob_shape(rows: int, columns: int, layout: Layout) -> tuple[int, int, int]:
    """The shape of the blobs of a matrix; that of its scales is the same without the last dimension."""
    return rows, -(-columns // layout.block_size), layout.block_size * layout.bits // 8


@dataclass(slots=True, eq=False)
class Matrix:
    """A constant, `[rows, columns]` or transposed, and the nodes that take it.

    Attributes:
        name: of the constant.
        constant: its values.
        transposed: it is `[columns, rows]`.
        products: nodes that multiply with it.
        lookups: nodes that take rows of it.
    """

    name: str
    constant: Constant
    transposed: bool
    products: list[NodeProto] = field(default_factory=list)
    lookups: list[NodeProto] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Outputs of a product, or ids of a table."""
        return self.constant.shape[1 if self.transposed else 0]

    @property
    def columns(self) -> int:
        """What a product sums over, or the width of a table."""
        return self.constant.shape[0 if self.transposed else 1]

    def as_rows(self) -> Constant:
        """The same constant as `[rows, columns]`."""
        if not self.transposed:
            return self.constant
        return Constant(self.constant.dtype, self.constant.shape[::-1], lambda: self.constant.load().T)

    def declared(self, layout: Layout) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Element types and shapes of the initializers that `add` makes of blobs, scales and zeros, by name."""
        shape = blob_shape(self.rows, self.columns, layout)
        blobs, (rows, blocks, _) = TensorProto.UINT8, shape
        return {
            **({self.named("blobs"): (blobs, shape)} if self.products else {}),
            **({self.named("bytes"): (blobs, (shape[0], prod(shape[1:])))} if self.lookups else {}),
            self.named("scales"): (TensorProto.FLOAT, (rows, blocks)),
            **({self.named("zeros"): (blobs, (rows, -(-blocks * layout.bits // 8)))} if layout.has_zeros else {}),
        }

    def add(self, file: TensorFile, layout: Layout, blobs_begin: int, **parts: NDArray[Any]) -> None:
        """Make initializers of the blobs, which were written, and of other parts: scales, zeros, minima.

        Args:
            file: where they are.
            layout: the blocks.
            blobs_begin: where the blobs begin in it.
            parts: by name; `[rows, blocks]`, but zeros of 4 bits, two of which share a byte.
        """
        shape = blob_shape(self.rows, self.columns, layout)
        # The operators want the same bytes in two shapes.
        if self.products:
            file.declare(self.named("blobs"), TensorProto.UINT8, shape, blobs_begin)
        if self.lookups:
            file.declare(self.named("bytes"), TensorProto.UINT8, (shape[0], prod(shape[1:])), blobs_begin)
        for part, values in parts.items():
            file.add(self.named(part), values.T if part == "minima" else values)

    def named(self, part: str) -> str:
        """The name of an initializer that is a part of it."""
        return f"{self.name}.{'columns' if self.transposed else 'rows'}.{part}"


def find_matrices(graph: Graph) -> list[Matrix]:
    """The matrices of float32 that are worth fewer bits, in the order of their first use."""
    found: dict[tuple[str, bool], Matrix] = {}
    consumers = graph.consumers()
    for node in graph.nodes:
        transposed = _transposed(node)
        name = node.input[0 if node.op_type == "Gather" else 1] if transposed is not None else ""
        if transposed is None or not _is_worth_it(graph, name, table=node.op_type == "Gather"):
            continue
        if name in graph.output_names or any(_transposed(user) is None for user in consumers[name]):
            continue  # it stays as floats anyway
        matrix = found.setdefault((name, transposed), Matrix(name, graph.constants[name], transposed))
        (matrix.lookups if node.op_type == "Gather" else matrix.products).append(node)
    _tie(found)
    return [matrix for matrix in found.values() if matrix.lookups or matrix.products]


def has_ranks(graph: Graph, matrix: Matrix) -> bool:
    """Whether the dimensions of all that is multiplied with it are known, as halves and minima want them."""
    return all(graph.types.get(node.input[0], (0, None))[1] is not None for node in matrix.products)


def replace_matrices(graph: Graph, layouts: Iterable[tuple[Matrix, Layout]]) -> None:
    """Put nodes that take blocks in the place of those that take floats.

    Args:
        graph: normalised; it changes.
        layouts: of each matrix. That of a table has neither zeros nor minima; one with minima or halves `has_ranks`.
    """
    taken = {id(node): item for item in layouts for node in (*item[0].products, *item[0].lookups)}
    nodes: list[NodeProto] = []
    activations = Activations(graph.opsets.get("", 0))
    for node in graph.nodes:
        if id(node) not in taken:
            nodes.append(node)
            continue
        make = _lookup if node.op_type == "Gather" else partial(_product, activations=activations)
        nodes += make(graph, *taken[id(node)], node)
    graph.nodes = nodes
    graph.constants |= activations.constants
    graph.opsets.setdefault(_DOMAIN, 1)
    drop_dead(graph)


def _tie(found: Mapping[tuple[str, bool], Matrix]) -> None:
    """Products whose weight is a table under another name take the table's."""
    for table in [matrix for matrix in found.values() if matrix.lookups]:
        for matrix in found.values():
            if matrix is not table and not matrix.lookups and matrix.products and _same_rows(table, matrix):
                table.products += matrix.products
                matrix.products.clear()


def _same_rows(one: Matrix, other: Matrix) -> bool:
    if (one.rows, one.columns) != (other.rows, other.columns):
        return False
    return same_values(one.as_rows(), other.as_rows())


def _product(
    graph: Graph, matrix: Matrix, layout: Layout, node: NodeProto, *, activations: Activations
) -> Iterator[NodeProto]:
    given, rank = node.input[0], len(graph.types.get(node.input[0], (0, None))[1] or ())
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    output = f"{node.output[0]}.product" if bias else node.output[0]
    product = f"{output}.around_zero" if layout.has_minima else output
    taken = activations.halves(given, rank, layout.block_size) if layout.in_halves else given
    made = f"{product}.of_halves" if layout.in_halves else product
    yield from activations.take()
    parts = ["blobs", "scales", *(["zeros"] if layout.has_zeros else [])]
    yield helper.make_node(
        "MatMulNBits",
        [taken, *map(matrix.named, parts)],
        [made],
        node.name,
        domain=_DOMAIN,
        K=matrix.columns,
        N=matrix.rows,
        bits=layout.bits,
        block_size=layout.block_size,
        accuracy_level=_ACCURACY_LEVEL,
    )
    if layout.in_halves:
        activations.joined(made, product)
    if layout.has_minima:
        sums, added = activations.sums(given, rank, layout.block_size), f"{output}.minima"
        yield from activations.take()
        yield helper.make_node("MatMul", [sums, matrix.named("minima")], [added])
        yield helper.make_node("Add", [product, added], [output])
    yield from activations.take()
    if bias:
        yield helper.make_node("Add", [output, bias], [node.output[0]])


def _lookup(graph: Graph, matrix: Matrix, layout: Layout, node: NodeProto) -> Iterator[NodeProto]:
    padded = matrix.columns % layout.block_size
    output = f"{node.output[0]}.padded" if padded else node.output[0]
    yield helper.make_node(
        "GatherBlockQuantized",
        [matrix.named("bytes"), node.input[1], matrix.named("scales")],
        [output],
        node.name,
        domain=_DOMAIN,
        gather_axis=0,
        quantize_axis=1,
        bits=layout.bits,
        block_size=layout.block_size,
    )
    if padded:
        ends = {"first": 0, "end": matrix.columns, "axis": -1}
        names = {part: f"{output}.{part}" for part in ends}
        graph.constants |= {names[part]: known_constant(np.array([n], np.int64)) for part, n in ends.items()}
        yield helper.make_node("Slice", [output, *names.values()], [node.output[0]])


def _transposed(node: NodeProto) -> bool | None:
    """Whether the node takes the columns of a constant as the rows of the weight; None for one that is left alone."""
    if node.op_type == "Gather" and node.domain in _ONNX:
        return False if attribute(node, "axis", 0) == 0 else None
    if len(node.input) < 2 or attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "transA", 0):
        return None
    if node.op_type == "MatMul" and node.domain in _ONNX:
        return True
    if node.op_type == "Gemm" and node.domain in _ONNX and attribute(node, "beta", 1.0) == 1.0:
        return not attribute(node, "transB", 0)
    if node.op_type == "FusedMatMul" and node.domain == _DOMAIN:
        batches = attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0)
        return None if batches else not attribute(node, "transB", 0)
    return None


def _is_worth_it(graph: Graph, name: str, *, table: bool) -> bool:
    constant = graph.constants.get(name)
    return (
        constant is not None
        and constant.dtype == TensorProto.FLOAT
        and len(constant.shape) == 2
        and min(constant.shape) >= _LEAST_SIDE
        and constant.nbytes >= (_LEAST_TABLE_BYTES if table else LEAST_BYTES)
    )
