"""Sizes at which the shards of a model may be run.

Which sizes go together is not written in a graph. Images and sounds get whole patches and frames, as the graph's
convolutions make them, or the sizes that the model's publisher names. Where the shards refuse independent sizes, other
plans are tried: symbols that are the sum of two others, as a length of cache and text together is, masks
that hide nothing, and texts that end with the id that the graph looks for. Where images of independent heights and
widths are refused, one edge keeps a size and the other is free, as in a reader of lines of text; then both have one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from math import prod

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from pipeload.format.manifest import TensorSpec, symbols
from pipeload_export.graph.graph import Constant, Graph, attribute
from pipeload_export.shard.alignment import Sums, aligned
from pipeload_export.shard.extents import Extent, find_extents
from pipeload_export.shard.published import Published

__all__ = ["Plan", "plans", "sought_ids", "symbols_of", "traced"]

_SIZES = ((1, 2, 3), (4, 6, 9), (2, 5, 7), (3, 8, 10))
"""Sizes of the first, second ... symbol; three of each determine a polynomial of degree two."""
_EDGE_SIZES = (1, 3, 4)
"""Sizes for kernels that take some dimensions only where another is one. Never zero, on which kernels may crash."""
_MOST_POINTS = 30
_MOST_GRID = 10_000
"""Combinations of sizes that are listed; a graph that names no dimension of its caches has more than memory holds."""
_COUNTS = ((1, 2, 3), (2, 4, 6), (5, 6, 7))
"""Patches along an edge of an image."""
_FRAMES = ((25, 50, 75),)
"""Frames of a sound: models of it have several layers of convolutions, which leave nothing of a short one."""
_MOST_PATCHES = 64
_MOST_PATCHES_OF_ONE_EDGE = 16
"""Likewise, along one edge while the other is free: the height of a line of text, or the bands of a sound."""
_TRACED_BATCH, _TRACED_LENGTH = 2, 16
_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
"""Operators that take images first -> the place of their weights."""
_PASSED_ON = frozenset(
    {"Add", "Cast", "DequantizeLinear", "Div", "DynamicQuantizeLinear", "Mul", "Pad", "QuantizeLinear", "Sub"}
)
"""Operators that images may pass on their way there, as their first input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the sizes of symbols are chosen.

    Attributes:
        fixed: symbols that have one size, which the manifest gives in their place.
        sizes: symbols that have other sizes than usual.
        sums: symbols that are the sum of others.
        ones: integers are ones; otherwise zeros and ones.
        declared: outputs must have the shapes that the graph declares.
        partial: sizes that a shard refuses are left out, as long as most remain.
        ends: of inputs whose texts end with an id that the graph looks for: the id.
        steps: of symbols whose sizes come in steps, the pixels of a patch or the samples of a frame.
    """

    fixed: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sums: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ones: bool = False
    declared: bool = False
    partial: bool = False
    ends: Mapping[str, int] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)

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


def plans(graph: Graph, specs: Sequence[TensorSpec], published: Published) -> Iterator[Plan]:
    """Plans to try one after another, the likely ones first."""
    if extents := _symbolic_extents(graph, specs):
        yield from _plans_of_extents(graph, specs, published, extents)
        return
    # Of images whose height and width are fixed.
    channels = _channels(graph, specs)
    names = [name for name in symbols_of(specs) if name not in channels]
    yield Plan(fixed=channels)
    if ends := sought_ids(graph.nodes, {spec.name for spec in specs}, graph.constants):
        yield Plan(fixed=channels, ends=ends)
    for sums, ones in product(aligned(specs), (False, True)):
        yield Plan(fixed=channels, sums=sums, ones=ones)
    edge = dict.fromkeys(names, _EDGE_SIZES)
    # A symbol that equals another is less likely than one that is the sum of two.
    for declared, parts, partial, ones in product((True, False), (2, 1), (False, True), (False, True)):
        sizes = edge if partial else {}
        for sums in _relations(names, parts):
            yield Plan(fixed=channels, sums=sums, ones=ones, partial=partial, sizes=sizes, declared=declared)


def _plans_of_extents(
    graph: Graph, specs: Sequence[TensorSpec], published: Published, extents: Mapping[str, Extent]
) -> Iterator[Plan]:
    """Plans for a model of images or sounds."""
    channels = _channels(graph, specs)
    largest = max(extent.step for extent in extents.values())
    is_image = any(len(spec.shape) == 4 and extents.keys() & set(spec.shape) for spec in specs)
    edges = _edges(specs, extents)
    counts = list(_COUNTS if is_image else _FRAMES)
    for height, width in published.images if is_image else ():
        fewest = min(height // largest, width // largest)
        if fewest > 1:
            counts.append((fewest - 1, fewest, fewest + 1))
    # Other sizes than those of images and sounds may belong together as well, such as those of texts beside them.
    others = [
        {},
        *({n: parts for n, parts in sums.items() if n not in {*extents, *channels}} for sums in aligned(specs)),
    ]
    relations: list[Sums] = [sums for place, sums in enumerate(others) if sums or not place]
    for chosen, sums in product(dict.fromkeys(counts), relations):
        yield _counted(dict.fromkeys(extents, chosen), extents, fixed=channels, sums=sums)
    if not published.images:
        yield from _plans_of_counts(extents, channels)
    for pair, sums in product(published.images if is_image else (), relations):
        one = {name: pair[place] for name, place in edges.items()}
        for kept, chosen in product(one, dict.fromkeys(counts)) if len(one) > 1 else ():
            free = {name: chosen for name in one if name != kept}
            yield _counted(free, extents, fixed=channels | {kept: one[kept]}, sums=sums)
        yield Plan(fixed=channels | one, sums=sums)


def _plans_of_counts(extents: Mapping[str, Extent], channels: Mapping[str, int]) -> Iterator[Plan]:
    """Plans for a model that takes one number of patches along an edge, or its multiples, which no file names."""
    free = _COUNTS[0]
    # One patch comes last: a table of any number of positions fits it, whose rows are then all added to it.
    for kept, patches in product(extents if len(extents) > 1 else (), (*range(2, _MOST_PATCHES_OF_ONE_EDGE + 1), 1)):
        others = {name: free for name in extents if name != kept}
        if patches > 1:
            yield _counted({**others, kept: [patches * count for count in free]}, extents, fixed=channels)
        yield _counted(others, extents, fixed={**channels, kept: extents[kept].size(patches)})
    # Along both edges it comes first, before images that take gigabytes, but says nothing of other sizes.
    yield _counted(dict.fromkeys(extents, (1,)), extents, fixed=channels)
    for patches in range(2, _MOST_PATCHES + 1):
        yield _counted(dict.fromkeys(extents, tuple(patches * count for count in free)), extents, fixed=channels)
        yield Plan(fixed={**channels, **{name: extent.size(patches) for name, extent in extents.items()}})


def _counted(
    counts: Mapping[str, Sequence[int]],
    extents: Mapping[str, Extent],
    *,
    fixed: Mapping[str, int],
    sums: Sums | None = None,
) -> Plan:
    """The plan in which symbols make these numbers of positions."""
    return Plan(
        fixed=fixed,
        sizes={name: tuple(map(extents[name].size, chosen)) for name, chosen in counts.items()},
        steps={name: extents[name].step for name in counts},
        sums=sums or {},
    )


def _symbolic_extents(graph: Graph, specs: Sequence[TensorSpec]) -> dict[str, Extent]:
    """Symbol -> the steps in which it makes positions, for symbols that convolutions take."""
    shapes = {spec.name: spec.shape for spec in specs}
    found = find_extents(graph.nodes, specs, lambda name: graph.types.get(name, (0, None))[1])
    named = ((shapes[name][axis], extent) for (name, axis), extent in found.items())
    return {dim: extent for dim, extent in named if isinstance(dim, str)}


def _edges(specs: Sequence[TensorSpec], extents: Mapping[str, Extent]) -> dict[str, int]:
    """Symbol -> 0 for the height of an image, 1 for its width."""
    return {
        dim: place
        for spec in specs
        if len(spec.shape) >= 2
        for place, dim in enumerate(spec.shape[-2:])
        if isinstance(dim, str) and dim in extents
    }


def _channels(graph: Graph, specs: Sequence[TensorSpec]) -> dict[str, int]:
    """Symbols of the channels of inputs, which the first convolution's weight gives."""
    shapes = {spec.name: spec.shape for spec in specs}
    makers = graph.producers()
    found = {}
    for node in graph.nodes:
        if node.op_type not in _CONVOLUTIONS:
            continue
        source = node.input[0]
        while source not in shapes and source in makers and makers[source].op_type in _PASSED_ON:
            source = makers[source].input[0]
        shape, weight = shapes.get(source), graph.types.get(node.input[_CONVOLUTIONS[node.op_type]], (0, None))[1]
        if shape and weight and isinstance(shape[1], str) and isinstance(weight[1], int):
            found[shape[1]] = weight[1] * attribute(node, "group", 1)
    return found


