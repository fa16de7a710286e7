"""Whether a fused shard says the same as the shard that it was made from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeload_export.shard.trial import agree

FLOATS = np.array([1, 2, 4], np.float32)
ROUNDED = np.array([-127, 3, 127], np.int8)


@pytest.mark.parametrize(
    ("floats", "rounded", "same"),
    [
        (FLOATS, ROUNDED, True),
        (FLOATS * np.float32(1 + 1e-6), ROUNDED, True),
        (FLOATS * np.float32(1.005), ROUNDED, False),
        (FLOATS * np.float32(1.005), ROUNDED + np.array([1, 0, 0], np.int8), True),
        (FLOATS * np.float32(1.05), ROUNDED + np.array([1, 0, 0], np.int8), False),
        (FLOATS, ROUNDED + np.array([0, 2, 0], np.int8), False),
        (FLOATS, -ROUNDED, False),
        (FLOATS, ROUNDED[:2], False),
        (FLOATS, ROUNDED.astype(np.int16), False),
    ],
)
def test_int8_may_be_one_step_off_and_then_floats_a_little(
    floats: NDArray[Any], rounded: NDArray[Any], same: bool
) -> None:
    assert agree([[FLOATS, ROUNDED]], [[floats, rounded]]) is same
