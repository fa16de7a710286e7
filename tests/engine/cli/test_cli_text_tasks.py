"""`pipeload zero-shot`, `rerank`, `answer` and `fill-mask`, and `classify --pair`: what Python gives, printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.cli.toy_models import Call, classifier_in
from tests.engine.tasks.fakes import WORDS, ToyRunner, manifest, write_bert_tokenizer, write_json

from pipeload.errors import ConfigError
from pipeload.tasks.answer.answer import answer
from pipeload.tasks.classify.classify import classify
from pipeload.tasks.classify.rerank import rerank
from pipeload.tasks.classify.zero_shot import zero_shot
from pipeload.tasks.fill.fill_mask import fill_mask

pytest.importorskip("tokenizers")

DOCUMENTS = ["the cat sat", "anna is nice", "bob sat on the mat"]
TEXT = "anna is nice the cat mats sat in london on the mat"


def _logits(ids: Any, width: int) -> Any:
    """Logits that depend on all tokens, `[batch, width]`."""
    table = np.random.default_rng(1).standard_normal((len(WORDS), width)).astype(np.float32)
    return table[ids].sum(1)


def _scorer(directory: Path, labels: Mapping[str, str]) -> ToyRunner:
    write_bert_tokenizer(directory)
    write_json(directory, "config.json", {"id2label": labels})
    runner = manifest("text-classification")
    return ToyRunner(directory, runner, lambda inputs: {"logits": _logits(inputs["input_ids"], len(labels))})


def _reader(directory: Path, task: str, *outputs: str) -> ToyRunner:
    """A model that gives for each token one figure an output, or one for each word."""
    write_bert_tokenizer(directory)
    table = np.random.default_rng(2).standard_normal((len(WORDS), len(WORDS))).astype(np.float32)

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        found = (
            table[inputs["input_ids"]] + np.arange(inputs["input_ids"].shape[1], dtype=np.float32)[None, :, None] % 3
        )
        return {name: found if name == "logits" else found[..., place] for place, name in enumerate(outputs)}

    shapes: dict[str, tuple[int | str, ...]] = dict.fromkeys(outputs, ("batch_size", "sequence_length"))
    return ToyRunner(directory, manifest(task, outputs=None if outputs == ("logits",) else shapes), run)


def test_zero_shot_prints_the_labels_of_each_text(tmp_path: Path, call: Call) -> None:
    runner = _scorer(tmp_path, {"0": "contradiction", "1": "neutral", "2": "entailment"})
    for options, given in ([], {}), (["--multi-label", "--template", "the {} sat"], {"multi_label": True}):
        template = {"hypothesis_template": "the {} sat"} if given else {}
        expected = zero_shot(runner, DOCUMENTS[:2], ["cat", "bob"], **given, **template)  # type: ignore[arg-type]
        result = call(runner, "zero-shot", *DOCUMENTS[:2], "--labels", "cat, bob", *options)
        assert result.stdout == "".join(
            f"{text}\n" + "".join(f"  {label.score:.4f}  {label.label}\n" for label in labels)
            for text, labels in zip(DOCUMENTS, expected, strict=False)
        )
    rows = json.loads(call(runner, "zero-shot", "-", "--labels=cat,bob", "--json", stdin="the cat sat\n").stdout)
    assert rows == [
        {"input": "the cat sat", "labels": [asdict(each) for each in zero_shot(runner, DOCUMENTS[0], ["cat", "bob"])]}
    ]


def test_rerank_prints_the_best_document_first(tmp_path: Path, call: Call) -> None:
    runner = _scorer(tmp_path, {"0": "LABEL_0"})
    expected = rerank(runner, "the mat", DOCUMENTS)
    result = call(runner, "rerank", "the mat", *DOCUMENTS)
    assert result.stdout == "".join(f"{one.score:9.4f}  {one.index}  {one.text}\n" for one in expected)
    (tmp_path / "documents.txt").write_text("\n".join(DOCUMENTS))
    result = call(runner, "rerank", "the mat", f"--file={tmp_path}/documents.txt", "--top-k=1", "--json")
    assert json.loads(result.stdout) == [asdict(expected[0])]


def test_answer_prints_the_stretches_with_their_places(tmp_path: Path, call: Call) -> None:
    runner = _reader(tmp_path, "question-answering", "start_logits", "end_logits")
    expected = answer(runner, "the cat", TEXT, top_k=3)
    result = call(runner, "answer", "the cat", TEXT, "--top-k=3")
    assert result.stdout == "".join(f"{one.score:.4f}  {one.answer}  {one.start}-{one.end}\n" for one in expected)
    assert all(TEXT[one.start : one.end] == one.answer for one in expected)
    (tmp_path / "text").write_text(TEXT)
    for source, stdin in ((f"--file={tmp_path}/text", ""), ("-", TEXT)):
        found = json.loads(call(runner, "answer", "the cat", source, "--json", "--impossible", stdin=stdin).stdout)
        assert found == [asdict(answer(runner, "the cat", TEXT, handle_impossible_answer=True))]


@pytest.mark.parametrize("arguments", [(), (TEXT, "--file=/dev/null")])
def test_answer_takes_its_text_from_one_place(tmp_path: Path, call: Call, arguments: tuple[str, ...]) -> None:
    runner = _reader(tmp_path, "question-answering", "start_logits", "end_logits")
    result = call(runner, "answer", "the cat", *arguments)
    assert result.exit_code == 2
    assert "one of them" in result.stderr


def test_fill_mask_prints_tokens_below_each_text(tmp_path: Path, call: Call) -> None:
    runner = _reader(tmp_path, "fill-mask", "logits")
    texts = ["the cat is [MASK]", "the [MASK] sat on [MASK] mats"]
    one, two = fill_mask(runner, texts, top_k=2)
    lines = [[f"  {each.score:.4f}  {each.token_str}  {each.sequence}" for each in mask] for mask in (one, *two)]  # type: ignore[misc]
    result = call(runner, "fill-mask", *texts, "--top-k=2")
    assert result.stdout.splitlines() == [texts[0], *lines[0], texts[1], *lines[1], "", *lines[2]]
    rows = json.loads(call(runner, "fill-mask", texts[0], "--top-k=2", "--json").stdout)
    assert rows == [{"text": texts[0], "filled": [asdict(each) for each in one]}]


def test_classify_takes_the_second_text_of_a_pair(tmp_path: Path, call: Call) -> None:
    runner = _scorer(tmp_path, {"0": "no", "1": "yes"})
    expected = classify(runner, ("the cat", "bob sat"))
    result = call(runner, "classify", "the cat", "--pair", "bob sat")
    assert result.stdout == "the cat\n" + "".join(f"  {label.score:.4f}  {label.label}\n" for label in expected)
    assert result.stdout != call(runner, "classify", "the cat").stdout


def test_images_have_no_second_text(tmp_path: Path, call: Call) -> None:
    runner = classifier_in(tmp_path)
    runner.manifest = manifest("image-classification")
    result = call(runner, "classify", "cat.jpg", "--pair", "a cat")
    assert result.exit_code == 2
    assert "--pair is a second text, and this model takes images" in result.stderr


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("zero-shot", ("a text", "--labels=a")),
        ("rerank", ("a text", "a document")),
        ("answer", ("a question", "a text")),
        ("fill-mask", ("a [MASK]",)),
    ],
)
def test_a_model_for_another_task_is_refused_by_name(
    tmp_path: Path, call: Call, command: str, arguments: tuple[str, ...]
) -> None:
    runner = classifier_in(tmp_path)
    runner.manifest = manifest("feature-extraction")
    result = call(runner, command, *arguments)
    assert isinstance(result.exception, ConfigError)
    assert "feature-extraction" in str(result.exception)
    assert result.stdout == ""
