from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tests.engine.tasks.fakes import (
    CORPUS,
    ToyRunner,
    manifest,
    write_bert_tokenizer,
    write_gpt_tokenizer,
    write_json,
)

from pipeload.errors import ConfigError, ShardError, TruncationWarning
from pipeload.tasks.text.tokenizer import Detokenizer, Tokenizer, tokenizer_of

pytest.importorskip("tokenizers")

TEXTS = ["The cat sat on the mats", "", "dog", "xyz \t the\nCAT [MASK] nicely", "the " * 40]


def _tokenizer(directory: Path, task: str = "feature-extraction") -> Tokenizer:
    return tokenizer_of(ToyRunner(directory, manifest(task), dict))


def _assert_equal_to_transformers(directory: Path, texts: Sequence[str], **options: Any) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    if theirs.pad_token is None:
        theirs.pad_token = theirs.eos_token
    expected = theirs(list(texts), padding=True, truncation=True, return_tensors="np", **options)
    ours = _tokenizer(directory)
    batch = ours.batch([ours.encode(text) for text in texts])
    for name, array in expected.items():
        np.testing.assert_array_equal(batch[name], array)
    for row in expected["input_ids"]:
        plain = theirs.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(row) == plain


@pytest.mark.parametrize("task", ["feature-extraction", "question-answering"])
def test_a_template_that_repeats_a_text_makes_none_that_is_longer_than_the_model_takes(
    tmp_path: Path, task: str
) -> None:
    write_bert_tokenizer(tmp_path, model_max_length=12)
    rules = json.loads((tmp_path / "tokenizer.json").read_bytes())
    for kind, text in (("single", "A"), ("pair", "B")):
        rules["post_processor"][kind].append({"Sequence": {"id": text, "type_id": 0}})
    write_json(tmp_path, "tokenizer.json", rules)
    tokenizer = _tokenizer(tmp_path, task)
    assert len(tokenizer.encode("the cat").ids) == 6
    long = "the cat sat on the mat " * 5

    def encode() -> None:
        if task == "question-answering":
            tokenizer.windows("the", long, long=1, length=12, overlap=2)
        else:
            tokenizer.encode(long)

    with pytest.raises(ShardError, match=r"makes \d+ tokens of a text that was cut to 12: its template"):
        encode()


@pytest.mark.parametrize("settings", [{}, {"padding_side": "left", "truncation_side": "left"}])
def test_wordpiece_equals_transformers(tmp_path: Path, settings: dict[str, object]) -> None:
    write_bert_tokenizer(tmp_path, **settings)
    write_json(tmp_path, "config.json", {"model_type": "bert"})
    _assert_equal_to_transformers(tmp_path, TEXTS)


@pytest.mark.parametrize("prefix_space", [False, True])
def test_byte_level_bpe_equals_transformers(tmp_path: Path, prefix_space: bool) -> None:
    # The flag in tokenizer_config.json, here left out, beats the one in tokenizer.json.
    write_gpt_tokenizer(tmp_path, prefix_space=prefix_space)
    write_json(tmp_path, "config.json", {"model_type": "gpt2"})
    _assert_equal_to_transformers(tmp_path, CORPUS)


def test_the_prefix_space_can_be_asked_for(tmp_path: Path) -> None:
    write_gpt_tokenizer(tmp_path, add_prefix_space=True)
    write_json(tmp_path, "config.json", {"model_type": "gpt2"})
    _assert_equal_to_transformers(tmp_path, CORPUS)


