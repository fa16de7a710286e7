"""Rows of a quantised tensor of a GGUF file -> blocks of the same values, as MatMulNBits takes them.

A block's values are `scale * (number - middle)`, where the middle is that of MatMulNBits without zero points: 8, or 128
where numbers have 8 bits. Types with a minimum, `d q + m`, have one more float for each block, which is added to all of
its values.

That float belongs to numbers around zero, `d (q - 8) + (m + 8 d)`: so there are no zero points to store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeload_export.rewrite.matrices import Layout

__all__ = ["LAYOUTS", "Blocks", "blocks_of"]

_Bytes: TypeAlias = NDArray[np.uint8]
_Floats: TypeAlias = NDArray[np.float32]
_Split: TypeAlias = Callable[[_Bytes], tuple[NDArray[Any], _Floats, _Floats | None]]
"""Blocks of a file, `[blocks, bytes]` -> numbers `[blocks, values]`, and scales and minima `[blocks, parts]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Rows of a tensor.

    Attributes:
        blobs: `[rows, blocks, block_size * bits / 8]`, the first of two values in the low half of a byte.
        scales: `[rows, blocks]`.
        minima: `[rows, blocks]`; None where the layout has none.
    """

    blobs: _Bytes
    scales: _Floats
    minima: _Floats | None


def blocks_of(rows: _Bytes, kind: str) -> Blocks:
    """The same values as blocks.

    Args:
        rows: `[rows, bytes]`, as the file has them.
        kind: name of a type of GGUF, one of `LAYOUTS`.
    """
    layout, (nbytes, centre, split) = LAYOUTS[kind], _KINDS[kind]
    numbers, scales, minima = split(rows.reshape(-1, nbytes))
    shape, half = (len(rows), -1), 1 << (layout.bits - 1)
    scales = scales.reshape(shape)
    whole = (numbers.astype(np.int16) + (half - centre)).astype(np.uint8).reshape(*scales.shape, layout.block_size)
    blobs: _Bytes = whole if layout.bits == 8 else np.bitwise_or(whole[..., ::2], whole[..., 1::2] << np.uint8(4))
    if minima is not None:
        minima = minima.reshape(shape) + np.float32(centre) * scales
    return Blocks(blobs=blobs, scales=scales, minima=minima)


def _halves(array: _Bytes) -> _Floats:
    """Numbers of 16 bits, two bytes each."""
    return np.ascontiguousarray(array).view(np.float16).astype(np.float32)


def _nibbles(array: _Bytes) -> _Bytes:
    """The low halves of all bytes in the last axis, and then the high ones."""
    return np.concatenate([array & 15, array >> 4], axis=-1)


def _bits(array: _Bytes) -> _Bytes:
    """`[blocks, 4]` -> the bits of each, `[blocks, 32]`."""
    return np.unpackbits(array, axis=-1, bitorder="little")


def _split_4_0(blocks: _Bytes) -> tuple[NDArray[Any], _Floats, None]:
    return _nibbles(blocks[:, 2:]), _halves(blocks[:, :2]), None


def _split_4_1(blocks: _Bytes) -> tuple[NDArray[Any], _Floats, _Floats]:
    return _nibbles(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _split_5_0(blocks: _Bytes) -> tuple[NDArray[Any], _Floats, None]:
    return _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4, _halves(blocks[:, :2]), None


def _split_5_1(blocks: _Bytes) -> tuple[NDArray[Any], _Floats, _Floats]:
    return _nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4, _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _split_8_0(blocks: _Bytes) -> tuple[NDArray[Any], _Floats, None]:
    return blocks[:, 2:].view(np.int8), _halves(blocks[:, :2]), None


def _split_4_k(blocks: _Bytes) -> tuple[NDArray[Any], _Floats, _Floats]:
    return _nibbles(blocks[:, 16:].reshape(-1, 4, 32)), *_scales_and_minima(blocks)


def _split_5_k(blocks: _Bytes) -> tuple[NDArray[Any], _Floats, _Floats]:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = blocks[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1) & 1
    return low | high << 4, *_scales_and_minima(blocks)


def _split_6_k(blocks: _Bytes) -> tuple[NDArray[Any], _Floats, None]:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1) & 3
    scales = _halves(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return low | high << 4, scales, None


def _scales_and_minima(blocks: _Bytes) -> tuple[_Floats, _Floats]:
    """Of the eight parts of a block: numbers of 6 bits, the high two of the last four beside those of the first."""
    first, second, rest = (blocks[:, begin : begin + 4] for begin in (4, 8, 12))
    scales = np.concatenate([first & 63, rest & 15 | first >> 2 & 48], axis=-1)
    minima = np.concatenate([second & 63, rest >> 4 | second >> 2 & 48], axis=-1)
    return _halves(blocks[:, :2]) * scales, -_halves(blocks[:, 2:4]) * minima


_KINDS: dict[str, tuple[int, int, _Split]] = {
    "Q4_0": (18, 8, _split_4_0),
    "Q4_1": (20, 8, _split_4_1),
    "Q5_0": (22, 16, _split_5_0),
    "Q5_1": (24, 16, _split_5_1),
    "Q8_0": (34, 0, _split_8_0),
    "Q4_K": (144, 8, _split_4_k),
    "Q5_K": (176, 16, _split_5_k),
    "Q6_K": (210, 32, _split_6_k),
}
"""Bytes of a block in the file, the number that becomes the middle, and how a block is taken apart."""

LAYOUTS: dict[str, Layout] = {
    kind: Layout(bits=bits, block_size=size, has_minima=has_minima, in_halves=True)
    for kind, bits, size, has_minima in (
        ("Q4_0", 4, 32, False),
        ("Q4_1", 4, 32, True),
        ("Q5_0", 8, 32, False),
        ("Q5_1", 8, 32, True),
        ("Q8_0", 8, 32, False),
        ("Q4_K", 4, 32, True),
        ("Q5_K", 8, 32, True),
        ("Q6_K", 8, 16, False),
    )
}
"""Name of a type of GGUF -> what becomes of it."""
