"""KV caches: what grows along a length with the calls, and what comes back beside that, found by structure.

```
past [batch, heads, past, size] --- Concat(past, new) ---> present [batch, heads, past + length, size]
```
A cache keeps the tokens of before as they are, so only operators that move values lie between past and present, and
the shard that reads the past makes the present. An output that has the shape of an input is none: a mask that comes
out again does not grow, and calls do not feed it back. Where others grow, a state of constant size (of a convolution, a
recurrence, an encoder) is kept too, if its names say that it comes back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TypeAlias

from onnx import NodeProto

from pipeload.format.caches import grown_axis
from pipeload.format.manifest import Cache, TensorSpec, symbols
from pipeload_export.cut.placement import SHAPE_OPS, Piece
from pipeload_export.graph.graph import Graph, node_inputs

__all__ = ["find_caches"]

_MOVING = frozenset(
    {
        *("Cast", "Concat", "DequantizeLinear", "Expand", "Flatten", "Gather", "Identity", "If", "Loop", "Pad"),
        *("QLinearConcat", "QuantizeLinear", "Reshape", "Scan", "ScatterElements", "ScatterND", "Slice", "Split"),
        *("Squeeze", "TensorScatter", "Transpose", "Unsqueeze", "Where"),
    }
)
"""Operators behind which values of an input are still there."""
_ATTENTION = {
    ("", "Attention"): {4: 1, 5: 2},
    ("com.microsoft", "Attention"): {4: 1},
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): {5: 1, 6: 2},
    ("com.microsoft", "DecoderMaskedSelfAttention"): {4: 1},
    ("com.microsoft", "GroupQueryAttention"): {3: 1, 4: 2},
    ("com.microsoft", "MultiHeadAttention"): {6: 1, 7: 2},
    ("com.microsoft", "SparseAttention"): {3: 1, 4: 2},
}
"""Operators that append to caches: place of a past among the inputs -> place of its present among the outputs."""
_ROLES = re.compile(r"(?<![a-z])(past_key_values|past|present|previous|prev|next|new|old|out|in)(?![a-z])")
"""Words that tell before from after in the names of what is kept."""

_Pair: TypeAlias = tuple[int, int, int, str, str]
"""Nodes between an input and an output, their places among inputs and outputs, and their names."""


def find_caches(
    graph: Graph, pieces: Sequence[Piece], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> tuple[Cache, ...]:
    """Pairs of a graph input and the graph output that takes its place at the next step, made in the same shard.

    Args:
        graph: the model's.
        pieces: its shards to be.
        inputs: as the caller passes them.
        outputs: as the caller gets them.
    """
    homes = _homes(graph, pieces)
    place_of = {spec.name: place for place, spec in enumerate(outputs)}
    growing: list[_Pair] = []
    lasting: list[_Pair] = []
    for place, before in enumerate(inputs):
        piece = homes.get(before.name)
        if piece is None:
            continue
        lengths = {symbol for spec in inputs if spec.name != before.name for d in spec.shape for symbol in symbols(d)}
        moved = _reached(graph, piece, before.name, only_moved=True)
        for name, distance in _reached(graph, piece, before.name).items():
            after = outputs[place_of[name]]
            if (before.dtype, len(before.shape)) != (after.dtype, len(after.shape)):
                continue
            pair = (moved.get(name, distance), place, place_of[name], before.name, name)
            if name in moved and _grows(before, after, lengths):
                growing.append(pair)
            elif before.shape == after.shape and _comes_back(before.name, name):
                lasting.append(pair)
    caches: dict[str, str] = {}
    for _, _, _, name, output in [*sorted(growing), *sorted(lasting if growing else [])]:
        if name not in caches and output not in caches.values():
            caches[name] = output
    return tuple(Cache(input=spec.name, output=caches[spec.name]) for spec in inputs if spec.name in caches)


def _homes(graph: Graph, pieces: Sequence[Piece]) -> dict[str, Piece]:
    """Tensor -> the only piece that reads its values."""
    readers: dict[str, dict[str, Piece]] = {}
    for piece in pieces:
        for index in piece.nodes:
            if graph.nodes[index].op_type not in SHAPE_OPS:
                for name in node_inputs(graph.nodes[index]):
                    readers.setdefault(name, {})[piece.name] = piece
    return {name: next(iter(found.values())) for name, found in readers.items() if len(found) == 1}


def _reached(graph: Graph, piece: Piece, begin: str, *, only_moved: bool = False) -> dict[str, int]:
    """Graph outputs that the piece makes from a tensor's values -> nodes on the shortest way.

    Args:
        graph: the model's.
        piece: the shard.
        begin: the tensor.
        only_moved: go only where the values themselves go.
    """
    distance = {begin: 0}
    for index in piece.nodes:
        node = graph.nodes[index]
        made = _results(node, distance, only_moved=only_moved)
        distance.update((name, before + 1) for name, before in made if name)
    return {name: distance[name] for name in graph.output_names if name in distance and name != begin}


def _results(node: NodeProto, distance: Mapping[str, int], *, only_moved: bool) -> Iterator[tuple[str, int]]:
    """The node's outputs that depend on tensors of known distance, with the least of these distances."""
    places = _ATTENTION.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
    if only_moved and places:
        for taken, made in places.items():
            if taken < len(node.input) and made < len(node.output) and node.input[taken] in distance:
                yield node.output[made], distance[node.input[taken]]
        return
    known = [distance[name] for name in node_inputs(node) if name in distance]
    if known and (node.op_type in _MOVING if only_moved else node.op_type not in SHAPE_OPS):
        yield from ((name, min(known)) for name in node.output)


def _grows(before: TensorSpec, after: TensorSpec, lengths: Set[str]) -> bool:
    """Whether the output is longer than the input by a length that another input has, or else by name and a number."""
    axis = grown_axis(before.shape, after.shape)
    if axis is None:
        return False
    old, new = Counter(symbols(before.shape[axis])), Counter(symbols(after.shape[axis]))
    if not old <= new:
        # One symbol stands for the sum: a mask is as long.
        return len(old) == len(new) == 1 and new.keys() <= lengths
    return (new - old).keys() <= lengths if new - old else _comes_back(before.name, after.name)


def _comes_back(taken: str, made: str) -> bool:
    """Whether an input and an output are called the same but for words such as past and present."""
    one, other = (_ROLES.sub("", name.lower()).strip("._/") for name in (taken, made))
    return one == other != ""
