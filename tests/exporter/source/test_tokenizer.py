"""The exported tokenizer is the one that transformers makes of all files of a checkpoint; the engine makes its ids."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tests.exporter.models import write_bert, write_json
from tests.models import traced_here

import pipeload
from pipeload.errors import ExportError
from pipeload_export import export
from pipeload_export.source.older_form import view_of
from pipeload_export.source.refused import Refused
from pipeload_export.source.tokenizer import resolve_tokenizer
from pipeload_export.source.tracing import RESOLVED

_LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_PIECES = [*_SPECIAL, *_LETTERS, *(f"##{c}" for c in _LETTERS), *map(str.upper, _LETTERS), "é", "##é", "é", "##é"]


def write_words(folder: Path, model_type: str = "bert", **settings: Any) -> Path:
    """A checkpoint's tokenizer as a list of pieces of words."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", {"model_type": model_type})
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(_PIECES)) + "\n")
    write_json(folder / "tokenizer_config.json", settings)
    return folder


def write_fast(folder: Path, **settings: Any) -> Path:
    """The same as tokenizer.json, which lowers all letters, beside other settings."""
    from transformers import BertTokenizerFast

    BertTokenizerFast.from_pretrained(write_words(folder), do_lower_case=True).save_pretrained(folder)
    (folder / "vocab.txt").unlink()
    kept = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", kept | settings)
    return folder


def write_merges(folder: Path) -> Path:
    """A tokenizer that only has its 258 tokens and the merge of two of them."""
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    write_json(folder / "config.json", {"model_type": "gpt2"})
    tokens = ["<|endoftext|>", *bytes_to_unicode().values(), "ab"]
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return folder


def resolved(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The resolved tokenizer of a checkpoint, and its settings."""
    from tokenizers import Tokenizer

    out = folder.with_name(f"{folder.name}-out")
    out.mkdir()
    resolve_tokenizer(view_of(folder, folder.with_name(f"{folder.name}-view")), out)
    settings = json.loads((out / RESOLVED / "tokenizer_config.json").read_text())
    return Tokenizer.from_file(str(out / RESOLVED / "tokenizer.json")), settings


@pytest.mark.parametrize(("lower", "tokens"), [(True, ["a", "##b"]), (False, ["A", "##b"])])
def test_the_config_says_whether_letters_are_lowered(tmp_path: Path, lower: bool, tokens: list[str]) -> None:
    for folder in (
        write_words(tmp_path / "words", do_lower_case=lower),
        write_fast(tmp_path / "fast", do_lower_case=lower),
    ):
        tokenizer, _ = resolved(folder)
        assert tokenizer.encode("Ab").tokens == ["[CLS]", *tokens, "[SEP]"]


def test_the_config_says_whether_accents_are_dropped(tmp_path: Path) -> None:
    for strip, tokens in ((True, ["e"]), (False, ["é"])):
        tokenizer, _ = resolved(write_fast(tmp_path / str(strip), strip_accents=strip))
        assert tokenizer.encode("é", add_special_tokens=False).tokens == tokens


def test_the_config_adds_tokens_and_says_sizes_and_sides(tmp_path: Path) -> None:
    added = {
        "200": {
            "content": "<new>",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
    }
    tokenizer, settings = resolved(
        write_fast(tmp_path / "fast", added_tokens_decoder=added, model_max_length=17, padding_side="left")
    )
    assert "<new>" in tokenizer.encode("a <new>").tokens
    assert (settings["model_max_length"], settings["padding_side"], settings["pad_token"]) == (17, "left", "[PAD]")


def test_vocabulary_and_merges_alone(tmp_path: Path) -> None:
    tokenizer, _ = resolved(write_merges(tmp_path / "gpt"))
    assert tokenizer.encode("abc<|endoftext|>").tokens == ["ab", "c", "<|endoftext|>"]


@pytest.mark.parametrize(("model_type", "name"), [("t5", "spiece.model"), ("xlm-roberta", "sentencepiece.bpe.model")])
def test_a_sentencepiece_model_alone(tmp_path: Path, model_type: str, name: str) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three", "abc def ghi jkl", "übung macht den meister"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    write_json(tmp_path / "m" / "config.json", {"model_type": model_type})
    (tmp_path / "m" / name).write_bytes(model.getvalue())
    tokenizer, _ = resolved(tmp_path / "m")
    assert tokenizer.encode("one two").tokens[-1] == "</s>"


@pytest.mark.parametrize(("first", "last"), [(True, False), (False, True), (True, True), (False, False)])
def test_the_config_says_which_tokens_a_text_begins_and_ends_with(tmp_path: Path, first: bool, last: bool) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "▁", *_LETTERS])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    folder = tmp_path / "llama"
    ends = {
        "add_bos_token": first,
        "add_eos_token": last,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    write_json(folder / "config.json", {"model_type": "llama"})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **ends})
    backend.save(str(folder / "tokenizer.json"))
    tokenizer, settings = resolved(folder)
    assert tokenizer.encode("a").tokens == ["<s>"] * first + ["▁", "a"] + ["</s>"] * last
    assert settings["padding_side"] == "left"


def test_a_tokenizer_of_transformers_5(tmp_path: Path) -> None:
    tokenizer, settings = resolved(
        write_fast(
            tmp_path / "fast", tokenizer_class="TokenizersBackend", extra_special_tokens=["<x>"], backend="tokenizers"
        )
    )
    assert "<x>" in tokenizer.encode("a <x>").tokens
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_model_without_a_tokenizer_by_its_name_may_bring_one(tmp_path: Path) -> None:
    folder = write_fast(tmp_path / "fast", tokenizer_class=None)
    write_json(folder / "config.json", {"model_type": "vit"})
    assert resolved(folder)[0].encode("a").tokens == ["[CLS]", "a", "[SEP]"]


def test_ids_that_the_engine_would_make_otherwise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        Refused, match=r"pipeload would make other tokens of '\[CLS\] a .* than transformers does: from token"
    ):
        resolved(write_fast(tmp_path / "fast", split_special_tokens=True))


def test_a_tokenizer_that_transformers_cannot_open_is_refused(tmp_path: Path) -> None:
    folder = write_fast(tmp_path / "fast")
    (folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(Refused, match=r"transformers cannot open its tokenizer: .*take them out of the folder"):
        resolved(folder)


def test_no_tokenizer_is_no_fault(tmp_path: Path) -> None:
    write_json(tmp_path / "m" / "config.json", {"model_type": "vit"})
    resolve_tokenizer(tmp_path / "m", tmp_path)
    assert not (tmp_path / RESOLVED).exists()


def test_an_export_holds_the_resolved_tokenizer(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert")
    config = (bert / "config.json").read_text()
    write_words(bert, do_lower_case=False)
    (bert / "config.json").write_text(config)
    with traced_here():
        export(bert, tmp_path / "out")
    with pipeload.load(tmp_path / "out", "8GB") as model:
        upper, lower = model.embed(["AB", "ab"])
    assert not (upper == lower).all()
    (bert / "vocab.txt").unlink()
    (bert / "tokenizer.json").write_text("{}")
    with traced_here(), pytest.raises(ExportError, match="cannot open its tokenizer"):
        export(bert, tmp_path / "other")
