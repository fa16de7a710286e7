"""An unsplit graph -> the same graph with weights of 8 or 4 bits, written beside its own weights file.

Each matrix is rounded once, a piece at a time; what the later steps read are the bytes of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ExportError
from pipeload.notify import Notify
from pipeload_export.graph.load import load
from pipeload_export.graph.normalise import normalise
from pipeload_export.graph.save import GraphFile
from pipeload_export.rewrite.matrices import LEAST_BYTES, Layout, Matrix, find_matrices, replace_matrices
from pipeload_export.rewrite.rounding import Rounding, round_rows
from pipeload_export.source.places import Weights

__all__ = ["DATA_NAME", "GRAPH_NAME", "write_with_small_weights"]

GRAPH_NAME, DATA_NAME = "model.onnx", "model.onnx_data"
_NARROWING = 2
"""A product that narrows this much, as the second one of a feed-forward, sums over activations with outliers. Of what 4
bits add to SmolLM2-135M's perplexity those products make more than half, with a quarter of the weights."""
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
    found = [(matrix, fine if _is_fine(matrix) else coarse) for matrix in find_matrices(graph)]
    if not found:
        raise ExportError(
            "The graph has no weights of float32 that could be rounded: products with a constant matrix, or tables, of "
            f"at least {LEAST_BYTES >> 10} kB. Export it with --weights fp32, which leaves weights as they are."
        )
    replace_matrices(graph, [(matrix, _layout(rounding)) for matrix, rounding in found])
    done, total = 0, sum(matrix.constant.nbytes for matrix, _ in found)
    with GraphFile(folder / GRAPH_NAME, DATA_NAME) as file:
        for matrix, rounding in found:
            for rows in _write(file, matrix, rounding):
                done += matrix.constant.nbytes * rows // matrix.rows
                progress(_STEP, min(done, total), total)
            graph.forget()
        file.finish(graph)
    return folder / GRAPH_NAME


def _is_fine(matrix: Matrix) -> bool:
    return bool(matrix.lookups) or matrix.columns >= _NARROWING * matrix.rows


def _layout(rounding: Rounding) -> Layout:
    return Layout(bits=rounding.bits, block_size=rounding.block_size, has_zeros=not rounding.symmetric)


def _write(file: GraphFile, matrix: Matrix, rounding: Rounding) -> Iterator[int]:
    """Round the weight and write it; after each piece its number of rows."""
    scales, zeros, begin = [], [], file.begin()
    for piece in round_rows(matrix.constant, rounding, transposed=matrix.transposed):
        file.write(piece.blobs)
        scales.append(piece.scales)
        zeros.append(piece.zeros)
        yield len(piece.blobs)
    parts: dict[str, NDArray[Any]] = {"scales": np.concatenate(scales)}
    if not rounding.symmetric:
        parts["zeros"] = np.concatenate(zeros)
    matrix.add(file, _layout(rounding), begin, **parts)
