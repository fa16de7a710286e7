"""The texts of a task, encoded, batch by batch through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import RunError
from pipeload.foreign import foreign_errors
from pipeload.tasks.runner import Array, Runner, graph_inputs
from pipeload.tasks.text.padding import apart, in_batches
from pipeload.tasks.text.tokenizer import Encoded, tokenizer_of

__all__ = ["WINDOW", "by_rows", "in_windows"]

WINDOW, WINDOW_CHARACTERS = 1024, 1 << 18
"""The tokens of at most this many texts, and of texts with this many characters, are in memory together: the budget has
no room for those of all texts."""
_REMEDY = "Pass a smaller batch_size, lower the memory budget, or end other programs."

Result = TypeVar("Result")
Text = TypeVar("Text")


def in_windows(texts: Sequence[Text], made: Callable[[Sequence[Text]], list[Result]]) -> list[Result]:
    """What `made` returns for windows of the texts, one after another, in one list.

    Args:
        texts: texts, pairs of texts, or token ids, which are not counted: the caller has them anyway.
        made: the results of a window.
    """
    results: list[Result] = []
    begin = characters = 0
    for end, text in enumerate(texts):
        size = _characters(text)
        if end > begin and (end - begin == WINDOW or characters + size > WINDOW_CHARACTERS):
            results += made(texts[begin:end])
            begin, characters = end, 0
        characters += size
    return results + made(texts[begin:]) if begin < len(texts) else results


def _characters(text: object) -> int:
    parts = text if isinstance(text, tuple) else (text,)
    return sum(len(part) for part in parts if isinstance(part, str))


def by_rows(
    runner: Runner,
    rows: Sequence[Encoded],
    batch_size: int,
    made: Callable[[Sequence[int], dict[str, NDArray[np.int64]], Mapping[str, Array]], Iterable[Result]],
) -> list[Result]:
    """A result for each row, in their order, from passes over batches of them, which other callers' rows may share.

    Args:
        runner: the model.
        rows: encoded texts.
        batch_size: the most rows in a batch; see `in_batches`.
        made: the indices of a batch's rows, their arrays (`Tokenizer.batch`) and the model's outputs -> a result for
            each of them.

    Raises:
        As `in_batches`.
    """
    tokenizer = tokenizer_of(runner)
    results: dict[int, Result] = {}
    passes = 0

    def run(indices: list[int]) -> None:
        nonlocal passes
        with foreign_errors(RunError, "The texts could not be made one batch", _REMEDY):
            arrays = tokenizer.batch([rows[i] for i in indices])
            inputs = graph_inputs(runner, arrays)
        outputs = runner.run(inputs) if alone else runner.run_rows(inputs, tokenizer.padding, passes=passes)
        passes += 1
        results.update(zip(indices, made(indices, arrays, outputs), strict=True))

    alone = tokenizer.pads_nothing or apart(runner.manifest, tokenizer.padding_side)
    in_batches([len(row.ids) for row in rows], batch_size, run, alone=alone)
    return [results[index] for index in range(len(rows))]