def test_texts_are_cut_to_what_the_model_has_positions_for(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    write_json(tmp_path, "config.json", {"model_type": "roberta", "max_position_embeddings": 12, "pad_token_id": 1})
    tokenizer = _tokenizer(tmp_path)
    assert tokenizer.max_length == 10
    encoded = tokenizer.encode("the " * 40)
    assert len(encoded.ids) == 10
    assert encoded.special.tolist() == [1, *[0] * 8, 1]


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_sentence_transformers_has_its_own_limit(tmp_path: Path, name: str) -> None:
    write_bert_tokenizer(tmp_path)
    write_json(tmp_path, f"sentence_{name}_config.json", {"max_seq_length": 6})
    assert len(_tokenizer(tmp_path).encode("the " * 40).ids) == 6


def test_the_limit_of_sentence_transformers_takes_the_place_of_the_tokenizers(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    assert _tokenizer(tmp_path).max_length == 16
    write_json(tmp_path, "sentence_bert_config.json", {"max_seq_length": 20})
    assert _tokenizer(tmp_path).max_length == 20
    write_json(tmp_path, "config.json", {"max_position_embeddings": 18})
    assert _tokenizer(tmp_path).max_length == 18


@pytest.mark.parametrize(("names", "types"), [(None, [0] * 3 + [1] * 2), (["input_ids", "attention_mask"], [0] * 5)])
def test_a_model_that_takes_no_types_has_none(tmp_path: Path, names: list[str] | None, types: list[int]) -> None:
    write_bert_tokenizer(tmp_path, **({} if names is None else {"model_input_names": names}))
    tokenizer = _tokenizer(tmp_path)
    assert tokenizer.batch([tokenizer.encode("cat", "dog")])["token_type_ids"].tolist() == [types]


def test_padding_has_the_id_that_the_graph_looks_for(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    write_json(tmp_path, "config.json", {"pad_token_id": 9})
    assert _tokenizer(tmp_path).pad_id == 9


def test_texts_that_are_cut_are_warned_about_once_and_together(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    tokenizer = _tokenizer(tmp_path)
    with pytest.warns(TruncationWarning, match="more than the 16 tokens that the model takes") as caught:
        rows = tokenizer.encode_all(["the " * 15, "the", "dog " * 99])
    assert len(caught) == 1
    assert [row.cut for row in rows] == [True, False, True]
    assert [len(row.ids) for row in rows] == [16, 3, 16]
    # A warning is an error in these tests: there is none where all of the texts fits.
    tokenizer.encode_all(["the " * 14])


def test_a_prompt_is_never_cut(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    tokenizer = _tokenizer(tmp_path, "text-generation")
    assert tokenizer.max_length is None
    assert len(tokenizer.encode("the " * 40).ids) == 42


def test_a_batch_has_every_array_that_a_text_model_may_take(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    tokenizer = _tokenizer(tmp_path)
    batch = tokenizer.batch([tokenizer.encode("the cat"), tokenizer.encode("dog")])
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3], [2, 7, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 1]]


def test_padding_without_a_padding_token_takes_the_end_of_text(tmp_path: Path) -> None:
    write_gpt_tokenizer(tmp_path)
    assert _tokenizer(tmp_path).pad_id == 0
    write_json(tmp_path, "config.json", {"pad_token_id": 5})
    assert _tokenizer(tmp_path).pad_id == 5


def test_a_text_without_tokens_is_refused_in_a_batch(tmp_path: Path) -> None:
    write_gpt_tokenizer(tmp_path)
    tokenizer = _tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="has no tokens"):
        tokenizer.batch([tokenizer.encode("a"), tokenizer.encode("")])


@pytest.mark.parametrize("text", [3, None, b"text", ["text"]])
def test_only_strings_are_texts(tmp_path: Path, text: Any) -> None:
    write_bert_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="must be a string"):
        _tokenizer(tmp_path).encode(text)


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="no valid Unicode"):
        _tokenizer(tmp_path).encode("cat \ud800")


def test_no_tokenizer_says_what_else_works(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json.*Pass token ids"):
        _tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 1}', b"\xff"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ShardError, match=r"tokenizer\.json is damaged"):
        _tokenizer(tmp_path)


def test_a_tokenizer_outside_the_directory_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    write_bert_tokenizer(tmp_path)
    (inside / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(ShardError, match="leads out of the model directory"):
        _tokenizer(inside)


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bert_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match="pip install tokenizers"):
        _tokenizer(tmp_path)


def test_encoding_starts_no_threads(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    tokenizer = _tokenizer(tmp_path)
    before = psutil.Process().num_threads()
    for text in TEXTS:
        tokenizer.decode(tokenizer.encode(text).ids)
    assert psutil.Process().num_threads() <= before


@pytest.mark.parametrize("text", [*CORPUS, "", "é", "🙂🙂", "a  b"])
def test_pieces_of_a_growing_text_make_up_the_whole(tmp_path: Path, text: str) -> None:
    write_gpt_tokenizer(tmp_path)
    tokenizer = _tokenizer(tmp_path, "text-generation")
    ids = tokenizer.encode(text).ids
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(id_) for id_ in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids) == text


def test_a_character_that_never_ends_comes_out_at_the_end(tmp_path: Path) -> None:
    write_gpt_tokenizer(tmp_path)
    tokenizer = _tokenizer(tmp_path, "text-generation")
    ids = tokenizer.encode("a🦜").ids[:-1]
    detokenizer = Detokenizer(tokenizer)
    shown = "".join(detokenizer.push(id_) for id_ in ids)
    assert shown == "a"
    assert shown + detokenizer.flush() == tokenizer.decode(ids)


def test_pieces_of_wordpiece_text_keep_their_spaces(tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    tokenizer = _tokenizer(tmp_path, "text-generation")
    ids = tokenizer.encode("the cats sat on the mat").ids
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(id_) for id_ in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids) == "the cats sat on the mat"
    assert pieces[1:4] == ["the", " cat", "s"]


@pytest.mark.real
def test_the_real_minilm_tokenizer_equals_transformers(minilm: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((minilm / name).read_bytes())
    _assert_equal_to_transformers(tmp_path, [*TEXTS, *CORPUS, "unaffable naïveté " * 400])
    _assert_equal_to_transformers(minilm, [*TEXTS, *CORPUS, "unaffable naïveté " * 400], max_length=256)


@pytest.mark.real
@pytest.mark.slow
def test_the_real_smollm2_tokenizer_equals_transformers(smollm2_tokenizer: Path) -> None:
    _assert_equal_to_transformers(smollm2_tokenizer, [*TEXTS, *CORPUS, "def f(x):\n\treturn x  # 12345"])
