"""A tensor that lies in a graph: its shape, and its values where it is small. Pure.

Source: onnx.proto (https://github.com/onnx/onnx).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.format.dtypes import ITEM_BYTES, ONNX_DTYPES
from pipeload.format.protobuf import fields, packed, signed, text

__all__ = ["MOST_VALUES", "Inline", "item_bytes", "read_inline", "reals_of"]

MOST_VALUES = 1024
"""A larger tensor holds no sizes."""
_DIMS, _DTYPE, _NAME = 1, 2, 8
_WHOLES, _RAW = (5, 7), 9
_REALS = {4: "<f4", 10: "<f8"}
_KINDS = {1: "<f4", 6: "<i4", 7: "<i8", 9: "?", 11: "<f8"}
"""ONNX's number of a type -> its form in raw bytes; tensors of other types hold no sizes."""


@dataclass(frozen=True, slots=True)
class Inline:
    """A tensor.

    Attributes:
        shape: its dimensions.
        dtype: ONNX's number of its type.
        values: int64, float64 or bool; None where it is large, damaged, in another file, or of a type without sizes.
    """

    shape: tuple[int, ...]
    dtype: int
    values: NDArray[Any] | None


def read_inline(data: memoryview) -> tuple[str, Inline]:
    """A tensor's name, and the tensor.

    Raises:
        ValueError, IndexError: it is damaged.
    """
    name, shape, dtype, wholes, raw, reals = "", list[int](), 0, list[memoryview | int](), b"", b""
    form = ""
    for number, value in fields(data):
        if number == _DIMS:
            shape += [signed(value)] if isinstance(value, int) else map(signed, packed(value))
        elif number == _DTYPE and isinstance(value, int):
            dtype = value
        elif number == _NAME:
            name = text(value)
        elif number in _WHOLES and len(wholes) <= MOST_VALUES:
            wholes.append(value)
        elif isinstance(value, int) or len(raw) + len(reals) + len(value) > 8 * MOST_VALUES:
            continue
        elif number == _RAW:
            raw = bytes(value)
        elif number in _REALS:
            reals, form = reals + bytes(value), _REALS[number]
    values: NDArray[Any] | None = None
    try:
        if not 0 <= prod(shape) <= MOST_VALUES or dtype not in _KINDS:
            pass
        elif not prod(shape):
            values = np.zeros(shape, _KINDS[dtype])
        elif raw:
            values = np.frombuffer(raw, _KINDS[dtype]).reshape(shape)
        elif wholes:
            numbers = [
                n for one in wholes for n in ([one] if isinstance(one, int) else packed(one[: 10 * MOST_VALUES]))
            ]
            values = np.array([signed(number) for number in numbers], np.int64).reshape(shape)
        elif reals:
            values = np.frombuffer(reals, form).reshape(shape)
    except ValueError:
        pass  # onnxruntime refuses it
    if values is not None:
        values = values.astype({"i": np.int64, "f": np.float64}.get(values.dtype.kind, np.bool_))
    return name, Inline(tuple(shape), dtype, values)


def reals_of(data: bytes) -> NDArray[np.float64]:
    """The numbers of a field of floats."""
    return np.frombuffer(data, "<f4").astype(np.float64)


def item_bytes(dtype: int) -> int:
    """Bytes of an element of ONNX's type of this number, at least."""
    return ITEM_BYTES.get(ONNX_DTYPES.get(dtype, ""), 1)
