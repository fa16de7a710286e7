"""Answers to questions about texts: stretches of these texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np

from pipeload.errors import ConfigError
from pipeload.tasks.answer.spans import Answer, Floats, best_answers
from pipeload.tasks.arguments import check_positive, check_several
from pipeload.tasks.runner import Array, Runner, made_by_model
from pipeload.tasks.text.batches import by_rows, in_windows
from pipeload.tasks.text.pairs import check_text
from pipeload.tasks.text.tokenizer import Window, tokenizer_of

__all__ = ["answer"]

_BATCH_SIZE = 32
_MAX_ANSWER_LEN = 15
"""The most tokens of an answer, as in transformers."""
_LENGTH, _OVERLAP = 384, 128
"""Tokens of a window of a long text, and of those the ones that the window before has too, as in transformers."""


@overload
def answer(
    self: Runner,
    question: str,
    context: str,
    *,
    top_k: None = ...,
    max_answer_len: int = ...,
    handle_impossible_answer: bool = ...,
    batch_size: int = ...,
) -> Answer: ...
@overload
def answer(
    self: Runner,
    question: str,
    context: str,
    *,
    top_k: int,
    max_answer_len: int = ...,
    handle_impossible_answer: bool = ...,
    batch_size: int = ...,
) -> list[Answer]: ...
@overload
def answer(
    self: Runner,
    question: list[str],
    context: str | list[str],
    *,
    top_k: None = ...,
    max_answer_len: int = ...,
    handle_impossible_answer: bool = ...,
    batch_size: int = ...,
) -> list[Answer]: ...
@overload
def answer(
    self: Runner,
    question: list[str],
    context: str | list[str],
    *,
    top_k: int,
    max_answer_len: int = ...,
    handle_impossible_answer: bool = ...,
    batch_size: int = ...,
) -> list[list[Answer]]: ...
def answer(
    self: Runner,
    question: str | list[str],
    context: str | list[str],
    *,
    top_k: int | None = None,
    max_answer_len: int = _MAX_ANSWER_LEN,
    handle_impossible_answer: bool = False,
    batch_size: int = _BATCH_SIZE,
) -> Any:
    """The stretch of the context that answers the question, as transformers' question-answering pipeline finds it.

    A context that is longer than the model accepts is read in windows that overlap.

    Args:
        self: a model exported for question-answering.
        question: one question, or a list of them.
        context: the text that holds the answer: one for all questions, or a list with one for each.
        top_k: the most answers to a question, as a list, best first; None gives the best one, not in a list.
        max_answer_len: the most tokens of an answer.
        handle_impossible_answer: an empty answer is possible: "the context does not say".
        batch_size: the most windows in one pass; a pass takes fewer if the memory budget cannot hold this many.

    Raises:
        ConfigError: the model answers no questions, a text is empty or no string, the question leaves no room for the
            context, or an argument is invalid.
        ShardError: a file of the tokenizer is damaged.
        BudgetError: not even a single window fits into the memory budget.

    Example:
        >>> with pipeload.load("models/squad", "256MB") as model:
        ...     model.answer("Where does Anna live?", "Anna and Bob live in Paris.").answer
        'Paris'
    """
    task = self.manifest.task
    if task != "question-answering":
        raise ConfigError(
            f"answer takes a model for question-answering; this one is for {task}. "
            "Export it with --task question-answering, or use model.run."
        )
    for name, value in (("top_k", 1 if top_k is None else top_k), ("max_answer_len", max_answer_len)):
        check_positive(name, value)
    questions, contexts = _rows(question, context)
    tokenizer = tokenizer_of(self)
    limit = _LENGTH if tokenizer.max_length is None else min(tokenizer.max_length, _LENGTH)
    overlap = min(limit // 2, _OVERLAP)
    # Models that pad on the left were trained with the context before the question.
    long = 1 if tokenizer.padding_side == "right" else 0

    def answered(rows: Sequence[tuple[str, str]]) -> list[list[Answer]]:
        parts = [
            tokenizer.windows(*(row if long else row[::-1]), long=long, length=limit, overlap=overlap) for row in rows
        ]
        # The windows of all questions together: a sweep over the weights serves a whole batch.
        logits = iter(_logits(self, [window for windows in parts for window in windows], batch_size))
        return [
            best_answers(
                text,
                [(window, *next(logits)) for window in windows],
                long=long,
                cls_id=tokenizer.cls_id,
                top_k=top_k or 1,
                max_answer_len=max_answer_len,
                handle_impossible_answer=handle_impossible_answer,
            )
            for (_, text), windows in zip(rows, parts, strict=True)
        ]

    found = in_windows([*zip(questions, contexts, strict=True)], answered)
    results: list[Any] = [each[0] for each in found] if top_k is None else found
    return results[0] if isinstance(question, str) else results


def _rows(question: str | list[str], context: str | list[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The questions, and as many contexts."""
    questions = [question] if isinstance(question, str) else question
    check_several(questions, "question", "a string or a list of strings")
    contexts = [context] * len(questions) if isinstance(context, str) else context
    check_several(contexts, "context", "a string or a list of strings")
    if len(questions) != len(contexts) or isinstance(question, str) > isinstance(context, str):
        raise ConfigError(
            f"There are {len(questions)} questions and {len(contexts)} contexts. Give a list of questions, and one "
            "context for all of them or a list of as many."
        )
    for name, texts in (("question", questions), ("context", contexts)):
        for text in texts:
            check_text(text)
            if not text.strip():
                raise ConfigError(f"The {name} is empty. Give a text.")
    return questions, contexts


def _logits(runner: Runner, parts: Sequence[Window], batch_size: int) -> list[tuple[Floats, Floats]]:
    """For each window the logits of the first token of an answer, and those of the last one."""

    def made(
        indices: Sequence[int], arrays: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> list[tuple[Floats, Floats]]:
        found = []
        for name in ("start_logits", "end_logits"):
            if name not in outputs:
                raise ConfigError(f"The model makes no output '{name}', only {', '.join(outputs)}. Use model.run.")
            with made_by_model(name, outputs[name]):
                rows = zip(indices, outputs[name], arrays["attention_mask"] != 0, strict=True)
                found.append([row[mask].astype(np.float32, copy=False) for _, row, mask in rows])
        starts, ends = found
        return [*zip(starts, ends, strict=True)]

    return by_rows(runner, parts, batch_size, made)
