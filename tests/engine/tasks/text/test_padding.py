from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeload.errors import BudgetError, ConfigError
from pipeload.format.manifest import read
from pipeload.tasks.text.padding import Side, apart, in_batches, padded, position_ids


def test_shorter_rows_are_filled_up_on_the_given_side() -> None:
    rows = [[1, 2, 3], [], [4]]
    assert padded(rows, fill=9, side="right").tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]]
    assert padded(rows, fill=9, side="left").tolist() == [[1, 2, 3], [9, 9, 9], [9, 9, 4]]
    assert padded(rows, fill=9, side="left").dtype == np.int64


def test_positions_count_real_tokens_and_are_1_for_padding() -> None:
    mask = np.array([[1, 1, 1], [0, 0, 1], [1, 1, 0]])
    assert position_ids(mask).tolist() == [[0, 1, 2], [1, 1, 0], [0, 1, 1]]


def test_batches_are_sorted_by_length_and_keep_the_order_of_equals() -> None:
    batches: list[list[int]] = []
    in_batches([2, 5, 2, 9, 2], 2, batches.append, alone=False)
    assert batches == [[3, 1], [0, 2], [4]]


def test_items_that_would_change_each_other_run_alone() -> None:
    batches: list[list[int]] = []
    in_batches([2, 5, 2], 2, batches.append, alone=True)
    assert batches == [[1], [0], [2]]


@pytest.mark.parametrize(
    ("known", "side", "wanted"),
    [
        ({"takes_left_padding": False}, "left", True),
        ({"takes_left_padding": False}, "right", False),
        ({"takes_left_padding": True}, "left", False),
        ({"takes_left_padding": None}, "left", False),
        ({"quantised_dynamically": True}, "right", True),
    ],
)
def test_texts_stay_apart_where_padding_changes_answers(
    toy: Path, known: dict[str, Any], side: Side, wanted: bool
) -> None:
    assert apart(replace(read(toy), **known), side) is wanted


def test_a_batch_that_the_budget_refuses_is_made_smaller() -> None:
    batches: list[list[int]] = []

    def run(indices: list[int]) -> None:
        if len(indices) > 3:
            raise BudgetError("too small", needed_bytes=2, budget_bytes=1)
        batches.append(indices)

    in_batches([1] * 7, 6, run, alone=False)
    assert batches == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_single_item_that_the_budget_refuses_is_an_error() -> None:
    def run(indices: list[int]) -> None:
        raise BudgetError("too small", needed_bytes=2, budget_bytes=1)

    with pytest.raises(BudgetError):
        in_batches([1, 1], 2, run, alone=False)


def test_nothing_runs_nothing() -> None:
    in_batches([], 4, pytest.fail, alone=False)


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1, not 0"):
        in_batches([1], 0, pytest.fail, alone=False)
