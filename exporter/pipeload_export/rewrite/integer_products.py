"""Products with weights of 8 bits that need no packing: integers times integers, for models that read whole texts.

```
before    MatMul(x, weight)
after     peak   = max(abs(x)) of each row, and y = x / peak
          coarse = y in 63 steps up and down, fine = what is left of y in 63 steps of a 126th of those
          both   = Concat(coarse, fine)                    bytes, twice the rows
          (c, f) = MatMulIntegerToFloat(both, weight in bytes, a scale for each column)
          c + f / 126, times peak
```

MatMulNBits wants its weights laid out for the processor before each run of a shard that is streamed, which takes as
long as its products with a hundred tokens do. This product takes its weights as they lie in the file.

A matrix that narrows, as the second one of a feed-forward, has a few columns of large weights, on which the scales of
all rows would depend: its columns are divided by the roots of their peaks first, and activations are multiplied with
those (MiniLM: the error of such weights goes from 2.1 to 0.9 %, and is 0.6 % in blocks of 32).

Two times 7 bits of an activation are as good as a float beside weights of 8 bits, and a row's rounding depends on that
row alone: a text has the same answers in any batch. All values are within 127 of their zeros, so that no processor's
sum of two products of bytes is cut off at 16 bits (AVX2 does that to larger ones), and every processor, packed or not,
adds up the same integers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from pipeload_export.graph.graph import Graph, known_constant, row_pieces
from pipeload_export.graph.normalise import drop_dead
from pipeload_export.graph.save import TensorFile
from pipeload_export.rewrite.matrices import NARROWING, Matrix

__all__ = ["declared_columns", "integer_matrices", "replace_products", "write_columns"]

_DOMAIN = "com.microsoft"
_STEPS, _FINE_STEPS, _WEIGHT_STEPS = 63, 126, 127
"""Up and down from zero: of an activation, of what is left of it in half a step, and of a weight."""
_LEAST = 1e-30
"""The least peak of a row or column: zeros stay zeros."""
_PIECE_ELEMENTS = 4 << 20
_NEW_OPSET = 18
"""The first version of ONNX in which ReduceMax takes its axes as an input, and Split is told the number of parts."""
_ONE, _ZERO, _STEP, _FINE_STEP, _PART, _LEAST_NAME, _LAST = (
    f"pipeload.product.{name}" for name in ("one", "zero", "step", "fine_step", "part", "least", "last")
)
_NUMBERS: dict[str, NDArray[Any]] = {
    _ONE: np.array(1, np.float32),
    _ZERO: np.array(_STEPS + 1, np.uint8),
    _STEP: np.array(1 / _STEPS, np.float32),
    _FINE_STEP: np.array(1 / _STEPS / _FINE_STEPS, np.float32),
    _PART: np.array(1 / _FINE_STEPS, np.float32),
    _LEAST_NAME: np.array(_LEAST, np.float32),
    _LAST: np.array([-1], np.int64),
}


def integer_matrices(graph: Graph, matrices: Sequence[Matrix], outputs: Collection[str]) -> list[Matrix]:
    """Those whose products are better made of integers, in a model without KV caches.

    With caches a pass has a row or two for each text: packed weights are then worth their packing, since the processor
    reads them in the order in which they lie. A table stays what lookups take, and so does a vocabulary head, which is
    cut.

    Args:
        graph: the model's, or a shard's.
        matrices: its matrices.
        outputs: names of the model's outputs.
    """
    consumers, outputs = graph.consumers(), set(outputs)

    def is_head(node: NodeProto) -> bool:
        made = {node.output[0], *(name for user in consumers.get(node.output[0], []) for name in user.output)}
        return not outputs.isdisjoint(made)

    return [
        matrix
        for matrix in matrices
        if not matrix.lookups and (matrix.rows <= matrix.columns or not any(map(is_head, matrix.products)))
    ]


def replace_products(graph: Graph, matrices: Collection[Matrix]) -> None:
    """Put products of integers in the place of those of floats.

    Args:
        graph: normalised; it changes.
        matrices: without lookups; `write_columns` writes each.
    """
    taken = {id(node): matrix for matrix in matrices for node in matrix.products}
    opset = graph.opsets.get("", 0)
    rounded: set[str] = set()
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if id(node) not in taken:
            nodes.append(node)
            continue
        matrix, given = taken[id(node)], node.input[0]
        if _narrows(matrix):
            given = f"{node.output[0]}.even"
            nodes.append(helper.make_node("Mul", [node.input[0], matrix.named("evens")], [given]))
        if given not in rounded:
            rounded.add(given)
            nodes += _rounded(given, opset)
        nodes += _product(node, matrix, given, opset)
    graph.nodes = nodes
    graph.constants |= {name: known_constant(number) for name, number in _NUMBERS.items()}
    graph.opsets.setdefault(_DOMAIN, 1)
    drop_dead(graph)


def declared_columns(matrix: Matrix) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Element types and shapes of the tensors that `write_columns` writes, by name."""
    return {
        matrix.named("steps"): (TensorProto.INT8, (matrix.columns, matrix.rows)),
        matrix.named("scales"): (TensorProto.FLOAT, (matrix.rows,)),
        **({matrix.named("evens"): (TensorProto.FLOAT, (matrix.columns,))} if _narrows(matrix) else {}),
    }


