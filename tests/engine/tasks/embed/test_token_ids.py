"""Texts that the caller has turned into tokens have the vectors of the texts themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tests.engine.tasks.fakes import WORDS, Array, ToyRunner, manifest, write_bert_tokenizer, write_json

from pipeload.errors import ConfigError, TruncationWarning
from pipeload.tasks.embed.embed import embed
from pipeload.tasks.text.tokenizer import tokenizer_of

pytest.importorskip("tokenizers")

_TABLE = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)


def _hidden(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"last_hidden_state": _TABLE[inputs["input_ids"]]}


def _runner(directory: Path) -> ToyRunner:
    write_bert_tokenizer(directory)
    write_json(directory, "config.json", {"vocab_size": len(WORDS)})
    shape = {"last_hidden_state": ("batch_size", "sequence_length", 4)}
    return ToyRunner(directory, manifest("feature-extraction", outputs=shape), _hidden)


def test_token_ids_have_the_vectors_of_their_texts(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    texts = ["the cat", "the dog sat on the mat", "anna"]
    rows = [list(tokenizer_of(runner).encode(text).ids) for text in texts]
    np.testing.assert_array_equal(embed(runner, rows), embed(runner, texts))
    np.testing.assert_array_equal(embed(runner, [tuple(row) for row in rows]), embed(runner, texts))
    np.testing.assert_array_equal(embed(runner, [np.array(row) for row in rows]), embed(runner, texts))


def test_more_token_ids_than_the_model_takes_are_cut(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    with pytest.warns(TruncationWarning):
        vectors = embed(runner, [[6] * 20])
    np.testing.assert_array_equal(vectors, embed(runner, [[6] * 16]))


@pytest.mark.parametrize("ids", [[len(WORDS)], [-1], [1.5], [True], ["the"], b"the", None])
def test_what_is_no_token_id_is_refused(tmp_path: Path, ids: object) -> None:
    with pytest.raises(ConfigError, match=f"A text must be a string, or token ids from 0 to {len(WORDS) - 1}"):
        embed(_runner(tmp_path), [ids])  # type: ignore[list-item]


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no tokens"):
        embed(_runner(tmp_path), [[]])
