"""Symbolic dimensions: sizes of sums of symbols, and symbols solved from the shapes of arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from pipeload.errors import ConfigError
from pipeload.format.records import TensorSpec

__all__ = ["MOST_PARTS", "bind_dims", "evaluate_dim", "match_dims", "parts", "symbols"]

MOST_PARTS = 16
"""The most symbols and numbers of a dimension that is a sum of them."""


def evaluate_dim(dim: int | str, dims: Mapping[str, int]) -> int:
    """The size of a dimension, given the sizes of the symbols. Raises KeyError for an unbound symbol."""
    if isinstance(dim, int):
        return dim
    names, constant = _terms(dim)
    return sum([dims[name] for name in names], constant)


def bind_dims(specs: Iterable[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of all symbolic dimensions, from the shapes of the caller's arrays.

    A symbol that occurs only inside a sum is solved from it; contradictions are an error.

    Raises:
        ConfigError: a rank or size does not fit; all faults at once.
    """
    dims, faults = match_dims(specs, shapes)
    if faults:
        raise ConfigError("The inputs do not fit the model: " + "; ".join(faults) + ".")
    return dims


def match_dims(
    specs: Iterable[TensorSpec], shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, int] | None = None
) -> tuple[dict[str, int], list[str]]:
    """As `bind_dims`, but returns the faults instead of raising them; `known` holds the sizes given beforehand."""
    specs = [spec for spec in specs if spec.name in shapes]
    faults = [
        f"'{s.name}' has {len(shapes[s.name])} dimensions {shapes[s.name]}, the model takes {len(s.shape)} {s.shape}"
        for s in specs
        if len(s.shape) != len(shapes[s.name])
    ]
    pairs = [
        (spec, dim, size)
        for spec in specs
        if len(spec.shape) == len(shapes[spec.name])
        for dim, size in zip(spec.shape, shapes[spec.name], strict=True)
    ]
    dims: dict[str, int] = dict(known or {})
    for _, dim, size in pairs:
        if isinstance(dim, str) and _terms(dim) == ((dim,), 0):
            dims.setdefault(dim, size)
    solved = True
    while solved:
        solved = False
        for _, dim, size in pairs:
            if isinstance(dim, str) and len(unbound := set(symbols(dim)) - dims.keys()) == 1:
                symbol = unbound.pop()
                rest = size - evaluate_dim(dim, {**dims, symbol: 0})
                # Where no size fits, the comparison below finds the contradiction.
                dims[symbol] = max(0, rest // symbols(dim).count(symbol))
                solved = True
    for spec, dim, size in pairs:
        try:
            wanted = evaluate_dim(dim, dims)
        except KeyError:
            continue
        if wanted != size:
            faults.append(
                f"'{spec.name}' has size {size} where the model takes {dim}"
                + ("" if isinstance(dim, int) else f" = {wanted}")
            )
    return dims, faults


def symbols(dim: int | str) -> list[str]:
    """The symbols in a dimension: none for an int, several for a sum."""
    return [] if isinstance(dim, int) else list(_terms(dim)[0])


def parts(dim: str) -> list[str]:
    """The symbols and numbers whose sum is the dimension."""
    return [part.strip() for part in dim.split("+")]


@lru_cache(maxsize=1024)
def _terms(dim: str) -> tuple[tuple[str, ...], int]:
    """The symbols in a sum, and the total of its numbers. Each pass asks for those of every cache."""
    found = parts(dim)
    return tuple(part for part in found if not part.isdecimal()), sum(int(part) for part in found if part.isdecimal())
