"""How much memory the intermediate tensors of a shard take, as polynomials in the model's symbolic dimensions.

A shard's profile says which nodes ran, in which order, and how large their outputs were. A walk over them that frees
each tensor after its last use gives the bytes that are alive at each node. Over several runs these are exact
polynomials in the sizes of the dimensions, because every tensor's size is a product of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, combinations_with_replacement
from math import prod

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from pipeload.format.manifest import ByteTerm, Structure
from pipeload_export.graph.graph import attribute
from pipeload_export.shard.trial import Event

__all__ = ["fit", "live_bytes"]

_DEGREE = 2
_TOTAL_DEGREE = 3
_MOST_FORMULAS = 8
_ALIASES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
"""Operators whose output is their input's memory, where that is the session's own."""
_WIDEST = 4
"""Bytes of an element of a large selection; only shape arithmetic selects wider ones."""
_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})


def live_bytes(model: ModelProto, events: Sequence[Event], shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Bytes that are alive while each node of a run works: tensors that are still needed, and its outputs.

    Args:
        model: the shard's graph.
        events: one run of it.
        shapes: of the tensors that the shard takes and makes, in this run.
    """
    nodes = model.graph.node
    if any(a.type in (a.GRAPH, a.GRAPHS) for node in nodes for a in node.attribute):
        # Nodes of branches and loops cannot be told from those around them: as if nothing were ever freed.
        return [sum(sum(event.output_bytes) for event in events)]
    outputs = {value.name for value in model.graph.output}
    last_use: dict[str, int] = {}
    for place, event in enumerate(events):
        if event.node < len(nodes):
            last_use.update(dict.fromkeys(nodes[event.node].input, place))
    owner: dict[str, str] = {}
    known = dict(shapes)
    alive: dict[str, int] = {}
    result = []
    for place, event in enumerate(events):
        if event.node >= len(nodes):
            # A cast that the session adds for itself; the node that wanted it comes next.
            alive[f"cast for {place + 1}"] = sum(event.output_bytes)
            last_use[f"cast for {place + 1}"] = place + 1
            result.append(sum(alive.values()))
            continue
        node = nodes[event.node]
        made = zip(filter(None, node.output), event.output_bytes, event.output_shapes, strict=False)
        for name, nbytes, shape in made:
            known[name] = shape
            source = owner.get(node.input[0]) if node.op_type in _ALIASES else None
            if source and name not in outputs and source not in outputs:
                owner[name] = source
                last_use[source] = max(last_use.get(source, place), last_use.get(name, place))
            else:
                owner[name] = name
                # A cache is written where it lies, and counted as one.
                alive[name] = 0 if node.op_type == "TensorScatter" and name in outputs else nbytes
        result.append(sum(alive.values()) + _scratch_bytes(node, known))
        for name in [name for name in alive if name not in outputs and last_use.get(name, place) <= place]:
            del alive[name]
    return result


