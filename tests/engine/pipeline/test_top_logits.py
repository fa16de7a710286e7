"""The largest logits of slices are those of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeload.pipeline.top_logits import RunningTop, TopLogits


def _top(logits: Any, top: int, cuts: list[int]) -> Sequence[Sequence[TopLogits]]:
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
    for row, found in zip(logits.reshape(6, 40), [one for sequence in made for one in sequence], strict=True):
        # As transformers keeps them: those that equal the last one too.
        places = np.flatnonzero(row >= np.sort(row)[-top])
        np.testing.assert_array_equal(found.token_ids, places)
        np.testing.assert_array_equal(found.logits, row[places])
        assert found.log_total == pytest.approx(np.log(np.exp(row.astype(np.float64)).sum()), rel=1e-5)


def test_more_than_there_are_gives_all() -> None:
    made = _top(np.array([[[1, 3, 2]]], np.float32), 9, [1])
    assert made[0][0].token_ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_not_lost(top: int, bad: float) -> None:
    logits = np.arange(8, dtype=np.float32).reshape(1, 1, 8)
    logits[0, 0, 2] = bad
    assert not np.isfinite(_top(logits, top, [4])[0][0].logits.max())


def test_half_precision_is_widened() -> None:
    made = _top(np.array([[[1, 3, 2]]], np.float16), 1, [])
    assert made[0][0].logits.dtype == np.float32
    assert made[0][0].token_ids.tolist() == [1]
