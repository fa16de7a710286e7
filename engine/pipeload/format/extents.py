"""The size of what an operator makes, where it follows from shapes and from constants of the graph. Pure.

A tensor that is not known is None, and so is one that an operator without a rule here makes: a rule tells the size
that onnxruntime would allocate, or nothing. Only small tensors have their values too: these are the sizes that
operators take. No tensor is made.
Source: the operators' pages (https://onnx.ai/onnx/operators).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.format.inline import MOST_VALUES, Inline, item_bytes, read_inline, reals_of
from pipeload.format.nodes import Node

__all__ = ["Extent", "extent_of", "made_by"]

_FLOAT, _BOOL_BYTES = 1, 1
_MOST_RANK, _MOST_SIZE = 64, 1 << 63


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor, as far as it is known.

    Attributes:
        shape: its dimensions.
        item_bytes: of an element, at least.
        values: of a small tensor, where they are known: int64, float64 or bool.
    """

    shape: tuple[int, ...]
    item_bytes: int
    values: NDArray[Any] | None = None

    @property
    def nbytes(self) -> int:
        """Its bytes in memory."""
        return prod(self.shape) * self.item_bytes


_Taken = Sequence[Extent | None]
_Rule = Callable[[Node, _Taken], Extent | None]


def extent_of(tensor: Inline) -> Extent:
    """A tensor that lies in the graph."""
    return Extent(tensor.shape, item_bytes(tensor.dtype), tensor.values)


def made_by(node: Node, taken: Sequence[Extent | None]) -> Extent | None:
    """What a node's first output is; None where that is not known.

    Args:
        node: the node.
        taken: its inputs; None for one that is left out or not known.
    """
    rule = _RULES.get(node.kind)
    if rule is None:
        return None
    try:
        with np.errstate(all="ignore"):
            made = rule(node, taken)
    except (ArithmeticError, AttributeError, IndexError, LookupError, TypeError, ValueError):
        return None  # an input that it needs is not known, or onnxruntime will refuse the node
    fits = made is not None and len(made.shape) <= _MOST_RANK and all(0 <= size <= _MOST_SIZE for size in made.shape)
    return made if fits else None


def _constant(node: Node, _: _Taken) -> Extent | None:
    for name, attribute in node.attributes.items():
        if name == "value" and attribute.tensor is not None:
            return extent_of(read_inline(attribute.tensor)[1])
        if name in ("value_int", "value_ints"):
            several = name.endswith("s")
            return _whole(np.array(attribute.wholes if several else attribute.whole, np.int64))
        if name in ("value_float", "value_floats"):
            return _valued(reals_of(attribute.reals) if name.endswith("s") else reals_of(attribute.real).reshape(()), 4)
    return None


def _shape(node: Node, taken: _Taken) -> Extent:
    shape = _first(taken).shape
    return _whole(np.array(shape[_whole_of(node, "start", 0) : _whole_of(node, "end", len(shape))], np.int64))


def _filled(node: Node, taken: _Taken) -> Extent:
    attribute = node.attributes.get("value")
    fill = Extent((1,), 4, np.zeros(1))
    if attribute is not None and attribute.tensor is not None:
        fill = extent_of(read_inline(attribute.tensor)[1])
    fill = Extent((), fill.item_bytes, None if fill.values is None else fill.values.reshape(()))
    return _broadcast(tuple(_wholes(taken, 0)), fill)


def _expanded(_: Node, taken: _Taken) -> Extent:
    one = _first(taken)
    return _broadcast(_together(one.shape, tuple(_wholes(taken, 1))), one)


def _tiled(_: Node, taken: _Taken) -> Extent:
    one = _first(taken)
    return Extent(tuple(a * b for a, b in zip(one.shape, _wholes(taken, 1), strict=True)), one.item_bytes)