def _scratch_bytes(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Memory that a kernel takes for itself while it works, at most.

    Found by measuring kernels of onnxruntime 1.31 one by one; those that are not listed take none.
    """
    made = _elements(shapes, node.output[:1])
    kind = node.op_type
    if kind in _ATTENTION:
        tensors = [shapes[name] for name in (*node.input, *node.output) if len(shapes.get(name, ())) >= 3]
        batch, length = shapes[node.output[0]][0], shapes[node.output[0]][-2]
        heads = attribute(node, "num_heads", 0) or attribute(node, "q_num_heads", 1)
        scores: int = batch * heads * length * max(shape[-2] for shape in tensors)
        return 4 * (3 * _elements(shapes, node.input) + scores)
    if kind == "Where":
        return 2 * _WIDEST * made
    if kind == "Softmax" and attribute(node, "axis", -1) not in (-1, len(shapes.get(node.output[0], ())) - 1):
        return 2 * 4 * made
    if kind == "BiasGelu" or (kind == "FastGelu" and len(node.input) > 1):
        return 4 * made
    if kind == "Einsum":
        return 4 * (made + _elements(shapes, node.input))
    if kind == "Conv" and node.input[0] in shapes:
        # One image at a time is unfolded: for each position of the output, all that it depends on.
        kernel: list[int] = attribute(node, "kernel_shape", [1])
        return 4 * prod(shapes[node.output[0]][2:]) * shapes[node.input[0]][1] * prod(kernel)
    if kind in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
        return _elements(shapes, node.input[:1])
    if kind == "MatMulNBits":
        # Without prepacking, all of the weight is decompressed.
        columns, rows = int(attribute(node, "N")), int(attribute(node, "K"))
        return 4 * columns * rows + 2 * _elements(shapes, node.input[:1])
    return 0


def _elements(shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> int:
    return sum(prod(shapes[name]) for name in names if name in shapes)


def fit(
    symbols: Sequence[str],
    points: Sequence[Mapping[str, int]],
    table: NDArray[np.int64],
    *,
    steps: Mapping[str, int] | None = None,
) -> Structure:
    """The polynomials that bound the bytes alive.

    Args:
        symbols: the dimensions that vary.
        points: their sizes in each run.
        table: bytes alive, of shape [runs, nodes].
        steps: of dimensions that count in steps, as pixels do in patches: the step. Their sizes in the runs are
            multiples of it, or lie a constant above; between them the bound is that of the next multiple. Images have
            two such extents, and attention over their patches squares the product.
    """
    steps = steps or {}
    counts = [{name: -(-point[name] // steps.get(name, 1)) for name in symbols} for point in points]
    monomials, matrix, solved = _solved(symbols, counts, table, steps)
    formulas: set[tuple[int, ...]] = set()
    for column in range(table.shape[1]):
        factors = np.rint(solved[:, column])
        if (matrix @ factors != table[:, column]).any():
            factors = _above(matrix, table[:, column])
        # Without its negative terms a polynomial is larger.
        formulas.add(tuple(int(f) for f in np.maximum(factors, 0)))
    kept = _thinned(_undominated(formulas), _far(matrix, monomials))
    return Structure(
        activations=tuple(
            tuple(
                ByteTerm(
                    nbytes=f, dims=m, steps=tuple(steps.get(name, 1) for name in m) if steps.keys() & set(m) else ()
                )
                for f, m in zip(formula, monomials, strict=True)
                if f
            )
            for formula in kept
        )
    )


def _solved(
    symbols: Sequence[str],
    counts: Sequence[Mapping[str, int]],
    table: NDArray[np.int64],
    steps: Mapping[str, int],
) -> tuple[list[tuple[str, ...]], NDArray[np.float64], NDArray[np.float64]]:
    """Monomials of as few symbols as explain the bytes, their values in the runs, and the factors of each column.

    More symbols than a shard depends on would leave a choice, and then nothing is known of other sizes.
    """
    for chosen in (names for size in range(len(symbols) + 1) for names in combinations(symbols, size)):
        monomials = _monomials(chosen, high=not steps.keys().isdisjoint(chosen))
        is_all = len(chosen) == len(symbols)
        if len(monomials) > len(counts) and not is_all:
            continue
        monomials, matrix = _independent(monomials, counts)
        solved: NDArray[np.float64] = np.linalg.lstsq(matrix, table.astype(float), rcond=None)[0]
        if is_all or (matrix @ np.rint(solved) == table).all():
            return monomials, matrix, solved
    raise AssertionError("all symbols are the last choice")


def _above(matrix: NDArray[np.float64], wanted: NDArray[np.int64]) -> NDArray[np.float64]:
    """Whole factors, none negative, of a polynomial that is close to the bytes seen and nowhere below them."""
    scale = 1 / np.maximum(wanted, 1)
    factors = _not_negative(matrix * scale[:, None], wanted * scale)
    # A factor below half a byte is noise, which a product of large sizes would make gigabytes of.
    factors = np.where(factors < 0.5, 0, factors)
    ratio = float(np.max(wanted / np.maximum(matrix @ factors, 1), initial=1))
    return np.ceil(factors * ratio)


def _not_negative(matrix: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares without negative factors (Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23)."""
    norms = np.linalg.norm(matrix, axis=0)
    matrix = matrix / norms
    factors: NDArray[np.float64] = np.zeros(matrix.shape[1])
    free = np.zeros(matrix.shape[1], bool)
    for _ in range(3 * matrix.shape[1]):
        slope = np.where(free, -np.inf, matrix.T @ (wanted - matrix @ factors))
        if slope.max() <= 1e-9:
            break
        free[slope.argmax()] = True
        while True:
            best: NDArray[np.float64] = np.zeros_like(factors)
            best[free] = np.linalg.lstsq(matrix[:, free], wanted, rcond=None)[0]
            low = free & (best <= 0)
            if not low.any():
                break
            share = float(np.min(factors[low] / np.maximum(factors[low] - best[low], 1e-300)))
            factors = factors + share * (best - factors)
            free &= factors > 1e-12
            factors[~free] = 0
        factors = best
    result: NDArray[np.float64] = factors / norms
    return result


def _monomials(symbols: Sequence[str], *, high: bool) -> list[tuple[str, ...]]:
    most = _DEGREE * len(symbols) if high else min(_TOTAL_DEGREE, _DEGREE * len(symbols))
    result = []
    for degree in range(most + 1):
        for names in combinations_with_replacement(symbols, degree):
            if all(names.count(name) <= _DEGREE for name in names):
                result.append(names)
    return result


def _independent(
    monomials: Sequence[tuple[str, ...]], points: Sequence[Mapping[str, int]]
) -> tuple[list[tuple[str, ...]], NDArray[np.float64]]:
    """As many of the monomials as the points can tell apart, and their values at the points.

    Where the points leave a choice, products come before their parts, so that the bound is rather too high: bytes
    seen only where one of two dimensions was one count for their product. Squares come last.
    """
    kept: list[tuple[str, ...]] = []
    columns: list[list[float]] = []
    for monomial in sorted(monomials, key=lambda m: (max(map(m.count, m), default=0) > 1, -len(m))):
        column = [float(prod(point[symbol] for symbol in monomial)) for point in points]
        if np.linalg.matrix_rank(np.array([*columns, column])) > len(columns):
            kept.append(monomial)
            columns.append(column)
    return kept, np.array(columns).T


def _undominated(formulas: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [
        one
        for one in sorted(formulas, reverse=True)
        if not any(one != two and all(a <= b for a, b in zip(one, two, strict=True)) for two in formulas)
    ]


def _far(matrix: NDArray[np.float64], monomials: Sequence[tuple[str, ...]]) -> NDArray[np.float64]:
    """The monomials at the sizes of the runs, and at sizes four and sixteen times as large."""
    degrees = np.array([len(monomial) for monomial in monomials])
    return np.concatenate([matrix * factor**degrees for factor in (1.0, 4.0, 16.0)])


def _thinned(formulas: list[tuple[int, ...]], places: NDArray[np.float64]) -> list[tuple[int, ...]]:
    """At most `_MOST_FORMULAS`: two are replaced by one above both, those first where the bound grows the least."""
    kept = np.array(formulas, float)
    values = kept @ places.T
    bound = np.maximum(values.max(axis=0), 1)
    while len(kept) > _MOST_FORMULAS:
        pairs = np.array(list(combinations(range(len(kept)), 2)))
        joined = np.maximum(kept[pairs[:, 0]], kept[pairs[:, 1]])
        growth = (joined @ places.T / bound).max(axis=1)
        best = int(growth.argmin())
        kept = np.vstack([np.delete(kept, pairs[best], axis=0), joined[best]])
    return [tuple(int(factor) for factor in formula) for formula in kept]
