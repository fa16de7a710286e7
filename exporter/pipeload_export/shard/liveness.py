"""Which tensors are alive together while a shard runs, and how large each of them is.

A shard's profile says which nodes ran, in which order, and how large their outputs were. A walk over them frees each
tensor after its last use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from onnx import ModelProto, NodeProto

from pipeload_export.graph.graph import attribute
from pipeload_export.shard.trial import Event

__all__ = ["LiveTensor", "live_bytes", "live_tensors"]

_ALIASES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
"""Operators whose output is their input's memory, where that is the session's own."""
_FLOAT = 4
_WIDEST = 4
"""Bytes of an element of a large selection; only shape arithmetic selects wider ones."""
_PACKED_BITS, _ROUNDS_ACTIVATIONS = 4, 4
"""Of a MatMulNBits: bits for which onnxruntime has a packed kernel at every accuracy level, and the level at which it
has one for 8 bits too."""
_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTensor:
    """Memory that is taken while the nodes from the `first` to the `last` of a run work, both included.

    Attributes:
        factors: their product is the size in bytes: the bytes of an element, and the dimensions.
        first: the place of a node in the run.
        last: likewise.
    """

    factors: tuple[int, ...]
    first: int
    last: int


def live_bytes(tensors: Sequence[LiveTensor]) -> list[int]:
    """Bytes that are alive while each node of a run works."""
    changes = [0] * (max((tensor.last for tensor in tensors), default=-1) + 2)
    for tensor in tensors:
        changes[tensor.first] += prod(tensor.factors)
        changes[tensor.last + 1] -= prod(tensor.factors)
    return list(accumulate(changes[:-1]))


def live_tensors(model: ModelProto, events: Sequence[Event], shapes: Mapping[str, tuple[int, ...]]) -> list[LiveTensor]:
    """The tensors that a run makes, its outputs among them, and the memory that kernels take for themselves.

    Args:
        model: the shard's graph.
        events: one run of it.
        shapes: of the tensors that the shard takes and makes, in this run.
    """
    nodes, end = model.graph.node, len(events) - 1
    if any(a.type in (a.GRAPH, a.GRAPHS) for node in nodes for a in node.attribute):
        # Nodes of branches and loops cannot be told from those around them: as if nothing were ever freed.
        return [LiveTensor(factors=made, first=0, last=end) for event in events for made in event.outputs]
    outputs = {value.name for value in model.graph.output}
    last_use: dict[str, int] = {}
    for place, event in enumerate(events):
        if event.node < len(nodes):
            last_use.update(dict.fromkeys(nodes[event.node].input, place))
    owner: dict[str, str] = {}
    known, weights = dict(shapes), {proto.name: tuple(proto.dims) for proto in model.graph.initializer}
    begun: dict[str, tuple[int, tuple[int, ...]]] = {}
    result = []
    for place, event in enumerate(events):
        if event.node >= len(nodes):
            # A cast that the session adds for itself; the node that wanted it comes next.
            result += [LiveTensor(factors=made, first=place, last=place + 1) for made in event.outputs]
            continue
        node = nodes[event.node]
        for name, factors in zip(filter(None, node.output), event.outputs, strict=False):
            known[name] = factors[1:]
            source = owner.get(node.input[0]) if node.op_type in _ALIASES else None
            if source and name not in outputs and source not in outputs:
                owner[name] = source
                last_use[source] = max(last_use.get(source, place), last_use.get(name, place))
            else:
                owner[name] = name
                # A cache is written where it lies.
                if node.op_type != "TensorScatter" or name not in outputs:
                    begun[name] = place, factors
        result += [LiveTensor(factors=taken, first=place, last=place) for taken in _scratch(node, known, weights)]
    for name, (place, factors) in begun.items():
        last = end if name in outputs else last_use.get(name, place)
        result.append(LiveTensor(factors=factors, first=place, last=last))
    return result


def _scratch(
    node: NodeProto, shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """Memory that a kernel takes for itself while it works, at most: factors of the bytes of each piece.

    Found by measuring kernels of onnxruntime 1.31 one by one; those that are not listed take none.
    """
    taken, made = [[shapes[name] for name in names if name in shapes] for names in (node.input, node.output[:1])]
    kind = node.op_type
    if kind in _ATTENTION:
        tensors = [shapes[name] for name in (*node.input, *node.output) if len(shapes.get(name, ())) >= 3]
        batch, length = made[0][0], made[0][-2]
        heads = attribute(node, "num_heads", 0) or attribute(node, "q_num_heads", 1)
        scores = (_FLOAT, batch, heads, length, max(shape[-2] for shape in tensors))
        return [*((3 * _FLOAT, *shape) for shape in taken), scores]
    if kind == "Where":
        return [(2 * _WIDEST, *shape) for shape in made]
    if kind == "Softmax" and made and attribute(node, "axis", -1) not in (-1, len(made[0]) - 1):
        return [(2 * _FLOAT, *shape) for shape in made]
    if kind == "BiasGelu" or (kind == "FastGelu" and len(node.input) > 1):
        return [(_FLOAT, *shape) for shape in made]
    if kind == "Einsum":
        return [(_FLOAT, *shape) for shape in (*made, *taken)]
    if kind == "Conv" and node.input[0] in shapes:
        # One image at a time is unfolded: for each position of the output, all that it depends on.
        kernel: list[int] = attribute(node, "kernel_shape", [1])
        return [(_FLOAT, *made[0][2:], taken[0][1], *kernel)]
    if kind in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
        return [(1, *shape) for shape in taken[:1] if node.input[0] in shapes]
    if kind == "MatMulNBits":
        # Activations are rounded. Where no packed kernel fits, all of the weight is decompressed.
        rounded = [(_FLOAT, *shape) for shape in taken[:1] if node.input[0] in shapes]
        columns, rows = int(attribute(node, "N")), int(attribute(node, "K"))
        return rounded if _has_packed_kernel(node, weights) else [(_FLOAT, columns, rows), *rounded]
    return []


def _has_packed_kernel(node: NodeProto, weights: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether onnxruntime packs a MatMulNBits: not one with floats as zero points, nor 8 bits at other levels."""
    bits = attribute(node, "bits", 4)
    if bits != _PACKED_BITS and attribute(node, "accuracy_level", 0) != _ROUNDS_ACTIVATIONS:
        return False
    zeros = weights.get(node.input[3]) if len(node.input) > 3 and node.input[3] else None
    blocks = -(-int(attribute(node, "K")) // int(attribute(node, "block_size")))
    # Zero points of 4 bits share bytes; floats do not.
    return zeros is None or prod(zeros) == int(attribute(node, "N")) * -(-blocks * bits // 8)
