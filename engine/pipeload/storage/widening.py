"""Weights of 16 bits -> float32, in the buffer that a shard was read into.

Every float16 and every bfloat16 is a float32, so the values stay the same. Source of the formats: IEEE 754-2019, and
"BFLOAT16 - Hardware Numerics Definition" (Intel, 2018): the upper half of a float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.format.manifest import Shard, WeightSpec
from pipeload.storage.buffers import Part, stored_in

__all__ = ["widen", "widened"]

_ELEMENTS = 1 << 17
"""Of one step: its values stay in a processor's cache."""
_MANTISSA_BITS = 13
"""More in float32 than in float16."""
_SIGN_AND_NUMBER = np.int32(np.uint32(0x8FFFFFFF).view(np.int32))
"""Without the copies of the sign that come of making 32 bits of 16."""
_BIAS = np.float32(2.0**112)
"""2 to the power of what the exponents of float32 (127) and float16 (15) are biased more."""


def widen(shard: Shard, parts: Sequence[Part]) -> None:
    """Move the tensors that have a place in a part's buffer there, and widen those that are stored in 16 bits.

    Args:
        shard: the shard.
        parts: all parts of its weights, as they were read. What was read into a buffer with places is gone afterwards.
    """
    assert shard.weights is not None
    offset = shard.weights.offset
    specs = {spec.name: spec for spec in shard.tensors}
    for part in parts:
        places = part.placement.places
        own = [name for name in places if part.begin <= specs[name].offset - offset < part.end]
        # Tensors of other parts overwrite what was read.
        for name in dict.fromkeys([*own, *places]):
            _move(stored_in(parts, specs[name], offset), specs[name], part, places[name])


def widened(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """The same values as float32, in an array of its own.

    Args:
        stored: any shape; bfloat16 as uint16.
        dtype: "bfloat16" or "float16".
    """
    wide = np.empty(stored.shape, np.float32)
    flat, values = stored.reshape(-1), wide.reshape(-1)
    for begin in range(0, flat.size, _ELEMENTS):
        _widen(flat[begin : begin + _ELEMENTS], dtype, values[begin : begin + _ELEMENTS])
    return wide


def _move(stored: NDArray[Any], spec: WeightSpec, part: Part, place: int) -> None:
    source, target = stored.reshape(-1), part.buffer.array(spec.memory_dtype, spec.shape, place).reshape(-1)
    for begin in range(0, source.size, _ELEMENTS):
        step = slice(begin, begin + _ELEMENTS)
        if spec.widened is None:
            target[step] = source[step]
        else:
            _widen(source[step], spec.dtype, target[step])


def _widen(source: NDArray[Any], dtype: str, target: NDArray[np.float32]) -> None:
    """Widen finite values. NumPy makes a copy of the source first where it overlaps the target."""
    if dtype == "bfloat16":
        # With the order of bytes turned, a bfloat16 and its float32 are the same whole number. NumPy converts those in
        # one pass through memory, where a copy and a shift take two.
        target.view(">u4")[:] = source.view(">u2")
        return
    # A float16 whose bits stand in the place of a float32's is too small by a power of two, subnormals too. Four times
    # as fast as NumPy's own conversion.
    signed = target.view(np.int32)
    signed[:] = source.view(np.int16)
    np.left_shift(signed, _MANTISSA_BITS, out=signed)
    np.bitwise_and(signed, _SIGN_AND_NUMBER, out=signed)
    np.multiply(target, _BIAS, out=target)
