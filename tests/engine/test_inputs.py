"""Items are joined while they fit together, and come out as they went in."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import pytest

from pipeload.inputs import batches, split_batch


def _item(rows: int, length: int, value: int = 0, dtype: Any = np.int64) -> dict[str, Any]:
    return {"ids": np.full((rows, length), value, dtype), "mask": np.ones((rows, length), np.int64)}


def _shapes(items: list[dict[str, Any]], size: int) -> list[tuple[tuple[int, ...], list[int]]]:
    return [(joined["ids"].shape, rows) for joined, rows in batches(items, size)]


def test_items_of_one_form_are_joined_up_to_the_size() -> None:
    items = [_item(1, 5)] * 7
    assert _shapes(items, 3) == [((3, 5), [1, 1, 1]), ((3, 5), [1, 1, 1]), ((1, 5), [1])]


def test_a_batch_of_one_is_the_item_itself() -> None:
    item = _item(2, 5)
    ((joined, rows),) = batches([item], 4)
    assert joined["ids"] is item["ids"]
    assert len(rows) == 1


def test_rows_are_counted_item_by_item() -> None:
    assert _shapes([_item(2, 5), _item(1, 5), _item(0, 5), _item(3, 5)], 9) == [((6, 5), [2, 1, 0, 3])]


def test_what_differs_in_shape_dtype_or_names_begins_another_batch() -> None:
    other = {"ids": np.zeros((1, 5), np.int64)}
    items = [_item(1, 5), _item(1, 6), _item(1, 6), _item(1, 6, dtype=np.int32), other, _item(1, 5)]
    assert [shape for shape, _ in _shapes(items, 4)] == [(1, 5), (2, 6), (1, 6), (1, 5), (1, 5)]


@pytest.mark.parametrize("wrong", [[[1, 2]], np.array(3), None], ids=["list", "scalar", "nothing"])
def test_what_is_no_array_goes_alone(wrong: Any) -> None:
    items = [{"ids": wrong}, {"ids": wrong}, {"ids": np.zeros((1, 2))}]
    assert len(list(batches(items, 3))) == 3


def test_an_item_without_arrays_goes_alone() -> None:
    assert list(batches([{}, {}], 2)) == [({}, [1]), ({}, [1])]


def test_items_whose_own_arrays_disagree_do_not_mend_each_other() -> None:
    # Joined, both arrays would have three rows, and the answer would be about other pairs.
    one = {"ids": np.zeros((1, 5)), "mask": np.ones((2, 5))}
    two = {"ids": np.zeros((2, 5)), "mask": np.ones((1, 5))}
    assert [joined["ids"].shape[0] for joined, _ in batches([one, two], 2)] == [1, 2]


def test_nothing_gives_nothing() -> None:
    assert list(batches([], 3)) == []


@pytest.mark.parametrize("size", [1, 3])
def test_no_more_is_taken_than_a_batch_needs(size: int) -> None:
    taken = []

    def items() -> Iterator[dict[str, Any]]:
        for number in count():
            taken.append(number)
            yield _item(1, 5, number)

    for number, (joined, rows) in enumerate(islice(batches(items(), size), 4), start=1):
        assert len(rows) == size
        assert joined["ids"][:, 0].tolist() == taken[(number - 1) * size : number * size]
        assert len(taken) == number * size


def test_outputs_are_taken_apart_as_they_were_joined() -> None:
    items = [_item(2, 5, 1), _item(1, 5, 2), _item(0, 5), _item(3, 5, 4)]
    ((joined, rows),) = batches(items, 4)
    parts = list(split_batch({"out": joined["ids"] * 10}, rows))
    for item, part in zip(items, parts, strict=True):
        np.testing.assert_array_equal(part["out"], item["ids"] * 10)


def test_outputs_of_a_single_item_stay_whole() -> None:
    # Whatever their first dimension is.
    outputs = {"out": np.zeros((7, 3)), "scalar": np.array(1.0)}
    (part,) = split_batch(outputs, [1])
    assert part["out"] is outputs["out"]
    assert part["scalar"] is outputs["scalar"]
