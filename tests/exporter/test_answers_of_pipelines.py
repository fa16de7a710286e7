"""A tiny seeded checkpoint, exported and streamed, answers as the pipelines of transformers do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.tasks.fakes import WORDS, write_bert_tokenizer
from tests.models import traced_here

import pipeload
from pipeload_export import export

transformers = pytest.importorskip("transformers")
pytest.importorskip("optimum.exporters.onnx")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONTEXT = "Anna is nice, the cat mats sat in London on the mat. Bob sat on the dog in Paris. " * 4
NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}


def _made(folder: Path, kind: str, pipeline: str, **config: Any) -> tuple[pipeload.Model, Any]:
    """The streamed model of a checkpoint with random weights, and the pipeline over the checkpoint."""
    import torch

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 64}
    settings = transformers.BertConfig(
        vocab_size=len(WORDS), initializer_range=0.3, max_position_embeddings=64, **shape, **config
    )
    model = getattr(transformers, kind)(settings).eval()
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    write_bert_tokenizer(checkpoint, model_max_length=64)
    with traced_here():
        export(checkpoint, folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return pipeload.load(folder / "model", "8GB"), getattr(transformers, pipeline)(
        model=model, tokenizer=tokenizer, framework="pt"
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of the pipeline itself
def test_questions_are_answered(tmp_path: Path) -> None:
    model, pipeline = _made(tmp_path, "BertForQuestionAnswering", "QuestionAnsweringPipeline")
    with model:
        mine = model.answer("is bob in paris", CONTEXT, top_k=3)
    theirs = pipeline(question="is bob in paris", context=CONTEXT, top_k=3)
    assert [(one.answer, one.start, one.end) for one in mine] == [(o["answer"], o["start"], o["end"]) for o in theirs]
    np.testing.assert_allclose([one.score for one in mine], [other["score"] for other in theirs], 1e-3)


def test_masks_are_filled(tmp_path: Path) -> None:
    model, pipeline = _made(tmp_path, "BertForMaskedLM", "FillMaskPipeline")
    with model:
        mine = model.fill_mask("the cat is [MASK] in paris")
    theirs = pipeline("the cat is [MASK] in paris")
    assert [(one.token, one.token_str, one.sequence) for one in mine] == [
        (other["token"], other["token_str"], other["sequence"]) for other in theirs
    ]
    np.testing.assert_allclose([one.score for one in mine], [other["score"] for other in theirs], 1e-3)


def test_pairs_and_labels_of_the_caller(tmp_path: Path) -> None:
    names = {"id2label": NLI, "label2id": {name: index for index, name in NLI.items()}}
    model, pipeline = _made(tmp_path, "BertForSequenceClassification", "ZeroShotClassificationPipeline", **names)
    pairs = transformers.TextClassificationPipeline(model=pipeline.model, tokenizer=pipeline.tokenizer, framework="pt")
    with model:
        mine = model.zero_shot("anna sat on the mat", ["cat", "dog", "paris"])
        pair = model.classify(("the cat sat", "bob is in london"))
    theirs = pipeline("anna sat on the mat", ["cat", "dog", "paris"])
    assert [label.label for label in mine] == theirs["labels"]
    np.testing.assert_allclose([label.score for label in mine], theirs["scores"], 1e-3)
    expected = pairs({"text": "the cat sat", "text_pair": "bob is in london"}, top_k=None)
    assert [label.label for label in pair] == [label["label"] for label in expected]
    np.testing.assert_allclose([label.score for label in pair], [label["score"] for label in expected], 1e-3)
