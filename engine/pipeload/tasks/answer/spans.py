"""The stretches of a text that answer a question, out of the logits of their first and last tokens.

The rule is that of transformers' question-answering pipeline, with its defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeload.tasks.text.tokenizer import Window

__all__ = ["Answer", "Floats", "best_answers"]

Floats = NDArray[np.float32]

_OUTSIDE = -10000.0
"""The logit of tokens that no answer may contain."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A stretch of a text that answers a question.

    Attributes:
        answer: the stretch; empty for "the text has no answer".
        score: its probability.
        start: its first character in the text.
        end: one past the last character.
    """

    __module__ = "pipeload"

    answer: str
    score: float
    start: int
    end: int


def best_answers(
    text: str,
    logits: Iterable[tuple[Window, Floats, Floats]],
    *,
    long: int,
    cls_id: int | None,
    top_k: int,
    max_answer_len: int,
    handle_impossible_answer: bool,
) -> list[Answer]:
    """The best answers of one text, best first.

    Args:
        text: the text.
        logits: for each of its windows those of the first and of the last token of an answer, `[tokens]`.
        long: whether the text is the first or the second of a window, 0 or 1.
        cls_id: the token that stands for "no answer".
        top_k: the most answers.
        max_answer_len: the most tokens of an answer.
        handle_impossible_answer: an empty answer counts, with the score of "no answer".
    """
    found: list[Answer] = []
    null_score = 1.0
    # Some of them will be the same words.
    count = 2 * top_k + 10
    for window, start_logits, end_logits in logits:
        usable = np.array(
            [sequence == long or id_ == cls_id for sequence, id_ in zip(window.sequences, window.ids, strict=True)]
        )
        starts, ends = (_probabilities(each, usable) for each in (start_logits, end_logits))
        if handle_impossible_answer:
            null_score = min(null_score, float(starts[0] * ends[0]))
        starts[0] = ends[0] = 0.0
        for first, last, score in _spans(starts, ends, usable, count, max_answer_len):
            begin, end = _characters(window, first, last, long)
            _add(found, Answer(text[begin:end], score, begin, end))
    if handle_impossible_answer:
        found.append(Answer("", null_score, 0, 0))
    return sorted(found, key=lambda answer: -answer.score)[:top_k]


def _probabilities(logits: Floats, usable: NDArray[np.bool_]) -> NDArray[np.float64]:
    masked = np.where(usable, logits.astype(np.float64), _OUTSIDE)
    powers: NDArray[np.float64] = np.exp(masked - masked.max())
    powers /= powers.sum()
    return powers


def _spans(
    starts: NDArray[np.float64],
    ends: NDArray[np.float64],
    usable: NDArray[np.bool_],
    count: int,
    max_answer_len: int,
) -> list[tuple[int, int, float]]:
    """First and last token and score of the best spans: the product of both probabilities."""
    scores = np.tril(np.triu(starts[:, None] * ends[None, :]), max_answer_len - 1).ravel()
    best = np.argpartition(-scores, count)[:count] if len(scores) > count else np.arange(len(scores))
    best = best[np.argsort(-scores[best], kind="stable")]
    pairs = zip(*np.unravel_index(best, (len(starts), len(ends))), scores[best], strict=True)
    return [(int(first), int(last), float(score)) for first, last, score in pairs if usable[first] and usable[last]]


def _characters(window: Window, first: int, last: int, long: int) -> tuple[int, int]:
    """Where the tokens lie in the text, with the whole of the words that they cut."""
    begin, end = _word(window, first, long), _word(window, last, long)
    if begin is None or end is None:
        return window.begins[first], window.ends[last]
    return begin[0], end[1]


def _word(window: Window, token: int, long: int) -> tuple[int, int] | None:
    word = window.words[token]
    if word < 0:
        return None
    places = [
        place
        for place, (other, sequence) in enumerate(zip(window.words, window.sequences, strict=True))
        if other == word and sequence == long
    ]
    return (window.begins[places[0]], window.ends[places[-1]]) if places else None


def _add(found: list[Answer], answer: Answer) -> None:
    """Another place with the same words makes them likelier."""
    for place, other in enumerate(found):
        if other.answer.lower() == answer.answer.lower():
            found[place] = Answer(other.answer, other.score + answer.score, other.start, other.end)
            return
    found.append(answer)