def traced(graph: Graph, specs: Sequence[TensorSpec], published: Published) -> Plan:
    """The sizes at which optimum traces. A model that runs at them only has a branch that tracing froze."""
    first = {symbol for spec in specs for dim in spec.shape[:1] for symbol in symbols(dim)}
    fixed = {name: _TRACED_BATCH if name in first else _TRACED_LENGTH for name in symbols_of(specs)}
    image = published.images[:1]
    edges = _edges(specs, _symbolic_extents(graph, specs)) if image else {}
    return Plan(fixed=fixed | _channels(graph, specs) | {name: image[0][place] for name, place in edges.items()})


def sought_ids(
    nodes: Iterable[NodeProto], inputs: Collection[str], constants: Mapping[str, Constant | TensorProto]
) -> dict[str, int]:
    """Input -> the one id that the graph looks for in it, as a model that classifies a text looks for its end."""
    found: dict[str, set[int]] = {}
    for node in nodes:
        if node.op_type == "Equal":
            for name, other in (node.input, reversed(node.input)):
                constant = constants.get(other) if name in inputs else None
                if constant is None:
                    continue
                values = constant.load() if isinstance(constant, Constant) else numpy_helper.to_array(constant)
                if values.size == 1:
                    found.setdefault(name, set()).add(int(values.item()))
    return {name: ids.pop() for name, ids in found.items() if len(ids) == 1}


def symbols_of(specs: Sequence[TensorSpec]) -> list[str]:
    """All symbols in the shapes, in the order of their first use."""
    return list(dict.fromkeys(name for spec in specs for dim in spec.shape for name in symbols(dim)))


def _relations(names: Sequence[str], count: int) -> Iterator[dict[str, tuple[str, ...]]]:
    """No relation, then each symbol as the sum of `count` others."""
    yield {}
    for name in names:
        for parts in combinations([other for other in names if other != name], count):
            yield {name: parts}
