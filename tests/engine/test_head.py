"""The largest logits of slices are those of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeload.head import RunningTop, TopLogits


def _top(logits: np.ndarray, top: int, cuts: list[int]) -> TopLogits:
    running = RunningTop(top)
    for part in np.split(logits, cuts, axis=-1):
        running.push(part)
    return running.result


@given(st.integers(0, 10_000), st.integers(1, 12), st.lists(st.integers(1, 39), unique=True, max_size=5), st.booleans())
def test_slices_give_what_the_whole_gives(seed: int, top: int, cuts: list[int], ties: bool) -> None:
    logits = np.random.default_rng(seed).normal(size=(2, 3, 40)).astype(np.float32)
    if ties:
        logits = logits.round()
    made = _top(logits, top, sorted(cuts))
    # Stable: of equal ones the first.
    order = np.sort(np.argsort(-logits, axis=-1, kind="stable")[..., :top], axis=-1)
    np.testing.assert_array_equal(made.token_ids, order)
    np.testing.assert_array_equal(made.logits, np.take_along_axis(logits, order, axis=-1))
    np.testing.assert_allclose(made.log_total, np.log(np.exp(logits.astype(np.float64)).sum(axis=-1)), rtol=1e-5)


def test_more_than_there_are_gives_all() -> None:
    made = _top(np.array([[[1, 3, 2]]], np.float32), 9, [1])
    assert made.token_ids.tolist() == [[[0, 1, 2]]]


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_not_lost(top: int, bad: float) -> None:
    logits = np.arange(8, dtype=np.float32).reshape(1, 1, 8)
    logits[0, 0, 2] = bad
    assert not np.isfinite(_top(logits, top, [4]).logits.max())


def test_half_precision_is_widened() -> None:
    made = _top(np.array([[[1, 3, 2]]], np.float16), 1, [])
    assert made.logits.dtype == np.float32
    assert made.token_ids.tolist() == [[[1]]]
