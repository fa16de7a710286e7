from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from tests.engine.tasks.fakes import (
    WORDS,
    Array,
    ToyRunner,
    manifest,
    run_by_torch,
    write_bert_tokenizer,
    write_gpt_tokenizer,
    write_json,
)

from pipeload.errors import ConfigError
from pipeload.tasks.classify.classify import classify
from pipeload.tasks.classify.entities import Aggregation, Entity
from pipeload.tasks.classify.labels import Label, scores

pytest.importorskip("tokenizers")

LABELS = {"0": "bad", "1": "fair", "2": "good"}
TAGS = {"0": "O", "1": "B-PER", "2": "I-PER", "3": "B-LOC", "4": "I-LOC"}


def _runner(directory: Path, logits: Array | None = None, **config: object) -> ToyRunner:
    """A text classifier whose logits are looked up by the first token after [CLS]."""
    write_bert_tokenizer(directory)
    write_json(directory, "config.json", {"id2label": LABELS} | config)
    table = np.tile(np.array([[0, 1, 2]], np.float32), (30, 1)) if logits is None else logits
    return ToyRunner(
        directory, manifest("text-classification"), lambda inputs: {"logits": table[inputs["input_ids"][:, 1]]}
    )


def test_labels_come_best_first() -> None:
    expected = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    np.testing.assert_allclose(scores(np.array([0, 1, 2], np.float32), None), expected, rtol=1e-6)


