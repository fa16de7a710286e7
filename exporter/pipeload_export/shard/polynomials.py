"""Polynomials of sizes that were seen in runs, in the symbolic dimensions that the runs varied."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations, islice
from math import prod

import numpy as np
from numpy.typing import NDArray

__all__ = ["Monomial", "Polynomial", "Polynomials"]

Monomial = tuple[str, ...]
"""The product of the named symbols; a name may occur twice, none means one."""
Polynomial = dict[Monomial, int]
"""Monomial -> its factor."""

_DEGREE = 2
_TOTAL_DEGREE = 3
_MOST_CHOICES = 10_000
"""Sets of symbols that are tried, where a graph names each dimension of each of its caches."""


class Polynomials:
    """The sizes of tensors as polynomials.

    Args:
        symbols: the dimensions that vary.
        points: their sizes in each run.
        extents: those of them that are heights, widths and the like, whose products are squared.
    """

    def __init__(
        self, symbols: Sequence[str], points: Sequence[Mapping[str, int]], extents: Collection[str] = ()
    ) -> None:
        self._symbols = symbols
        self._points = points
        self._extents = frozenset(extents)
        self._exact: dict[tuple[int, ...], Polynomial | None] = {}
        self._values: dict[tuple[tuple[str, ...], int], tuple[list[Monomial], NDArray[np.float64]]] = {}

    def of(self, sizes: Sequence[tuple[int, ...]]) -> Polynomial:
        """The product of a tensor's dimensions: exact where it is a polynomial, else one above it.

        Args:
            sizes: the dimensions in each run.
        """
        if len({len(dims) for dims in sizes}) > 1:
            sizes = [(prod(dims),) for dims in sizes]
        result: Polynomial = {(): 1}
        rest = (1,) * len(sizes)
        for dim in zip(*sizes, strict=True):
            found = self._find(dim) if len(set(dim)) > 1 else None
            if found:
                result = self._product(result, found)
            else:
                rest = tuple(a * b for a, b in zip(rest, dim, strict=True))
        return self._product(result, self._find(rest) or self._above(rest))

    def _product(self, one: Polynomial, other: Polynomial) -> Polynomial:
        result: Polynomial = {}
        for names, factor in one.items():
            for more, times in other.items():
                monomial = tuple(sorted((*names, *more), key=self._symbols.index))
                result[monomial] = result.get(monomial, 0) + factor * times
        return result

    def _find(self, sizes: tuple[int, ...]) -> Polynomial | None:
        """The polynomial of the fewest symbols and lowest powers that has these values in the runs, if there is one."""
        if sizes not in self._exact:
            chosen = self._symbols_of(sizes)
            self._exact[sizes] = None
            for power in range(1, _DEGREE + 1):
                monomials, values = self._independent(chosen, power)
                factors = np.rint(np.linalg.lstsq(values, np.array(sizes, float), rcond=None)[0])
                if (values @ factors == np.array(sizes, float)).all():
                    self._exact[sizes] = {m: int(f) for m, f in zip(monomials, factors, strict=True) if f}
                    break
        return self._exact[sizes]

    def _above(self, sizes: tuple[int, ...]) -> Polynomial:
        """Whole factors, none negative, of a polynomial that is close to the sizes and nowhere below them."""
        monomials, values = self._independent(self._symbols_of(sizes), _DEGREE)
        wanted = np.array(sizes, float)
        scale = 1 / np.maximum(wanted, 1)
        factors = _not_negative(values * scale[:, None], wanted * scale)
        # A factor below half a byte is noise, which a product of large sizes would make gigabytes of; but not the one
        # that most of the sizes comes from.
        is_noise = factors < 0.5
        is_noise[((values * scale[:, None]).sum(axis=0) * factors).argmax()] = False
        factors = np.where(is_noise, 0, factors)
        made = values @ factors
        ratio = float(np.max(wanted[made > 0] / made[made > 0], initial=1))
        return {m: int(f) for m, f in zip(monomials, np.ceil(factors * ratio), strict=True) if f}

    def _symbols_of(self, sizes: tuple[int, ...]) -> tuple[str, ...]:
        """The fewest symbols whose sizes tell this one.

        More symbols than it depends on would leave a choice, and then nothing is known of other sizes.
        """
        choices = (names for count in range(len(self._symbols)) for names in combinations(self._symbols, count))
        for chosen in islice(choices, _MOST_CHOICES):
            seen: dict[tuple[int, ...], int] = {}
            known = (
                (tuple(point[name] for name in chosen), size) for point, size in zip(self._points, sizes, strict=True)
            )
            # Sizes that are all different would tell anything.
            if all(seen.setdefault(key, size) == size for key, size in known) and len(seen) < len(sizes):
                return chosen
        return tuple(self._symbols)

    def _monomials(self, symbols: Sequence[str], power: int) -> Iterator[Monomial]:
        most = len(symbols) * power if self._extents.intersection(symbols) else min(_TOTAL_DEGREE, len(symbols) * power)
        made: list[Monomial] = [()]
        for _ in range(most + 1):
            yield from made
            made = [
                (*names, name)
                for names in made
                for name in symbols[symbols.index(names[-1]) if names else 0 :]
                if names.count(name) < power
            ]

    def _independent(self, symbols: tuple[str, ...], power: int) -> tuple[list[Monomial], NDArray[np.float64]]:
        """As many monomials as the points can tell apart, and their values at the points.

        Where the points leave a choice, products come before their parts, so that the bound is rather too high: bytes
        seen only where one of two dimensions was one count for their product. Squares come last.
        """
        if (symbols, power) not in self._values:
            kept: list[Monomial] = []
            columns: list[list[float]] = []
            monomials = self._monomials(symbols, power)
            for monomial in sorted(monomials, key=lambda m: (max(map(m.count, m), default=0) > 1, -len(m))):
                if len(kept) == len(self._points):
                    break
                column = [float(prod(point[symbol] for symbol in monomial)) for point in self._points]
                if np.linalg.matrix_rank(np.array([*columns, column])) > len(columns):
                    kept.append(monomial)
                    columns.append(column)
            self._values[symbols, power] = kept, np.array(columns).T
        return self._values[symbols, power]


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
