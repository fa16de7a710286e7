"""Answers to questions, as transformers' question-answering pipeline finds them with the same seeded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.tasks.fakes import WORDS, ToyRunner, manifest, run_by_torch, write_bert_tokenizer, write_json

from pipeload.errors import ConfigError
from pipeload.tasks.answer.answer import answer

pytest.importorskip("tokenizers")

QUESTION = "is bob in paris"
SHORT = "Anna is nice, the CAT   mats sat xyz in London on the mat."
LONG = " ".join(f"{word}s {WORDS[5 + place % 7]} Bob" for place, word in enumerate(WORDS[5:] * 4))


def _bert(directory: Path, **settings: object) -> tuple[ToyRunner, Any]:
    """A seeded BERT: as a runner, and as the pipeline of transformers."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    write_bert_tokenizer(directory, **settings)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), initializer_range=1.0, **shape)
    write_json(directory, "config.json", config.to_dict())
    model = transformers.BertForQuestionAnswering(config).eval()
    outputs: dict[str, tuple[int | str, ...]] = dict.fromkeys(
        ("start_logits", "end_logits"), ("batch_size", "sequence_length")
    )
    runner = ToyRunner(directory, manifest("question-answering", outputs=outputs), run_by_torch(model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return runner, transformers.QuestionAnsweringPipeline(model=model, tokenizer=tokenizer, framework="pt")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of the pipeline itself
@pytest.mark.parametrize("context", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("options", [{}, {"handle_impossible_answer": True}, {"max_answer_len": 3}])
@pytest.mark.parametrize("top_k", [None, 4])
def test_answers_equal_those_of_transformers(
    tmp_path: Path, context: str, options: dict[str, Any], top_k: int | None
) -> None:
    runner, pipeline = _bert(tmp_path, model_max_length=48)
    mine: Any = answer(runner, QUESTION, context, top_k=top_k, **options)
    theirs = pipeline(question=QUESTION, context=context, top_k=top_k or 1, **options)
    if top_k is None:
        mine, theirs = [mine], [theirs]
    assert [(one.answer, one.start, one.end) for one in mine] == [
        (one["answer"], one["start"], one["end"]) for one in theirs
    ]
    np.testing.assert_allclose([one.score for one in mine], [one["score"] for one in theirs], 1e-4)
    assert len(runner.calls[0]["input_ids"]) == (1 if context == SHORT else 15)


@pytest.mark.parametrize("context", [SHORT, LONG], ids=["short", "long"])
def test_an_answer_lies_in_the_context_where_that_comes_first(tmp_path: Path, context: str) -> None:
    """Where a tokenizer pads on the left; the pipeline of transformers then also finds answers in the question."""
    runner, _ = _bert(tmp_path, padding_side="left", model_max_length=48)
    found = answer(runner, QUESTION, context, top_k=6)
    assert len(found) == 6
    assert [context[one.start : one.end] for one in found] == [one.answer for one in found]
    assert all(one.answer for one in found)


def test_lists_of_questions_have_lists_of_answers(tmp_path: Path) -> None:
    runner, _ = _bert(tmp_path, model_max_length=48)
    one, other = answer(runner, QUESTION, SHORT), answer(runner, "the cat", LONG)
    runner.calls.clear()
    both = answer(runner, [QUESTION, "the cat"], [SHORT, LONG])
    assert [(found.answer, found.start, found.end) for found in both] == [
        (found.answer, found.start, found.end) for found in (one, other)
    ]
    assert len(runner.calls) == 1, "a sweep over the weights serves the windows of all questions"
    assert answer(runner, [QUESTION], SHORT) == [one]
    assert answer(runner, [QUESTION], SHORT, top_k=2) == [answer(runner, QUESTION, SHORT, top_k=2)]
    assert answer(runner, [], SHORT) == []
    assert SHORT[one.start : one.end] == one.answer


@pytest.mark.parametrize(
    ("question", "context", "message"),
    [
        (QUESTION, [SHORT], "There are 1 questions and 1 contexts. Give a list of questions"),
        ([QUESTION], [SHORT, SHORT], "There are 1 questions and 2 contexts"),
        (None, SHORT, "question must be a string or a list of strings, not NoneType"),
        ([5], SHORT, "must be a string, not int"),
        (QUESTION, " ", "The context is empty"),
        ("", SHORT, "The question is empty"),
        ("the cat sat on " * 12, SHORT * 3, "The short text has 48 tokens, which leave 0 of 48"),
    ],
)
def test_what_cannot_be_answered_is_refused(tmp_path: Path, question: Any, context: Any, message: str) -> None:
    runner, _ = _bert(tmp_path, model_max_length=48)
    with pytest.raises(ConfigError, match=message):
        answer(runner, question, context)
    for wrong in ({"top_k": 0}, {"max_answer_len": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be at least 1"):
            answer(runner, QUESTION, SHORT, **wrong)


def test_other_models_are_refused(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    runner = ToyRunner(tmp_path, manifest("fill-mask"), lambda _: {"logits": np.zeros((1, 3))})
    with pytest.raises(ConfigError, match="this one is for fill-mask"):
        answer(runner, QUESTION, SHORT)
    runner.manifest = manifest("question-answering")
    with pytest.raises(ConfigError, match="no output 'start_logits', only logits"):
        answer(runner, QUESTION, SHORT)
