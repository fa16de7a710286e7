"""Where the blocks of a transformer begin and end, found by structure and never by names.

```
            source                  one tensor alive: a boundary
              |                            |
   embeddings v   c0      layer 0    c1    v    layer 1    c2         head
   ----------[+]--o--[norm-attention-add]--o--[norm-...-add]--o--[norm-matmul]--> main output
                  |   ^ mask, rotary tables, shapes: shared, they do not count
                  '--- segment: the nodes between two boundaries
```

The *activation* flows from one source to the main output: it is all the nodes on any path from the node where the
longest path begins (the embedding, the patch convolution) to the output at its end. Everything else that is not
constant is shared: masks, positions, shapes, but also side branches with weights of their own, such as tables of
relative positions. A *boundary* is an activation tensor that every one of those paths passes. Blocks are the longest
run of segments that repeats: same operators, same shapes of the weights, other weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeload.errors import ExportError
from pipeload_export.cut.flow import Flow, depths_of, nodes_between, source_of, spread_tensors
from pipeload_export.cut.signature import signature
from pipeload_export.graph.graph import Graph

__all__ = ["Cuts", "find_cuts"]

_NEARLY = 0.9
"""Runs that cover this part of the best run's weights are as good: the one with the most repetitions wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """The activation's way through a graph, and which part of it repeats.

    Attributes:
        output: name of the main output, where the activation ends.
        boundaries: names of the boundary tensors, in order; the last is `output`.
        segments: for each boundary, the tensors made between the boundary before and this one, itself included.
        segment_bytes: weights that each segment uses.
        first: the segment at which the run of blocks begins.
        period: segments in one block.
        count: number of blocks; 0 for a model that was not cut.
    """

    output: str
    boundaries: tuple[str, ...]
    segments: tuple[tuple[str, ...], ...]
    segment_bytes: tuple[int, ...]
    first: int = 0
    period: int = 0
    count: int = 0

    @property
    def block_bytes(self) -> int:
        """Weights of the largest block; of everything, for a model that was not cut."""
        if not self.count:
            return sum(self.segment_bytes)
        places = range(self.first, self.first + self.period * self.count, self.period)
        return max(sum(self.segment_bytes[place : place + self.period]) for place in places)

    @property
    def coverage(self) -> int:
        """Weights in all blocks together."""
        return sum(self.segment_bytes[self.first : self.first + self.period * self.count])


def find_cuts(graph: Graph, *, whole: bool = False) -> Cuts:
    """Find the blocks of a normalised graph.

    Args:
        graph: sorted and normalised.
        whole: return cuts without blocks when nothing repeats, instead of failing.

    Raises:
        ExportError: nothing repeats, so there are no blocks to stream.
    """
    flow = Flow(graph)
    found = [cuts for inputs in (False, True) if (cuts := _cuts_from(flow, graph, float_inputs=inputs)) is not None]
    best = max(found, key=lambda cuts: cuts.coverage, default=None)
    if best is None:
        raise ExportError(
            "No output of the graph depends on a weight matrix: there is no transformer to cut. Is it the right file?"
        )
    if best.count or whole:
        return best
    raise ExportError(
        f"The graph has no repeating blocks: {len(best.boundaries)} places were found where one activation is alive, "
        f"but the longest run of equal structure between them is 1. {_suspect(best)}"
        "Pass whole=True (--whole) to put the model into one shard."
    )


def _suspect(cuts: Cuts) -> str:
    total = sum(cuts.segment_bytes)
    largest = max(cuts.segment_bytes, default=0)
    if not total or largest < total // 2:
        return ""
    place = cuts.segment_bytes.index(largest)
    return f"The part that ends at '{cuts.boundaries[place]}' holds {largest * 100 // total} % of the weights. "


def _cuts_from(flow: Flow, graph: Graph, *, float_inputs: bool) -> Cuts | None:
    """The cuts for one kind of source: nodes with weights, or the graph's float inputs as well."""
    begins = (
        {v.name for v in graph.inputs if flow.is_float(v.name) and _rank(graph, v.name) >= 2} if float_inputs else ()
    )
    shared: set[str] = set()
    while True:
        depths = depths_of(flow, begins, shared)
        reached = [name for name in graph.output_names if name in depths]
        if not reached:
            return None
        # Of equal depths the first output wins, as max does.
        output = max(reached, key=lambda name: depths[name])
        source = source_of(flow, depths, output, shared, begins)
        active = nodes_between(flow, source, output, shared)
        spread = spread_tensors(flow, active, shared) - {output}
        if not spread:
            break
        shared |= spread
    boundaries, segments = _segments(flow, active, output, source, shared)
    sizes = [flow.bytes_of(segment) for segment in segments]
    if not any(sizes):
        return None
    signatures = [
        signature(flow, segment, begin, end)
        for segment, begin, end in zip(segments[1:], boundaries, boundaries[1:], strict=False)
    ]
    first, period, count = _longest_run(signatures, sizes[1:])
    return Cuts(
        output=output,
        boundaries=tuple(boundaries),
        segments=tuple(tuple(n for i in segment for n in graph.nodes[i].output if n) for segment in segments),
        segment_bytes=tuple(sizes),
        first=first + 1,
        period=period,
        count=count,
    )


def _rank(graph: Graph, name: str) -> int:
    shape = graph.types.get(name, (0, None))[1]
    return len(shape) if shape is not None else 0


def _segments(
    flow: Flow, active: Sequence[int], output: str, source: int | str, shared: set[str]
) -> tuple[list[str], list[list[int]]]:
    """Boundaries, and before each its segment.

    Every active node lies on a path from the source to the output. Therefore a tensor is on all of those paths
    exactly when, in any topological order, no other active tensor is alive just after it was made.
    """
    members, last_use = set(active), dict[str, int]()
    for place, index in enumerate(active):
        last_use.update(dict.fromkeys(flow.inputs[index], place))
    alive: set[str] = {source} if isinstance(source, str) else set()
    boundaries: list[str] = []
    segments: list[list[int]] = []
    current: list[int] = []
    if alive:
        boundaries, segments = [str(source)], [[]]
    for place, index in enumerate(active):
        current.append(index)
        made = [
            name
            for name in filter(None, flow.graph.nodes[index].output)
            if name == output or (name not in shared and any(user in members for user in flow.consumers.get(name, ())))
        ]
        alive = {name for name in alive if last_use[name] > place} | set(made)
        if len(alive) == 1 and len(made) == 1 and flow.is_state(made[0]):
            boundaries.append(made[0])
            segments.append(current)
            current = []
    if not boundaries or boundaries[-1] != output:
        boundaries.append(output)
        segments.append(current)
    return boundaries, segments


def _longest_run(signatures: Sequence[bytes], sizes: Sequence[int]) -> tuple[int, int, int]:
    """(first segment, period, count) of the repetition that covers the most weights with the smallest blocks."""
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    runs: list[tuple[int, int, int, int]] = []
    for period in range(1, len(signatures) // 2 + 1):
        begin = 0
        for place in range(len(signatures) - period + 1):
            if place < len(signatures) - period and signatures[place] == signatures[place + period]:
                continue
            length, count = place - begin, (place - begin) // period + 1
            if count >= 2:
                for first in range(begin, begin + length % period + 1):
                    coverage = total[first + period * count] - total[first]
                    runs.append((coverage, count, first, period))
            begin = place + 1
    best = max((run[0] for run in runs), default=0)
    if not best:
        return 0, 0, 0
    _, count, first, period = max(
        (run for run in runs if run[0] >= best * _NEARLY), key=lambda run: (run[1], run[0], run[2], -run[3])
    )
    return first, period, count
