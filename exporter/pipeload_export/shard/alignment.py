"""Which sizes of a model's inputs belong together, where the graph gives each a name of its own, or none.

```
input_ids       [input_ids.0,      input_ids.1]        ->  [a, b]
attention_mask  [attention_mask.0, attention_mask.1]       [a, b + c]
past.0.key      [past.0.key.0, 4,  past.0.key.2, 64]       [a, 4, c, 64]
past.0.value    [past.0.value.0, 4, past.0.value.2, 64]    [a, 4, c, 64]
```
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod

import numpy as np

from pipeload.format.dims import parts
from pipeload.format.manifest import ByteTerm, Structure, TensorSpec, symbols

__all__ = ["Sums", "aligned", "related_inputs", "related_structure"]

Sums = Mapping[str, tuple[str, ...]]
"""Symbol -> the symbols whose sum it is."""


def aligned(specs: Sequence[TensorSpec]) -> Iterator[Sums]:
    """Relations between the sizes of a model's inputs, the likely one first.

    Inputs of one type and rank have equal sizes, all of one batch. Then, where there are caches, one mask covers cache
    and text together.
    """
    firsts: dict[tuple[object, ...], str] = {}
    equal: dict[str, tuple[str, ...]] = {}
    places: dict[str, tuple[object, ...]] = {}
    for spec in specs:
        for axis, dim in enumerate(spec.shape):
            if not isinstance(dim, str) or dim in places or len(symbols(dim)) > 1:
                continue
            kind = (len(spec.shape), np.dtype(spec.dtype).kind) if axis else ()
            places[dim] = (*kind, axis)
            first = firsts.setdefault(places[dim], dim)
            if first != dim:
                equal[dim] = (first,)
    if equal:
        yield equal
    text, past = firsts.get((2, "i", 1)), firsts.get((4, "f", 2))
    for name, place in places.items():
        if text and past and place == (2, "i", 1) and name != text:
            yield {**equal, name: (text, past)}


def related_inputs(specs: Sequence[TensorSpec], sums: Sums, fixed: Mapping[str, int]) -> tuple[TensorSpec, ...]:
    """The inputs without the symbols that are sums of others or have one size."""
    return tuple(replace(spec, shape=tuple(_related(dim, sums, fixed) for dim in spec.shape)) for spec in specs)


def _related(dim: int | str, sums: Sums, fixed: Mapping[str, int]) -> int | str:
    if isinstance(dim, int):
        return dim
    terms = [int(term) if term.isdecimal() else fixed.get(term, term) for term in sums.get(dim, parts(dim))]
    names, size = [term for term in terms if isinstance(term, str)], sum(t for t in terms if isinstance(t, int))
    return " + ".join([*names, *([str(size)] if size else [])]) if names else size


def related_structure(structure: Structure, sums: Sums, fixed: Mapping[str, int]) -> Structure:
    """The same bytes, in terms of the symbols that `related_inputs` leaves."""
    return replace(structure, activations=tuple(_expanded(formula, sums, fixed) for formula in structure.activations))


def _expanded(formula: Sequence[ByteTerm], sums: Sums, fixed: Mapping[str, int]) -> tuple[ByteTerm, ...]:
    terms = (
        replace(term, dims=dims) for term in formula for dims in product(*(sums.get(dim, (dim,)) for dim in term.dims))
    )
    return tuple(_at(term, fixed) for term in terms)


def _at(term: ByteTerm, fixed: Mapping[str, int]) -> ByteTerm:
    """The term where some of its symbols have one size; it may be of a run in which they still had more."""
    pairs = list(zip(term.dims, term.steps or (1,) * len(term.dims), strict=True))
    known, free = ([pair for pair in pairs if (pair[0] in fixed) is wanted] for wanted in (True, False))
    return replace(
        term,
        nbytes=term.nbytes * prod(-(-fixed[dim] // step) for dim, step in known),
        dims=tuple(dim for dim, _ in free),
        steps=tuple(step for _, step in free) if term.steps else (),
    )
