"""Masks are filled as transformers' fill-mask pipeline fills them with the same seeded weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.tasks.fakes import WORDS, ToyRunner, manifest, run_by_torch, write_bert_tokenizer, write_json

from pipeload.errors import ConfigError, TruncationWarning
from pipeload.tasks.fill.fill_mask import fill_mask

pytest.importorskip("tokenizers")

ONE, TWO, LONG = "the cat is [MASK]", "the [MASK] sat on [MASK] mats", "anna [MASK] bob sat on the mat in london"


def _bert(directory: Path) -> tuple[ToyRunner, Any]:
    """A seeded BERT: as a runner, and as the pipeline of transformers."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    write_bert_tokenizer(directory)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), initializer_range=0.5, **shape)
    write_json(directory, "config.json", config.to_dict())
    model = transformers.BertForMaskedLM(config).eval()
    runner = ToyRunner(directory, manifest("fill-mask"), run_by_torch(model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return runner, transformers.FillMaskPipeline(model=model, tokenizer=tokenizer, framework="pt")


@pytest.mark.parametrize("text", [ONE, TWO, LONG])
def test_filled_masks_equal_those_of_transformers(tmp_path: Path, text: str) -> None:
    runner, pipeline = _bert(tmp_path)
    mine: Any = fill_mask(runner, text, top_k=7)
    theirs = pipeline(text, top_k=7)
    if text != TWO:
        mine, theirs = [mine], [theirs]
    assert len(mine) == text.count("[MASK]")
    for one, other in zip(mine, theirs, strict=True):
        for filled, expected in zip(one, other, strict=True):
            facts = asdict(filled)
            assert facts.pop("score") == pytest.approx(expected.pop("score"), rel=1e-4)
            assert facts == expected


def test_a_list_of_texts_has_a_list_of_lists_in_its_order(tmp_path: Path) -> None:
    runner, _ = _bert(tmp_path)
    alone = [fill_mask(runner, text) for text in (ONE, LONG)]
    together = fill_mask(runner, [ONE, LONG], batch_size=2)
    assert [[one.token for one in each] for each in together] == [[one.token for one in each] for each in alone]
    assert len(together[0]) == 5
    assert fill_mask(runner, []) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("the cat", r"has no mask: 'the cat'. Write \[MASK\] in the place to fill"),
        (None, "must be a string or a sequence of strings, not NoneType"),
        ([5], "must be a string, not int"),
    ],
)
def test_texts_without_a_mask_are_refused(tmp_path: Path, texts: Any, message: str) -> None:
    runner, _ = _bert(tmp_path)
    with pytest.raises(ConfigError, match=message):
        fill_mask(runner, texts)


def test_a_mask_behind_the_end_is_refused(tmp_path: Path) -> None:
    runner, _ = _bert(tmp_path)
    with pytest.warns(TruncationWarning), pytest.raises(ConfigError, match="within the first 16 tokens"):
        fill_mask(runner, "sat " * 20 + "[MASK]")


def test_models_that_fill_no_masks_are_refused(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path, mask_token=None)
    runner = ToyRunner(tmp_path, manifest("text-classification"), lambda _: {"logits": np.zeros((1, 3))})
    with pytest.raises(ConfigError, match="this one is for text-classification"):
        fill_mask(runner, ONE)
    runner.manifest = manifest("fill-mask")
    with pytest.raises(ConfigError, match="names no mask_token"):
        fill_mask(runner, ONE)
