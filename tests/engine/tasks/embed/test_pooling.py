from __future__ import annotations

import numpy as np
import pytest

from pipeload.errors import ConfigError
from pipeload.tasks.embed.pooling import normalized, pool

TOKENS = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
RIGHT = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
LEFT = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])


@pytest.mark.parametrize(
    ("mode", "right", "left"),
    [
        ("cls", [12, 13, 14], [18, 19, 20]),
        ("lasttoken", [15, 16, 17], [21, 22, 23]),
        ("max", [15, 16, 17], [21, 22, 23]),
        ("mean", [13.5, 14.5, 15.5], [19.5, 20.5, 21.5]),
        ("mean_sqrt_len_tokens", np.array([27, 29, 31]) / 2**0.5, np.array([39, 41, 43]) / 2**0.5),
        ("weightedmean", [14, 15, 16], np.array([18 * 3 + 21 * 4, 19 * 3 + 22 * 4, 20 * 3 + 23 * 4]) / 7),
    ],
)
def test_padding_counts_for_nothing(mode: str, right: list[float], left: list[float]) -> None:
    for mask, expected in ((RIGHT, right), (LEFT, left)):
        pooled = pool(TOKENS, mask, [mode])
        assert pooled.dtype == np.float32
        np.testing.assert_allclose(pooled[1], expected, rtol=1e-6)


def test_several_modes_stand_side_by_side() -> None:
    np.testing.assert_array_equal(
        pool(TOKENS, RIGHT, ["cls", "max"]),
        np.concatenate([pool(TOKENS, RIGHT, ["cls"]), pool(TOKENS, RIGHT, ["max"])], axis=1),
    )


def test_the_largest_of_negative_values_is_not_the_padding() -> None:
    assert pool(TOKENS - 1e10, RIGHT, ["max"])[1].max() < -1e9


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ConfigError, match="'median' is unknown"):
        pool(TOKENS, RIGHT, ["mean", "median"])


def test_normalised_vectors_have_length_1_and_zero_stays_zero() -> None:
    vectors = normalized(np.array([[3, 4], [0, 0]], np.float32))
    np.testing.assert_allclose(vectors, [[0.6, 0.8], [0, 0]], rtol=1e-6)