def write_columns(file: TensorFile, matrix: Matrix) -> Iterator[int]:
    """Round a matrix and write it as `[columns, rows]`, int8 with a scale for each row; after each piece its bytes."""
    values = matrix.constant.values() if matrix.transposed else matrix.constant.values().T
    peaks, evens = np.full(values.shape[1], _LEAST, np.float32), []
    for piece in row_pieces(values, _PIECE_ELEMENTS):
        evens.append(_evens(matrix, piece))
        np.maximum(peaks, np.abs(piece / evens[-1]).max(axis=0), out=peaks)
    scales, begin = peaks / np.float32(_WEIGHT_STEPS), file.begin()
    for piece, even in zip(row_pieces(values, _PIECE_ELEMENTS), evens, strict=True):
        steps = np.rint(piece / even / scales)
        file.write(np.clip(steps, -_WEIGHT_STEPS, _WEIGHT_STEPS).astype(np.int8))
        yield piece.nbytes
    file.declare(matrix.named("steps"), TensorProto.INT8, values.shape, begin)
    # A product adds up steps of activations too.
    file.add(matrix.named("scales"), scales / np.float32(_STEPS))
    if _narrows(matrix):
        file.add(matrix.named("evens"), np.concatenate(evens).reshape(-1))


def _narrows(matrix: Matrix) -> bool:
    return matrix.columns >= NARROWING * matrix.rows


def _evens(matrix: Matrix, piece: NDArray[Any]) -> NDArray[Any]:
    """What rows of a piece `[columns, rows]` are divided by before they are rounded, `[columns, 1]`."""
    if not _narrows(matrix):
        return np.ones((1, 1), np.float32)
    evens: NDArray[Any] = np.sqrt(np.maximum(np.abs(piece).max(axis=1, keepdims=True), np.float32(_LEAST)))
    return evens


def _rounded(name: str, opset: int) -> Iterator[NodeProto]:
    """The nodes that round the rows of an activation."""
    made = ("size", "largest", "peak", "part", "coarse", "near", "left", "fine", "both")
    size, largest, peak, part, coarse, near, left, fine, both = (f"{name}.{what}" for what in made)
    yield helper.make_node("Abs", [name], [size])
    if opset >= _NEW_OPSET:
        yield helper.make_node("ReduceMax", [size, _LAST], [largest], keepdims=1)
    else:
        yield helper.make_node("ReduceMax", [size], [largest], axes=[-1], keepdims=1)
    yield helper.make_node("Max", [largest, _LEAST_NAME], [peak])
    yield helper.make_node("Div", [name, peak], [part])
    yield helper.make_node("QuantizeLinear", [part, _STEP, _ZERO], [coarse])
    yield helper.make_node("DequantizeLinear", [coarse, _STEP, _ZERO], [near])
    yield helper.make_node("Sub", [part, near], [left])
    yield helper.make_node("QuantizeLinear", [left, _FINE_STEP, _ZERO], [fine])
    yield helper.make_node("Concat", [coarse, fine], [both], axis=0)


def _product(node: NodeProto, matrix: Matrix, given: str, opset: int) -> Iterator[NodeProto]:
    output = node.output[0]
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    halves, coarse, fine, less, sums = (f"{output}.{what}" for what in ("halves", "coarse", "fine", "less", "sums"))
    taken = [f"{given}.both", matrix.named("steps"), _ONE, matrix.named("scales"), _ZERO]
    yield helper.make_node("MatMulIntegerToFloat", taken, [halves], node.name, domain=_DOMAIN)
    parts = {"num_outputs": 2} if opset >= _NEW_OPSET else {}
    yield helper.make_node("Split", [halves], [coarse, fine], axis=0, **parts)
    yield helper.make_node("Mul", [fine, _PART], [less])
    yield helper.make_node("Add", [coarse, less], [sums])
    product = f"{output}.product" if bias else output
    yield helper.make_node("Mul", [sums, f"{given}.peak"], [product])
    if bias:
        yield helper.make_node("Add", [product, bias], [output])