def _counted(_: Node, taken: _Taken) -> Extent:
    begin, end, step = [_values(taken, place).item() for place in range(3)]
    one, count = _first(taken), max(0, -int(-(end - begin) // step))
    if count > MOST_VALUES or not isinstance(begin, int):
        return Extent((count,), one.item_bytes)
    return Extent((count,), one.item_bytes, begin + step * np.arange(count))


def _padded(node: Node, taken: _Taken) -> Extent:
    one = _first(taken)
    pads = _wholes(taken, 1) if len(taken) > 1 else list(node.attributes["pads"].wholes)
    axes = _wholes(taken, 3) if len(taken) > 3 and taken[3] is not None else [*range(len(one.shape))]
    shape = [*one.shape]
    for place, axis in enumerate(axes):
        shape[axis] += pads[place] + pads[place + len(axes)]
    return Extent(tuple(shape), one.item_bytes)


def _one_hot(node: Node, taken: _Taken) -> Extent:
    shape, axis = [*_first(taken).shape], _whole_of(node, "axis", -1)
    shape.insert(axis % (len(shape) + 1), int(_values(taken, 1).item()))
    values = taken[2]
    return Extent(tuple(shape), values.item_bytes if values is not None else 1)


def _resized(node: Node, taken: _Taken) -> Extent:
    one = _first(taken)
    if len(taken) > 3 and taken[3] is not None:
        sizes = _wholes(taken, 3)
    else:
        scales = reals_of(node.attributes["scales"].reals) if "scales" in node.attributes else _values(taken, -1)
        sizes = [int(size * scale) for size, scale in zip(one.shape, scales, strict=True)]
    axes = node.attributes["axes"].wholes if "axes" in node.attributes else range(len(one.shape))
    shape = [*one.shape]
    for axis, size in zip(axes, sizes, strict=True):
        shape[axis] = size
    return Extent(tuple(shape), one.item_bytes)


def _drawn(node: Node, _: _Taken) -> Extent:
    return Extent(node.attributes["shape"].wholes, item_bytes(_whole_of(node, "dtype", _FLOAT)))


def _window(_: Node, taken: _Taken) -> Extent:
    return Extent((int(_values(taken, 0).item()),), 1)


def _gathered(node: Node, taken: _Taken) -> Extent:
    one, indices = _first(taken), _known(taken, 1)
    axis = _whole_of(node, "axis", 0) % len(one.shape)
    values = None
    if one.values is not None and indices.values is not None:
        values = np.take(one.values, indices.values, axis)
    return _small((*one.shape[:axis], *indices.shape, *one.shape[axis + 1 :]), one.item_bytes, values)


def _joined(node: Node, taken: _Taken) -> Extent:
    parts = [_known(taken, place) for place in range(len(taken))]
    axis = _whole_of(node, "axis", 0) % len(parts[0].shape)
    shape = [*parts[0].shape]
    shape[axis] = sum(part.shape[axis] for part in parts)
    values = None
    if prod(shape) <= MOST_VALUES and all(part.values is not None for part in parts):
        values = np.concatenate([part.values for part in parts if part.values is not None], axis)
    return _small(tuple(shape), parts[0].item_bytes, values)


def _reshaped(node: Node, taken: _Taken) -> Extent:
    one, shape = _first(taken), _wholes(taken, 1)
    if not _whole_of(node, "allowzero", 0):
        shape = [one.shape[place] if size == 0 else size for place, size in enumerate(shape)]
    if -1 in shape:
        shape[shape.index(-1)] = prod(one.shape) // prod(size for size in shape if size != -1)
    return _viewed(one, tuple(shape))


def _unsqueezed(node: Node, taken: _Taken) -> Extent:
    one, axes = _first(taken), _axes(node, taken)
    rank = len(one.shape) + len(axes)
    rest, added = iter(one.shape), {axis % rank for axis in axes}
    return _viewed(one, tuple(1 if place in added else next(rest) for place in range(rank)))


def _squeezed(node: Node, taken: _Taken) -> Extent:
    one = _first(taken)
    axes = {axis % len(one.shape) for axis in _axes(node, taken)} or {i for i, n in enumerate(one.shape) if n == 1}
    return _viewed(one, tuple(size for place, size in enumerate(one.shape) if place not in axes))


def _transposed(node: Node, taken: _Taken) -> Extent:
    one = _first(taken)
    order = node.attributes["perm"].wholes if "perm" in node.attributes else range(len(one.shape))[::-1]
    values = None if one.values is None else one.values.transpose(*order)
    return Extent(tuple(one.shape[place] for place in order), one.item_bytes, values)


def _sliced(_: Node, taken: _Taken) -> Extent:
    one, begins, ends = _first(taken), _wholes(taken, 1), _wholes(taken, 2)
    axes = _wholes(taken, 3) if len(taken) > 3 and taken[3] is not None else [*range(len(begins))]
    steps = _wholes(taken, 4) if len(taken) > 4 and taken[4] is not None else [1] * len(begins)
    cuts = [slice(None)] * len(one.shape)
    for axis, begin, end, step in zip(axes, begins, ends, steps, strict=True):
        cuts[axis] = slice(begin, None if step < 0 and end < -one.shape[axis] else end, step)
    shape = tuple(len(range(size)[cut]) for size, cut in zip(one.shape, cuts, strict=True))
    return Extent(shape, one.item_bytes, None if one.values is None else one.values[tuple(cuts)])


def _product(_: Node, taken: _Taken) -> Extent:
    one, two = _first(taken), _known(taken, 1)
    if min(len(one.shape), len(two.shape)) < 2:
        raise ValueError("the product of a vector")
    return Extent((*_together(one.shape[:-2], two.shape[:-2]), one.shape[-2], two.shape[-1]), one.item_bytes)


def _reduced(node: Node, taken: _Taken) -> Extent:
    one, axes = _first(taken), tuple(axis % len(_first(taken).shape) for axis in _axes(node, taken))
    axes, keeps = axes or tuple(range(len(one.shape))), bool(_whole_of(node, "keepdims", 1))
    if "noop_with_empty_axes" in node.attributes:
        raise ValueError("axes that may not be there")
    shape = [1 if place in axes else size for place, size in enumerate(one.shape) if keeps or place not in axes]
    find = _REDUCTIONS.get(node.kind)
    known = one.values is not None and find is not None and one.values.size
    return Extent(tuple(shape), one.item_bytes, find(one.values, axis=axes, keepdims=keeps) if known and find else None)


def _cast(node: Node, taken: _Taken) -> Extent:
    one, to = _first(taken), _whole_of(node, "to", 0)
    values = one.values
    if values is not None:
        kind = {6: np.int64, 7: np.int64, 1: np.float64, 11: np.float64, 9: np.bool_}.get(to)
        values = None if kind is None else values.astype(np.int32 if to == 6 else kind).astype(kind)
    return Extent(one.shape, item_bytes(to), values)


def _chosen(_: Node, taken: _Taken) -> Extent:
    condition, one, two = (_known(taken, place) for place in range(3))
    shape = _together(_together(condition.shape, one.shape), two.shape)
    if prod(shape) > MOST_VALUES or condition.values is None or one.values is None or two.values is None:
        return Extent(shape, one.item_bytes)
    return Extent(shape, one.item_bytes, np.asarray(np.where(condition.values, one.values, two.values)))


def _elementwise(node: Node, taken: _Taken) -> Extent:
    several = [_known(taken, place) for place in range(len(taken))]
    shape = several[0].shape
    for one in several[1:]:
        shape = _together(shape, one.shape)
    values, find = None, _FUNCTIONS.get(node.kind)
    if find is not None and prod(shape) <= MOST_VALUES and all(one.values is not None for one in several):
        given = [one.values for one in several]
        values = reduce(find, given) if given[1:] else find(*given)
    return _small(shape, _BOOL_BYTES if node.kind in _COMPARES else several[0].item_bytes, values)


def _same(_: Node, taken: _Taken) -> Extent:
    return replace(_first(taken), values=None)


def _kept(_: Node, taken: _Taken) -> Extent:
    return _first(taken)


def _size(_: Node, taken: _Taken) -> Extent:
    return _whole(np.array(prod(_first(taken).shape), np.int64))


def _divided(one: NDArray[Any], two: NDArray[Any]) -> NDArray[Any]:
    """As onnxruntime divides: whole numbers towards zero."""
    if one.dtype.kind == "f":
        return np.asarray(one / two)
    return np.asarray(np.sign(one) * np.sign(two) * (abs(one) // abs(two)))


_FUNCTIONS: dict[str, Callable[..., NDArray[Any]]] = {
    "Abs": np.abs, "Add": np.add, "And": np.logical_and, "Ceil": np.ceil, "Div": _divided, "Equal": np.equal,
    "Floor": np.floor, "Greater": np.greater, "GreaterOrEqual": np.greater_equal, "Less": np.less,
    "LessOrEqual": np.less_equal, "Max": np.maximum, "Min": np.minimum, "Mul": np.multiply, "Neg": np.negative,
    "Not": np.logical_not, "Or": np.logical_or, "Pow": np.power, "Sqrt": np.sqrt, "Sub": np.subtract,
}  # fmt: skip
_COMPARES = frozenset({"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or"})
_REDUCTIONS: dict[str, Callable[..., NDArray[Any]]] = {
    "ReduceMax": np.max, "ReduceMin": np.min, "ReduceProd": np.prod, "ReduceSum": np.sum,
}  # fmt: skip
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_FUNCTIONS, _elementwise),
    **dict.fromkeys((*_REDUCTIONS, "ReduceMean", "ReduceL2", "ReduceSumSquare"), _reduced),
    **dict.fromkeys(("HannWindow", "HammingWindow", "BlackmanWindow"), _window),
    **dict.fromkeys(("RandomNormal", "RandomUniform"), _drawn),
    **dict.fromkeys(("Resize", "Upsample"), _resized),
    **dict.fromkeys(
        ("Clip", "Cos", "CumSum", "Erf", "Exp", "FastGelu", "Gelu", "LayerNormalization", "Log", "LogSoftmax",
         "EyeLike", "RMSNormalization", "RandomNormalLike", "RandomUniformLike", "Reciprocal", "Relu", "Round",
         "Sigmoid", "SimplifiedLayerNormalization", "Sin", "Softmax", "Tanh", "Trilu"), _same,
    ),
    "Cast": _cast, "Concat": _joined, "Constant": _constant, "ConstantOfShape": _filled, "Expand": _expanded,
    "Gather": _gathered, "Identity": _kept, "MatMul": _product, "OneHot": _one_hot, "Pad": _padded,
    "Range": _counted, "Reshape": _reshaped, "Shape": _shape, "Size": _size, "Slice": _sliced,
    "Squeeze": _squeezed, "Tile": _tiled, "Transpose": _transposed, "Unsqueeze": _unsqueezed, "Where": _chosen,
}  # fmt: skip


def _known(taken: _Taken, place: int) -> Extent:
    if (found := taken[place]) is None:
        raise LookupError("it is not known")
    return found


def _first(taken: _Taken) -> Extent:
    return _known(taken, 0)


def _values(taken: _Taken, place: int) -> NDArray[Any]:
    if (values := _known(taken, place).values) is None:
        raise LookupError("its values are not known")
    return values


def _wholes(taken: _Taken, place: int) -> list[int]:
    return [int(value) for value in _values(taken, place).ravel()]


def _whole_of(node: Node, name: str, default: int) -> int:
    return node.attributes[name].whole if name in node.attributes else default


def _axes(node: Node, taken: _Taken) -> list[int]:
    if len(taken) > 1:
        return _wholes(taken, 1)
    return [*node.attributes["axes"].wholes] if "axes" in node.attributes else []


def _whole(values: NDArray[Any]) -> Extent:
    return _valued(values, 8)


def _valued(values: NDArray[Any], nbytes: int) -> Extent:
    return Extent(values.shape, nbytes, values if values.size <= MOST_VALUES else None)


def _small(shape: tuple[int, ...], nbytes: int, values: NDArray[Any] | None) -> Extent:
    return Extent(shape, nbytes, values if prod(shape) <= MOST_VALUES else None)


def _viewed(one: Extent, shape: tuple[int, ...]) -> Extent:
    if prod(shape) != prod(one.shape):
        raise ValueError("it has another number of values")
    return Extent(shape, one.item_bytes, None if one.values is None else one.values.reshape(shape))


def _broadcast(shape: tuple[int, ...], one: Extent) -> Extent:
    known = one.values is not None and 0 <= prod(shape) <= MOST_VALUES and min(shape, default=0) >= 0
    return Extent(
        shape, one.item_bytes, np.broadcast_to(one.values, shape) if known and one.values is not None else None
    )


def _together(one: tuple[int, ...], two: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of two that are broadcast against each other."""
    rank = max(len(one), len(two))
    pairs = zip((1,) * (rank - len(one)) + one, (1,) * (rank - len(two)) + two, strict=True)
    shape = []
    for a, b in pairs:
        if a != b and 1 not in (a, b):
            raise ValueError(f"{one} and {two} do not fit each other")
        shape.append(b if a == 1 else a)
    return tuple(shape)
