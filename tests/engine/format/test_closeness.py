from __future__ import annotations

import numpy as np
import pytest

from pipeload.format.closeness import range_of


@pytest.mark.parametrize(
    ("values", "dtype", "range_"),
    [
        ([-1.0, 0.0, 3.0], "float32", 4.0),
        ([200.0, 201.0], "float32", 2.01),
        ([-200.0, -200.0], "float64", 2.0),
        ([200.0, 201.0], "float16", 201.0),
        ([200.0, 201.0], "bfloat16", 201.0),
        ([np.nan, 1.0, 2.0, np.inf], "float32", 1.0),
        ([0.0, 0.0], "float32", 1.0),
        ([np.nan], "float32", 1.0),
        ([], "float32", 1.0),
    ],
)
def test_range(values: list[float], dtype: str, range_: float) -> None:
    assert range_of(np.array(values), dtype) == pytest.approx(range_)
