"""A graph -> the same graph with weights of 8 or 4 bits, which are rounded when they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeload_export.graph.graph import Graph
from pipeload_export.graph.save import TensorFile
from pipeload_export.rewrite.integer_products import (
    declared_columns,
    integer_matrices,
    replace_products,
    write_columns,
)
from pipeload_export.rewrite.matrices import NARROWING, Layout, Matrix, find_matrices, replace_matrices
from pipeload_export.rewrite.parts import Parts
from pipeload_export.rewrite.rounding import Rounding, round_rows

__all__ = ["Choose", "is_fine", "round_weights"]

Choose: TypeAlias = Callable[[Matrix], Rounding | None]
"""How a matrix is rounded; None where it stays floats."""


def round_weights(
    graph: Graph, choose: Choose, parts: Parts, *, integers: bool = False, outputs: Collection[str] = ()
) -> tuple[int, int]:
    """Put weights of few bits in the place of floats.

    Args:
        graph: the model's, or a shard's; it changes.
        choose: how each matrix is rounded.
        parts: rounds them, when they are wanted.
        integers: products are made of integers where that is better (`integer_products`).
        outputs: names of the model's outputs; only for integers.

    Returns:
        How many matrices were rounded, and how many of them have products of integers.
    """
    chosen = [(matrix, how) for matrix in find_matrices(graph) if (how := choose(matrix)) is not None]
    if not chosen:
        return 0, 0
    whole = integer_matrices(graph, [matrix for matrix, _ in chosen], outputs) if integers else []
    blocks = [(matrix, how) for matrix, how in chosen if matrix not in whole]
    replace_matrices(graph, [(matrix, _layout(how)) for matrix, how in blocks])
    replace_products(graph, whole)
    for matrix, how in blocks:
        stays = bool(matrix.lookups)
        graph.constants |= parts.constants(matrix.declared(_layout(how)), partial(_write, matrix, how), stay=stays)
    for matrix in whole:
        write = partial(write_columns, matrix=matrix)
        graph.constants |= parts.constants(declared_columns(matrix), write, stay=False)
    return len(chosen), len(whole)


def is_fine(matrix: Matrix) -> bool:
    """Whether 4 bits would hurt: tables, products that are tied to one, and products that narrow.

    Those make at most half as many values as they sum over.
    """
    return bool(matrix.lookups) or matrix.columns >= NARROWING * matrix.rows


def _layout(rounding: Rounding) -> Layout:
    return Layout(bits=rounding.bits, block_size=rounding.block_size, has_zeros=not rounding.symmetric)


def _write(matrix: Matrix, rounding: Rounding, file: TensorFile) -> Iterator[int]:
    """Round the weight and write it; after each piece its bytes of floats."""
    scales, zeros, begin = [], [], file.begin()
    for piece in round_rows(matrix.constant, rounding, transposed=matrix.transposed):
        file.write(piece.blobs)
        scales.append(piece.scales)
        zeros.append(piece.zeros)
        yield matrix.constant.nbytes * len(piece.blobs) // matrix.rows
    made: dict[str, NDArray[Any]] = {"scales": np.concatenate(scales)}
    if not rounding.symmetric:
        made["zeros"] = np.concatenate(zeros)
    matrix.add(file, _layout(rounding), begin, **made)
