"""Sizes at which the shards of a model may be run.

Which sizes go together is not written in a graph. Where the shards refuse independent ones, other plans are tried:
images of whole patches, symbols that are the sum of two others, as a length of cache and text together is, and masks
that hide nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from math import prod

import numpy as np

from pipeload.format.manifest import TensorSpec, symbols
from pipeload_export.graph.graph import Graph, attribute
from pipeload_export.shard.alignment import aligned

__all__ = ["Plan", "plans", "symbols_of"]

_SIZES = ((1, 2, 3), (4, 6, 9), (2, 5, 7), (3, 8, 10))
"""Sizes of the first, second ... symbol; three of each determine a polynomial of degree two."""
_EDGE_SIZES = (1, 3, 4)
"""Sizes for kernels that take some dimensions only where another is one. Never zero, on which kernels may crash."""
_MOST_POINTS = 30
_MOST_GRID = 10_000
"""Combinations of sizes that are listed; a graph that names no dimension of its caches has more than memory holds."""
_MOST_PATCHES = 64
_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
"""Operators that take images first -> the place of their weights."""
_POINTWISE = frozenset(
    {"Add", "Cast", "DequantizeLinear", "Div", "DynamicQuantizeLinear", "Mul", "QuantizeLinear", "Sub"}
)
"""Operators that images may pass on their way there, as their first input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the sizes of symbols are chosen.

    Attributes:
        fixed: symbols that have one size.
        sizes: symbols that have other sizes than usual.
        sums: symbols that are the sum of others.
        ones: integers are ones; otherwise zeros and ones.
        declared: outputs must have the shapes that the graph declares.
        partial: sizes that a shard refuses are left out, as long as most remain.
        wider: a plan that covers more, to be tried where this one works.
    """

    fixed: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sums: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ones: bool = False
    declared: bool = False
    partial: bool = False
    wider: Plan | None = None

    def points(self, names: Sequence[str]) -> list[dict[str, int]]:
        """Sizes of all symbols, for each run."""
        free = [name for name in names if name not in self.fixed and name not in self.sums]
        choices = [self.sizes.get(name, _SIZES[place % len(_SIZES)]) for place, name in enumerate(free)]
        random = np.random.default_rng(0)
        if prod(map(len, choices)) > _MOST_GRID:
            grid = [tuple(int(random.choice(sizes)) for sizes in choices) for _ in range(_MOST_POINTS)]
        else:
            grid = list(product(*choices))
        if len(grid) > _MOST_POINTS:
            grid = [grid[place] for place in sorted(random.choice(len(grid), _MOST_POINTS, replace=False))]
        points = []
        for sizes in grid:
            point = dict(self.fixed) | dict(zip(free, sizes, strict=True))
            points.append(point | {name: sum(point[part] for part in parts) for name, parts in self.sums.items()})
        return points


def plans(graph: Graph, specs: Sequence[TensorSpec]) -> Iterator[Plan]:
    """Plans to try where independent sizes fail, the likely ones first."""
    names = symbols_of(specs)
    for channels, strides in _images(graph, {spec.name: spec for spec in specs}):
        for patches in range(1, _MOST_PATCHES + 1):
            extents = {name: stride * patches for name, stride in strides.items()}
            sizes = {name: (size, size + 2 * strides[name], size + 3 * strides[name]) for name, size in extents.items()}
            yield Plan(fixed={**channels, **extents}, wider=Plan(fixed=channels, sizes=sizes))
    for sums, ones in product(aligned(specs), (False, True)):
        yield Plan(sums=sums, ones=ones)
    edge = dict.fromkeys(names, _EDGE_SIZES)
    # A symbol that equals another is less likely than one that is the sum of two.
    for declared, parts, partial, ones in product((True, False), (2, 1), (False, True), (False, True)):
        for sums in _relations(names, parts):
            yield Plan(sums=sums, ones=ones, partial=partial, sizes=edge if partial else {}, declared=declared)


def symbols_of(specs: Sequence[TensorSpec]) -> list[str]:
    """All symbols in the shapes, in the order of their first use."""
    return list(dict.fromkeys(name for spec in specs for dim in spec.shape for name in symbols(dim)))


def _relations(names: Sequence[str], count: int) -> Iterator[dict[str, tuple[str, ...]]]:
    """No relation, then each symbol as the sum of `count` others."""
    yield {}
    for name in names:
        for parts in combinations([other for other in names if other != name], count):
            yield {name: parts}


def _images(graph: Graph, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """For each input that a convolution takes: its channels, and the steps in which its extents may grow."""
    makers = graph.producers()
    for node in graph.nodes:
        if node.op_type not in _CONVOLUTIONS:
            continue
        image = node.input[0]
        while image not in specs and image in makers and makers[image].op_type in _POINTWISE:
            image = makers[image].input[0]
        spec = specs.get(image)
        weight = graph.types.get(node.input[_CONVOLUTIONS[node.op_type]], (0, None))[1] if spec else None
        if spec is None or weight is None or not isinstance(weight[1], int):
            continue
        strides = attribute(node, "strides", [1] * (len(spec.shape) - 2))
        channels = weight[1] * attribute(node, "group", 1)
        extents = zip(spec.shape[2:], strides, strict=True)
        yield (
            {spec.shape[1]: channels} if isinstance(spec.shape[1], str) else {},
            {name: stride for name, stride in extents if isinstance(name, str)},
        )
