"""How much memory the intermediate tensors of a shard take, as polynomials in the model's symbolic dimensions.

A tensor's size is a product of dimensions, each of which follows from a few symbols. So a few runs tell its polynomial
exactly, however many symbols the model has. The bytes that are alive at a node are the sum over its tensors; fitted to
the sum itself, the polynomials of several parts of a model could not be told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import prod

import numpy as np
from numpy.typing import NDArray

from pipeload.format.manifest import ByteTerm, Structure
from pipeload_export.shard.liveness import LiveTensor, live_bytes
from pipeload_export.shard.polynomials import Monomial, Polynomials

__all__ = ["fit"]

_MOST_FORMULAS = 8
_FAR = (4, 16)
"""How many times as large as in the runs the other sizes are at which formulas are compared."""


def fit(
    symbols: Sequence[str],
    points: Sequence[Mapping[str, int]],
    runs: Sequence[Sequence[LiveTensor]],
    *,
    steps: Mapping[str, int] | None = None,
) -> Structure:
    """The polynomials that bound the bytes alive.

    Args:
        symbols: the dimensions that vary.
        points: their sizes in each run.
        runs: the tensors of each run.
        steps: of dimensions that count in steps, as pixels do in patches: the step. Their sizes in the runs are
            multiples of it, or lie a constant above; between them the bound is that of the next multiple. Images have
            two such extents, and attention over their patches squares the product.
    """
    steps = steps or {}
    if len({tuple((tensor.first, tensor.last) for tensor in run) for run in runs}) > 1:
        # The runs took different ways through the graph.
        runs = [[LiveTensor(factors=(max(live_bytes(run), default=0),), first=0, last=0)] for run in runs]
    counts = [{name: -(-point[name] // steps.get(name, 1)) for name in symbols} for point in points]
    monomials, formulas = _formulas(Polynomials(symbols, counts, steps), runs)
    kept = _thinned(_undominated(formulas), _places(monomials, symbols, counts))
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


def _formulas(
    polynomials: Polynomials, runs: Sequence[Sequence[LiveTensor]]
) -> tuple[list[Monomial], list[tuple[int, ...]]]:
    """Monomials, and for each node their factors in the bytes that are alive while it works."""
    nodes = max((tensor.last + 1 for tensor in runs[0]), default=0)
    changes: dict[Monomial, NDArray[np.int64]] = {}
    for same in zip(*runs, strict=True):
        for monomial, factor in polynomials.of([tensor.factors for tensor in same]).items():
            column = changes.setdefault(monomial, np.zeros(nodes + 1, np.int64))
            column[same[0].first] += factor
            column[same[0].last + 1] -= factor
    # Without its negative terms a polynomial is larger.
    factors = [np.maximum(np.cumsum(column[:-1]), 0).tolist() for column in changes.values()]
    return list(changes), list(zip(*factors, strict=True))


def _undominated(formulas: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    kept: list[tuple[int, ...]] = []
    for one in sorted(set(formulas), reverse=True):
        # Those that are nowhere below it come before it.
        if not any(all(a <= b for a, b in zip(one, two, strict=True)) for two in kept):
            kept.append(one)
    return kept


def _places(
    monomials: Sequence[Monomial], symbols: Sequence[str], counts: Sequence[Mapping[str, int]]
) -> NDArray[np.float64]:
    """The monomials at the sizes of the runs, and at larger ones, of all symbols together and of each alone."""
    scales = [{}, *(dict.fromkeys(names, far) for names in (symbols, *([name] for name in symbols)) for far in _FAR)]
    return np.array(
        [
            [float(prod(point[name] * scale.get(name, 1) for name in monomial)) for monomial in monomials]
            for scale in scales
            for point in counts
        ]
    )


def _thinned(formulas: list[tuple[int, ...]], places: NDArray[np.float64]) -> list[tuple[int, ...]]:
    """At most `_MOST_FORMULAS`: two are replaced by one above both, those first where the bound grows the least."""
    if len(formulas) <= _MOST_FORMULAS:
        return formulas
    kept = np.array(formulas, float)
    bound = np.maximum((kept @ places.T).max(axis=0), 1)
    while len(kept) > _MOST_FORMULAS:
        pairs = np.array(list(combinations(range(len(kept)), 2)))
        joined = np.maximum(kept[pairs[:, 0]], kept[pairs[:, 1]])
        growth = (joined @ places.T / bound).max(axis=1)
        best = int(growth.argmin())
        kept = np.vstack([np.delete(kept, pairs[best], axis=0), joined[best]])
    return [tuple(int(factor) for factor in formula) for formula in kept]
