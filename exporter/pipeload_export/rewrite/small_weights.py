"""An unsplit graph -> the same graph with weights of 8 or 4 bits, written beside its own weights file.

```
before    MatMul(x, weight), Gemm(x, weight, bias), FusedMatMul(x, weight)
after     MatMulNBits(x, blobs, scales)  and, for Gemm, Add(..., bias)
before    Gather(table, ids)
after     GatherBlockQuantized(table as rows of bytes, ids, scales)
```

A table that is the weight of a product too, as that of a tied vocabulary head, is rounded and stored once. Each tensor
is rounded once, a piece at a time; what the later steps read are the bytes of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper

from pipeload.errors import ExportError
from pipeload.notify import Notify
from pipeload_export.graph.graph import Constant, Graph, attribute, known_constant, same_values
from pipeload_export.graph.load import load
from pipeload_export.graph.normalise import drop_dead, normalise
from pipeload_export.graph.save import GraphFile
from pipeload_export.rewrite.rounding import Rounding, round_rows, rounded_shapes
from pipeload_export.source.places import Weights

__all__ = ["DATA_NAME", "GRAPH_NAME", "write_with_small_weights"]

GRAPH_NAME, DATA_NAME = "model.onnx", "model.onnx_data"
_ACCURACY_LEVEL = 4
"""MatMulNBits rounds activations to 8 bits too: the only level that is fast, and that takes weights of 8 bits."""
_LEAST_SIDE, _LEAST_BYTES = 16, 4 << 10
"""Smaller weights are not worth it: a classifier of few labels, for one, would lose more than it saves."""
_LEAST_TABLE_BYTES = 64 << 10
_NARROWING = 2
"""A product that narrows this much, as the second one of a feed-forward, sums over activations with outliers. Of what 4
bits add to SmolLM2-135M's perplexity those products make more than half, with a quarter of the weights."""
_ONNX, _DOMAIN = ("", "ai.onnx"), "com.microsoft"
_STEP = "round the weights"


def write_with_small_weights(
    source: Path, stored: Weights | None, folder: Path, coarse: Rounding, fine: Rounding, progress: Notify
) -> Path:
    """Write the graph with rounded weights.

    Args:
        source: the unsplit graph.
        stored: those of its weights that lie in a checkpoint.
        folder: an existing folder for the graph and its data.
        coarse: how weights of most products are rounded.
        fine: how tables are, products that are tied to one, and products that narrow: those that make at most half as
            many values as they sum over.
        progress: called with the name of the step, the bytes of floats that were rounded, and all of them.

    Returns:
        The graph's file.

    Raises:
        ExportError: it has no weight that could be rounded.
    """
    graph = load(source, stored)
    normalise(graph)
    found = _find(graph, coarse, fine)
    if not found:
        raise ExportError(
            "The graph has no weights of float32 that could be rounded: products with a constant matrix, or tables, of "
            f"at least {_LEAST_BYTES >> 10} kB. Export it with --weights fp32, which leaves weights as they are."
        )
    replaced = {id(node): list(new) for weight in found for node, new in weight.replaced(graph)}
    graph.nodes = [new for node in graph.nodes for new in replaced.get(id(node), [node])]
    graph.opsets.setdefault(_DOMAIN, 1)
    drop_dead(graph)
    done, total = 0, sum(weight.constant.nbytes for weight in found)
    with GraphFile(folder / GRAPH_NAME, DATA_NAME) as file:
        for weight in found:
            for rows in weight.write(file):
                done += weight.constant.nbytes * rows // weight.rows
                progress(_STEP, min(done, total), total)
            graph.forget()
        file.finish(graph)
    return folder / GRAPH_NAME