def test_one_text_has_a_list_of_labels_and_a_list_a_list_of_lists(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    one = classify(runner, "the cat")
    assert [label.label for label in one] == ["good", "fair", "bad"]
    assert sum(label.score for label in one) == pytest.approx(1)
    assert classify(runner, ["the cat"]) == [one]
    assert classify(runner, []) == []


def test_a_model_that_labels_the_last_token_gets_one_text_at_a_time(tmp_path: Path) -> None:
    """A decoder whose config names no token for padding: it would read the padding of shorter texts."""
    runner = _runner(tmp_path, pad_token_id=-1)
    runner.function = lambda inputs: {"logits": np.float32([[0, 1, 2]]) * inputs["input_ids"][:, -1:]}
    texts = ["the cat sat", "dog", "the cat"]
    assert classify(runner, texts) == [classify(runner, text) for text in texts]
    assert {len(call["input_ids"]) for call in runner.calls} == {1}


def test_top_k_cuts_the_labels(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    assert len(classify(runner, "dog", top_k=1)) == 1
    assert len(classify(runner, "dog", top_k=9)) == 3
    assert len(classify(runner, "dog", top_k=None)) == 3
    with pytest.raises(ConfigError, match="top_k must be at least 1"):
        classify(runner, "dog", top_k=0)


def test_results_come_in_the_order_of_the_texts(tmp_path: Path) -> None:
    table = np.zeros((30, 3), np.float32)
    table[[5, 6, 7], [0, 1, 2]] = 5
    runner = _runner(tmp_path, table)
    texts = ["dog", "the cat sat on the mat", "cat sat"]
    assert [labels[0].label for labels in classify(runner, texts, batch_size=2)] == ["good", "bad", "fair"]


@pytest.mark.parametrize(
    ("config", "logits", "expected"),
    [
        ({}, [-1, 2], [0.04742587, 0.95257413]),
        ({"problem_type": "single_label_classification"}, [-1, 2], [0.04742587, 0.95257413]),
        ({"problem_type": "multi_label_classification"}, [-1, 2], [0.26894142, 0.88079708]),
        ({"problem_type": "regression"}, [-1, 2], [-1, 2]),
        ({"problem_type": "regression"}, [3.5], [3.5]),
        ({}, [2], [0.88079708]),
        ({"problem_type": "multi_label_classification"}, [-1000, 1000], [0, 1]),
        ({}, [-1000, 1000], [0, 1]),
    ],
)
def test_scores_follow_the_problem_type(config: dict[str, str], logits: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(scores(np.array([logits], np.float32), config.get("problem_type"))[0], expected, 1e-6)


def test_labels_without_names_are_numbered(tmp_path: Path) -> None:
    assert classify(_runner(tmp_path, id2label={}), "dog")[0].label == "LABEL_2"


def test_other_models_are_refused(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    runner.manifest = manifest("fill-mask")
    with pytest.raises(ConfigError, match="this one is for fill-mask"):
        classify(runner, "dog")


def test_a_model_without_logits_is_refused(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    runner.function = lambda _: {"scores": np.zeros((1, 3))}
    with pytest.raises(ConfigError, match="no output 'logits', only scores"):
        classify(runner, "dog")


def _tagger(directory: Path, tags: Mapping[str, int]) -> ToyRunner:
    write_bert_tokenizer(directory)
    write_json(directory, "config.json", {"id2label": TAGS, "model_type": "bert"})
    table = np.full((len(WORDS), len(TAGS)), -2, np.float32)
    table[:, 0] = 1
    for word, tag in tags.items():
        table[WORDS.index(word), tag] = 3 + len(word) / 10
    shape = {"logits": ("batch_size", "sequence_length", len(TAGS))}
    return ToyRunner(
        directory,
        manifest("token-classification", outputs=shape),
        lambda inputs: {"logits": table[inputs["input_ids"]]},
    )


def test_entities_are_runs_of_tokens_of_one_tag(tmp_path: Path) -> None:
    runner = _tagger(tmp_path, {"anna": 1, "bob": 2, "paris": 3, "london": 3, "##s": 4, "[CLS]": 1})
    text = "Anna Bob sat in Paris London  pariss"
    found = classify(runner, text)
    assert [(e.label, e.word, text[e.start : e.end]) for e in found if isinstance(e, Entity)] == [
        ("PER", "anna bob", "Anna Bob"),
        ("LOC", "paris", "Paris"),
        ("LOC", "london", "London"),
        ("LOC", "pariss", "pariss"),
    ]
    assert all(isinstance(entity, Label) for entity in found)


@pytest.mark.parametrize("side", ["left", "right"])
def test_entities_in_a_batch_are_those_of_each_text_alone(tmp_path: Path, side: str) -> None:
    runner = _tagger(tmp_path, {"anna": 1, "paris": 3, "[PAD]": 1})
    write_bert_tokenizer(tmp_path, padding_side=side)
    texts = ["the cat", "anna is in paris the nice", "paris"]
    assert classify(runner, texts) == [classify(runner, text) for text in texts]


@pytest.mark.parametrize("strategy", get_args(Aggregation))
@pytest.mark.parametrize("words", ["marked", "apart"])
def test_entities_equal_those_of_transformers(tmp_path: Path, words: str, strategy: Aggregation) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    runner = _tagger(tmp_path, {})
    if words == "apart":
        write_gpt_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    labels = {int(index): tag for index, tag in TAGS.items()}
    config = transformers.BertConfig(vocab_size=len(tokenizer), id2label=labels, initializer_range=3.0, **shape)
    model = transformers.BertForTokenClassification(config).eval()
    runner.function = run_by_torch(model)
    pipeline = transformers.TokenClassificationPipeline(
        model=model,
        tokenizer=tokenizer,
        framework="pt",
        aggregation_strategy=strategy,
    )
    texts = ["Anna and Bob sat in Paris", "xyz zyx the CAT   mats", "London", "the cats nicely", "Anna,Bob-mats. cat"]
    ours = classify(runner, texts, aggregation_strategy=strategy)
    for text, found in zip(texts, ours, strict=True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Tokenizer does not support real words")
            theirs = pipeline(text)
        assert len(found) == len(theirs)
        for mine, other in zip(found, theirs, strict=True):
            facts = asdict(mine)
            assert facts.pop("label") == other.pop("entity" if strategy == "none" else "entity_group")
            other.pop("index", None)
            assert facts.pop("score") == pytest.approx(other.pop("score"), rel=1e-4)
            assert facts == other
    assert sum(map(len, ours)) > 4


def test_an_aggregation_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="aggregation_strategy is 'last'; choose one of none, simple, first, av"):
        classify(_tagger(tmp_path, {}), "anna", aggregation_strategy="last")  # type: ignore[call-overload]


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification", "regression"])
def test_labels_equal_those_of_transformers(tmp_path: Path, problem_type: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    runner = _runner(tmp_path, problem_type=problem_type, model_type="bert")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    labels = {int(index): label for index, label in LABELS.items()}
    config = transformers.BertConfig(
        vocab_size=len(WORDS), id2label=labels, problem_type=problem_type, initializer_range=0.5, **shape
    )
    model = transformers.BertForSequenceClassification(config).eval()
    runner.function = run_by_torch(model)
    pipeline = transformers.TextClassificationPipeline(
        model=model, tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path), framework="pt"
    )
    texts = ["the cat sat", "dog", "Anna is nice"]
    for mine, theirs in zip(classify(runner, texts), pipeline(texts, top_k=None), strict=True):
        assert [label.label for label in mine] == [label["label"] for label in theirs]
        np.testing.assert_allclose([label.score for label in mine], [label["score"] for label in theirs], 1e-5)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_model_of_images_has_no_regression(tmp_path: Path, labels: int) -> None:
    """As the pipeline of transformers: one label takes the sigmoid, several the softmax, whatever the config says."""
    images = pytest.importorskip("PIL.Image")
    write_json(
        tmp_path, "config.json", {"id2label": {str(i): str(i) for i in range(labels)}, "problem_type": "regression"}
    )
    write_json(tmp_path, "preprocessor_config.json", {"size": {"height": 4, "width": 4}})
    logits = np.array([[2.0, 1.0, 0.5]], np.float32)[:, :labels]
    shape = {"pixel_values": ("batch_size", 3, 4, 4)}
    runner = ToyRunner(tmp_path, manifest("image-classification", inputs=shape), lambda _: {"logits": logits})
    found = classify(runner, images.new("RGB", (4, 4)), top_k=None)
    expected = scores(logits[0], None)
    assert [label.score for label in found] == pytest.approx(sorted(expected, reverse=True))
