"""A refusal says what the input with another answer has that those with the right one lack; it guesses no cause."""

from __future__ import annotations

import numpy as np
import pytest

from pipeload_export.check.beginning import Traits, beginning
from pipeload_export.check.questions import Prompt, Question

SHORT = Traits(name="1 x 7", length=7)
PADDED = Traits(name="2 x 16, padded right", length=16, texts=2, padding="right")
BOUNDARIES = {8: "sliding_window", 64: "max_position_embeddings"}


@pytest.mark.parametrize(
    ("case", "equal", "said"),
    [
        (Traits(name="", length=9), [SHORT], "up to 7 tokens; by config.json sliding_window = 8"),
        (Traits(name="", length=8), [SHORT], "up to 7 tokens"),
        (Traits(name="", length=40), [SHORT, PADDED], "up to 16 tokens"),
        (Traits(name="", length=7, texts=2), [SHORT], "for 1 text at a time"),
        (Traits(name="", length=9, texts=3), [PADDED], "for 2 texts at a time"),
        (Traits(name="", length=9, texts=2, padding="left"), [PADDED], "without padding on the left"),
        (Traits(name="", length=16, cached=True), [PADDED], "without KV caches"),
        (
            Traits(name="", length=66, texts=2, padding="left"),
            [Traits(name="", length=64)],
            "up to 64 tokens, for 1 text at a time, without padding on the left; by config.json "
            "max_position_embeddings = 64",
        ),
        (Traits(name="", length=5), [SHORT, PADDED], "for '1 x 7', '2 x 16, padded right'"),
        (Traits(name="", length=0), [Traits(name="1 x 32 x 32 pixels", length=0)], "for '1 x 32 x 32 pixels'"),
    ],
)
def test_what_is_new_in_the_first_input_that_differs_is_named(case: Traits, equal: list[Traits], said: str) -> None:
    assert beginning(case, equal, BOUNDARIES) == f"the answers are equal {said}"


def test_no_equal_answer_is_no_beginning() -> None:
    assert beginning(SHORT, [], BOUNDARIES) == "the answers are different from the first on"


@pytest.mark.parametrize(("mask", "padding"), [([1, 1, 1], ""), ([0, 1, 1], "left"), ([1, 1, 0], "right")])
def test_traits_are_those_of_the_inputs(mask: list[int], padding: str) -> None:
    ids = np.zeros((2, 3), np.int64)
    inputs = {"input_ids": ids, "attention_mask": np.array([[1, 1, 1], mask])}
    found = Traits.of_question(Question(name="2 x 3", length=3, inputs=inputs))
    assert found == Traits(name="2 x 3", length=3, texts=2, padding=padding)
    assert Traits.of_prompt(Prompt(name="p", ids=ids), 4) == Traits(name="p", length=7, texts=2, cached=True)