@dataclass(slots=True, eq=False)
class _Weight:
    """A constant that is rounded, `[rows, columns]` or transposed, and the nodes that take it."""

    name: str
    constant: Constant
    transposed: bool
    rounding: Rounding
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

    def write(self, file: GraphFile) -> Iterator[int]:
        """Round the weight and write it; after each piece its number of rows."""
        scales, zeros, begin = [], [], file.begin()
        for piece in round_rows(self.constant, self.rounding, transposed=self.transposed):
            file.write(piece.blobs)
            scales.append(piece.scales)
            zeros.append(piece.zeros)
            yield len(piece.blobs)
        shape, _ = rounded_shapes(self.rows, self.columns, self.rounding)
        # The operators want the same bytes in two shapes.
        if self.products:
            file.declare(self._named("blobs"), TensorProto.UINT8, shape, begin)
        if self.lookups:
            file.declare(self._named("bytes"), TensorProto.UINT8, (shape[0], prod(shape[1:])), begin)
        file.add(self._named("scales"), np.concatenate(scales))
        if not self.rounding.symmetric:
            file.add(self._named("zeros"), np.concatenate(zeros))

    def replaced(self, graph: Graph) -> Iterator[tuple[NodeProto, Iterator[NodeProto]]]:
        """Each node that takes it, and those that come instead."""
        yield from ((node, self._product(node)) for node in self.products)
        yield from ((node, self._lookup(node, graph)) for node in self.lookups)

    def _named(self, part: str) -> str:
        return f"{self.name}.{'columns' if self.transposed else 'rows'}.{part}"

    def _product(self, node: NodeProto) -> Iterator[NodeProto]:
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        output = f"{node.output[0]}.product" if bias else node.output[0]
        parts = ["blobs", "scales", *([] if self.rounding.symmetric else ["zeros"])]
        yield helper.make_node(
            "MatMulNBits",
            [node.input[0], *map(self._named, parts)],
            [output],
            node.name,
            domain=_DOMAIN,
            K=self.columns,
            N=self.rows,
            bits=self.rounding.bits,
            block_size=self.rounding.block_size,
            accuracy_level=_ACCURACY_LEVEL,
        )
        if bias:
            yield helper.make_node("Add", [output, bias], [node.output[0]])

    def _lookup(self, node: NodeProto, graph: Graph) -> Iterator[NodeProto]:
        padded = self.columns % self.rounding.block_size
        output = f"{node.output[0]}.padded" if padded else node.output[0]
        yield helper.make_node(
            "GatherBlockQuantized",
            [self._named("bytes"), node.input[1], self._named("scales")],
            [output],
            node.name,
            domain=_DOMAIN,
            gather_axis=0,
            quantize_axis=1,
            bits=self.rounding.bits,
            block_size=self.rounding.block_size,
        )
        if padded:
            ends = {"first": 0, "end": self.columns, "axis": -1}
            names = {part: f"{output}.{part}" for part in ends}
            graph.constants |= {names[part]: known_constant(np.array([n], np.int64)) for part, n in ends.items()}
            yield helper.make_node("Slice", [output, *names.values()], [node.output[0]])


def _find(graph: Graph, coarse: Rounding, fine: Rounding) -> list[_Weight]:
    """The weights to round, in the order of their first use."""
    found: dict[tuple[str, bool], _Weight] = {}
    consumers = graph.consumers()
    for node in graph.nodes:
        transposed = _transposed(node)
        name = node.input[0 if node.op_type == "Gather" else 1] if transposed is not None else ""
        if transposed is None or not _is_worth_it(graph, name, table=node.op_type == "Gather"):
            continue
        if name in graph.output_names or any(_transposed(user) is None for user in consumers[name]):
            continue  # it stays as floats anyway
        weight = found.setdefault((name, transposed), _Weight(name, graph.constants[name], transposed, coarse))
        (weight.lookups if node.op_type == "Gather" else weight.products).append(node)
    _tie(found)
    for weight in found.values():
        weight.rounding = fine if weight.lookups or weight.columns >= _NARROWING * weight.rows else coarse
    return [weight for weight in found.values() if weight.lookups or weight.products]


def _tie(found: Mapping[tuple[str, bool], _Weight]) -> None:
    """Products whose weight is a table under another name take the table's."""
    for table in [weight for weight in found.values() if weight.lookups]:
        for weight in found.values():
            if weight is not table and not weight.lookups and weight.products and _same_rows(table, weight):
                table.products += weight.products
                weight.products.clear()


def _same_rows(one: _Weight, other: _Weight) -> bool:
    if (one.rows, one.columns) != (other.rows, other.columns):
        return False
    return same_values(one.as_rows(), other.as_rows())


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
        and constant.nbytes >= (_LEAST_TABLE_BYTES if table else _LEAST_BYTES)
    )
