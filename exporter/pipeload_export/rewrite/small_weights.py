"""An unsplit graph -> the same graph with weights of 8 or 4 bits, written beside its own weights file.

Each matrix is rounded once, a piece at a time; what the later steps read are the bytes of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ExportError
from pipeload.notify import Notify
from pipeload_export.graph.load import load
from pipeload_export.graph.normalise import normalise
from pipeload_export.graph.save import GraphFile
from pipeload_export.rewrite.integer_products import integer_matrices, replace_products, write_columns
from pipeload_export.rewrite.matrices import LEAST_BYTES, NARROWING, Layout, Matrix, find_matrices, replace_matrices
from pipeload_export.rewrite.rounding import Rounding, round_rows
from pipeload_export.source.places import Weights

__all__ = ["DATA_NAME", "GRAPH_NAME", "Rewritten", "write_with_small_weights"]

GRAPH_NAME, DATA_NAME = "model.onnx", "model.onnx_data"
_BYTE_BITS = 8
_STEP = "round the weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """A graph with rounded weights: its file, and whether products multiply integers."""

    path: Path
    integers: bool


def write_with_small_weights(
    source: Path, stored: Weights | None, folder: Path, coarse: Rounding, fine: Rounding, progress: Notify
) -> Rewritten:
    """Write the graph with rounded weights.

    Args:
        source: the unsplit graph.
        stored: those of its weights that lie in a checkpoint.
        folder: an existing folder for the graph and its data.
        coarse: how weights of most products are rounded; symmetric blocks of 8 bits become integers with a scale for
            each output where that is better (`integer_products`).
        fine: how tables are, products that are tied to one, and products that narrow: those that make at most half as
            many values as they sum over.
        progress: called with the name of the step, the bytes of floats that were rounded, and all of them.

    Raises:
        ExportError: it has no weight that could be rounded.
    """
    graph = load(source, stored)
    normalise(graph)
    matrices = find_matrices(graph)
    if not matrices:
        raise ExportError(
            "The graph has no weights of float32 that could be rounded: products with a constant matrix, or tables, of "
            f"at least {LEAST_BYTES >> 10} kB. Export it with --weights fp32, which leaves weights as they are."
        )
    integers = integer_matrices(graph, matrices) if coarse.bits == _BYTE_BITS and coarse.symmetric else []
    blocks = [(matrix, fine if _is_fine(matrix) else coarse) for matrix in matrices if matrix not in integers]
    replace_matrices(graph, [(matrix, _layout(rounding)) for matrix, rounding in blocks])
    replace_products(graph, integers)
    done, total = 0, sum(matrix.constant.nbytes for matrix in matrices)
    with GraphFile(folder / GRAPH_NAME, DATA_NAME) as file:
        for pieces in (*(_write(file, *item) for item in blocks), *(write_columns(file, one) for one in integers)):
            for nbytes in pieces:
                done += nbytes
                progress(_STEP, min(done, total), total)
            graph.forget()
        file.finish(graph)
    return Rewritten(path=folder / GRAPH_NAME, integers=bool(integers))


def _is_fine(matrix: Matrix) -> bool:
    return bool(matrix.lookups) or matrix.columns >= NARROWING * matrix.rows


def _layout(rounding: Rounding) -> Layout:
    return Layout(bits=rounding.bits, block_size=rounding.block_size, has_zeros=not rounding.symmetric)


def _write(file: GraphFile, matrix: Matrix, rounding: Rounding) -> Iterator[int]:
    """Round the weight and write it; after each piece its bytes of floats."""
    scales, zeros, begin = [], [], file.begin()
    for piece in round_rows(matrix.constant, rounding, transposed=matrix.transposed):
        file.write(piece.blobs)
        scales.append(piece.scales)
        zeros.append(piece.zeros)
        yield matrix.constant.nbytes * len(piece.blobs) // matrix.rows
    parts: dict[str, NDArray[Any]] = {"scales": np.concatenate(scales)}
    if not rounding.symmetric:
        parts["zeros"] = np.concatenate(zeros)
    matrix.add(file, _layout(rounding), begin, **parts)
