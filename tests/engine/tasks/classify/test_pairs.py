"""Two texts at once: pairs for classify, rerank and zero_shot, with the answers of the pipelines of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.tasks.fakes import WORDS, ToyRunner, manifest, run_by_torch, write_bert_tokenizer, write_json

from pipeload.errors import ConfigError, TruncationWarning
from pipeload.tasks.classify.classify import classify
from pipeload.tasks.classify.rerank import Ranked, rerank
from pipeload.tasks.classify.zero_shot import zero_shot
from pipeload.tasks.images import Image
from pipeload.tasks.text.tokenizer import tokenizer_of

pytest.importorskip("tokenizers")

NLI = {"0": "contradiction", "1": "neutral", "2": "entailment"}
QUERY, DOCUMENTS = "is bob in paris", ["bob is in london", "the cat sat", "anna", "nice paris is the in the mat"]


def _toy(directory: Path, classes: int = 3, **config: object) -> ToyRunner:
    """A classifier whose logits tell the sum of the ids and of the segments."""
    write_bert_tokenizer(directory)
    write_json(directory, "config.json", {"id2label": {str(i): NLI[str(i)] for i in range(classes)}} | config)

    def function(inputs: Any) -> Any:
        sums = inputs["input_ids"].sum(axis=1) / 100, inputs["token_type_ids"].sum(axis=1), inputs["input_ids"][:, 1]
        return {"logits": np.stack(sums, axis=1).astype(np.float32)[:, :classes]}

    return ToyRunner(directory, manifest("text-classification"), function)


def _bert(directory: Path, classes: dict[str, str], **config: object) -> tuple[ToyRunner, Any, Any]:
    """A seeded BERT: as a runner, and as transformers has it with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    runner = _toy(directory)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
    labels = {int(index): label for index, label in classes.items()}
    names = {"id2label": labels, "label2id": {label: index for index, label in labels.items()}}
    torch.manual_seed(0)
    settings = transformers.BertConfig(vocab_size=len(WORDS), initializer_range=0.5, **names, **shape, **config)
    write_json(directory, "config.json", settings.to_dict())
    model = transformers.BertForSequenceClassification(settings).eval()
    runner.function = run_by_torch(model)
    return runner, model, transformers.AutoTokenizer.from_pretrained(directory)


def test_pairs_have_the_labels_of_transformers(tmp_path: Path) -> None:
    runner, model, tokenizer = _bert(tmp_path, NLI)
    transformers = pytest.importorskip("transformers")
    pipeline = transformers.TextClassificationPipeline(model=model, tokenizer=tokenizer, framework="pt")
    theirs = [pipeline({"text": QUERY, "text_pair": document}, top_k=None) for document in DOCUMENTS]
    ours = classify(runner, [(QUERY, document) for document in DOCUMENTS])
    for mine, other in zip(ours, theirs, strict=True):
        assert [label.label for label in mine] == [label["label"] for label in other]
        np.testing.assert_allclose([label.score for label in mine], [label["score"] for label in other], 1e-5)


def test_a_pair_is_one_input_in_every_form(tmp_path: Path) -> None:
    runner = _toy(tmp_path)
    one = classify(runner, ("the cat", "the dog"))
    assert one == classify(runner, {"text": "the cat", "text_pair": "the dog"})
    assert [one] == classify(runner, [("the cat", "the dog")])
    several: list[Any] = [["the cat", "the dog"], {"text": "the cat", "text_pair": "the dog"}]
    assert classify(runner, several) == [one, one]
    assert one != classify(runner, ["the cat", "the dog"])[0]
    assert classify(runner, {"text": "the cat"}) == classify(runner, "the cat")


