"""What a difference between two answers is held against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["range_of"]

_OF_SIZE = {"float16": 1.0, "bfloat16": 1.0}
_OF_SIZE_ELSE = 0.01
"""The least range, in parts of the largest value. With the limits that answers are held to it allows about eight
roundings of that value: an output that hardly changes, as of an untrained model, may have a range of a few of them."""


def range_of(values: NDArray[Any], dtype: str) -> float:
    """The range of an output's finite values, and at least a part of the largest one; 1 if it has none but 0.

    Args:
        values: of any shape and float type.
        dtype: the coarsest element type that the values were made with.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return 1.0
    return max(float(np.ptp(finite)), _OF_SIZE.get(dtype, _OF_SIZE_ELSE) * float(np.abs(finite).max())) or 1.0
