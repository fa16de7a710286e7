"""The texts of a task, encoded, batch by batch through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeload.tasks.runner import Runner
from pipeload.tasks.text.padding import apart, in_batches
from pipeload.tasks.text.tokenizer import Encoded, tokenizer_of

__all__ = ["WINDOW", "by_rows", "in_windows"]

WINDOW = 1024
"""The tokens of at most this many texts are in memory together: the budget has no room for those of all texts."""

Result = TypeVar("Result")
Text = TypeVar("Text")


def in_windows(texts: Sequence[Text], made: Callable[[Sequence[Text]], list[Result]]) -> list[Result]:
    """What `made` returns for windows of the texts, one after another, in one list."""
    return [result for i in range(0, len(texts), WINDOW) for result in made(texts[i : i + WINDOW])]


def by_rows(
    runner: Runner,
    rows: Sequence[Encoded],
    batch_size: int,
    made: Callable[[Sequence[int], dict[str, NDArray[np.int64]]], Iterable[Result]],
) -> list[Result]:
    """A result for each row, in their order, from passes over batches of them.

    Args:
        runner: the model.
        rows: encoded texts.
        batch_size: the most rows in a batch; see `in_batches`.
        made: runs a batch: its rows' indices, and their arrays (`Tokenizer.batch`) -> a result for each of them.

    Raises:
        As `in_batches`.
    """
    tokenizer = tokenizer_of(runner)
    results: dict[int, Result] = {}

    def run(indices: list[int]) -> None:
        results.update(zip(indices, made(indices, tokenizer.batch([rows[i] for i in indices])), strict=True))

    alone = tokenizer.pads_nothing or apart(runner.manifest, tokenizer.padding_side)
    in_batches([len(row.ids) for row in rows], batch_size, run, alone=alone)
    return [results[index] for index in range(len(rows))]