def test_a_list_of_two_texts_is_two_texts(tmp_path: Path) -> None:
    runner = _toy(tmp_path)
    assert classify(runner, ["the cat", "dog"]) == [classify(runner, "the cat"), classify(runner, "dog")]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("a", "b", "c"), "A tuple is one pair, .* this one has 3 entries"),
        (("a",), "this one has 1 entries"),
        ([("a", "b", "c")], "A pair has two texts"),
        ({"a": 1}, "has the keys 'text' and 'text_pair'"),
        ({"text_pair": "a"}, "has the keys"),
        (("a", 5), "must be a string, not int"),
        ([5], "must be a string, not int"),
        (None, "must be a string or a sequence of strings, not NoneType"),
        (5, "not int"),
        (iter(["a"]), "not list_iterator"),
        (b"a", "not bytes"),
    ],
)
def test_what_is_neither_text_nor_pair_is_refused(tmp_path: Path, wrong: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classify(_toy(tmp_path), wrong)


def test_a_token_classifier_takes_no_pairs(tmp_path: Path) -> None:
    runner = _toy(tmp_path)
    runner.manifest = manifest("token-classification")
    with pytest.raises(ConfigError, match="single texts, not pairs"):
        classify(runner, ("a", "b"))


def test_two_images_in_a_tuple_are_two_images(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    write_json(tmp_path, "config.json", {"image_size": 2})
    runner = ToyRunner(
        tmp_path,
        manifest("image-classification", ("pixel_values",), dtype="float32"),
        lambda inputs: {"logits": inputs["pixel_values"][:, 0, 0]},
    )
    image: Image = np.zeros((2, 2, 3), np.uint8)
    assert len(classify(runner, (image, image))) == 2


def test_a_long_pair_loses_tokens_of_its_longer_text(tmp_path: Path) -> None:
    runner = _toy(tmp_path)
    with pytest.warns(TruncationWarning):
        classify(runner, ("the cat", "sat " * 40))
    (call,) = runner.calls
    tokenizer = tokenizer_of(runner)
    assert tokenizer.decode(call["input_ids"][0], special=True) == "[CLS] the cat [SEP] " + "sat " * 11 + "[SEP]"


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("labels", [["cat", "the dog", "paris"], ["cat"], "cat, the dog"])
@pytest.mark.parametrize("classes", [NLI, {"0": "ENTAILMENT", "1": "not_entailment"}])
def test_zero_shot_gives_the_scores_of_transformers(
    tmp_path: Path, multi_label: bool, labels: Any, classes: dict[str, str]
) -> None:
    runner, model, tokenizer = _bert(tmp_path, classes)
    transformers = pytest.importorskip("transformers")
    pipeline = transformers.ZeroShotClassificationPipeline(model=model, tokenizer=tokenizer, framework="pt")
    texts, template = ["anna sat", "bob is in london"], "this is {}"
    ours = zero_shot(runner, texts, labels, hypothesis_template=template, multi_label=multi_label)
    theirs = pipeline(texts, labels, hypothesis_template=template, multi_label=multi_label)
    for mine, other in zip(ours, theirs, strict=True):
        assert [label.label for label in mine] == other["labels"]
        np.testing.assert_allclose([label.score for label in mine], other["scores"], 1e-5)
    alone = zero_shot(runner, texts[0], labels, hypothesis_template=template, multi_label=multi_label)
    assert [label.label for label in alone] == [label.label for label in ours[0]]


def test_zero_shot_needs_a_model_of_entailment_and_labels(tmp_path: Path) -> None:
    runner = _toy(tmp_path)
    for labels, template, message in (
        ([], "a {}", "candidate_labels is empty"),
        ([5], "a {}", "must be a string, not int"),
        (None, "a {}", "candidate_labels must be a sequence"),
        (["a"], "a", "in place of the label"),
    ):
        with pytest.raises(ConfigError, match=message):
            zero_shot(runner, "cat", labels, hypothesis_template=template)  # type: ignore[arg-type]
    write_json(tmp_path, "config.json", {"id2label": {"0": "not_entailment", "1": "good"}})
    with pytest.raises(ConfigError, match="the labels of this one are: not_entailment, good"):
        zero_shot(ToyRunner(tmp_path, runner.manifest, runner.function), "cat", ["a"])


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({}, "Sigmoid"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "Identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "Identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, "Sigmoid"),
    ],
)
def test_rerank_orders_documents_by_the_scores_of_pairs(
    tmp_path: Path, config: dict[str, object], activation: str
) -> None:
    runner, model, tokenizer = _bert(tmp_path, {"0": "LABEL_0"}, **config)
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        logits = model(**tokenizer([QUERY] * 4, DOCUMENTS, padding=True, return_tensors="pt")).logits[:, 0]
    expected = (torch.sigmoid(logits) if activation == "Sigmoid" else logits).numpy()
    ranked = rerank(runner, QUERY, DOCUMENTS)
    assert [one.index for one in ranked] == np.argsort(-expected).tolist()
    np.testing.assert_allclose([one.score for one in ranked], np.sort(expected)[::-1], 1e-5)
    assert [one.text for one in ranked] == [DOCUMENTS[one.index] for one in ranked]
    assert rerank(runner, QUERY, DOCUMENTS, top_k=2) == ranked[:2]
    assert rerank(runner, QUERY, []) == []


def test_rerank_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this one has 3 labels"):
        rerank(_toy(tmp_path), QUERY, DOCUMENTS)
    with pytest.raises(ConfigError, match="documents must be a sequence of strings, not str"):
        rerank(_toy(tmp_path, 1), QUERY, "a document")
    with pytest.raises(ConfigError, match="go through 'Tanh'"):
        rerank(_toy(tmp_path, 1, sbert_ce_default_activation_function="torch.nn.Tanh"), QUERY, DOCUMENTS)
    other = _toy(tmp_path)
    other.manifest = manifest("fill-mask")
    for call in (lambda: rerank(other, QUERY, DOCUMENTS), lambda: zero_shot(other, "cat", ["a"])):
        with pytest.raises(ConfigError, match="takes a model for text-classification; this one is for fill-mask"):
            call()
    assert rerank(_toy(tmp_path, 1), QUERY, DOCUMENTS[:1]) == [Ranked(0, pytest.approx(0.63, abs=0.2), DOCUMENTS[0])]
