"""Rules of a tokenizer that let a text grow without measure are refused by name; those of published ones are not."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tests.engine.tasks.fakes import ToyRunner, manifest, write_bert_tokenizer

from pipeload.errors import ShardError
from pipeload.tasks.text.growth import check_growth
from pipeload.tasks.text.tokenizer import tokenizer_of

pytest.importorskip("tokenizers")


def _replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _charsmap(*texts: str) -> dict[str, Any]:
    made = b"".join(text.encode() + b"\0" for text in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(4) + made).decode()}


def _check(**parts: Any) -> None:
    check_growth(json.dumps({"version": "1.0", "model": {"vocab": {"a": 0}}} | parts).encode(), "tokenizer.json")


def _in_sequence(name: str, *rules: Any) -> dict[str, Any]:
    return {"type": "Sequence", {"normalizer": "normalizers", "decoder": "decoders"}[name]: list(rules)}


PUBLISHED = {
    "llama": _in_sequence("normalizer", {"type": "Prepend", "prepend": "▁"}, _replace(" ", "▁")),
    "t5": _in_sequence("normalizer", _charsmap("x" * 18), _replace(" {2,}", "▁", "Regex")),
    "albert": _in_sequence(
        "normalizer", _replace("``", '"'), _replace("''", '"'), {"type": "NFKD"}, {"type": "StripAccents"},
        {"type": "Lowercase"}, _charsmap("x" * 18), _replace(" {2,}", " ", "Regex"),
    ),
    "glm": _in_sequence(
        "normalizer", *(_replace(one, f"<|blank_{ord(one)}|>") for one in "\n\t\r"), _replace("  ", "<|b2|>"),
    ),
    "clip": _in_sequence("normalizer", {"type": "NFC"}, _replace("\\s+", " ", "Regex"), {"type": "Lowercase"}),
    "bert": {"type": "BertNormalizer", "clean_text": True, "lowercase": True},
}  # fmt: skip


@pytest.mark.parametrize("normalizer", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_rules_of_published_tokenizers_pass(normalizer: dict[str, Any]) -> None:
    _check(normalizer=normalizer)
    _check(decoder=_in_sequence("decoder", _replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}))
    _check(
        normalizer=None,
        decoder=None,
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
    )


@pytest.mark.parametrize("name", ["normalizer", "decoder"])
@pytest.mark.parametrize(
    "rules",
    [
        [_replace("a", "a" * 1000)],
        [{"pattern": {"String": "a"}, "content": "a" * 1000}],
        [_replace("", "a" * 1000)],
        [_replace("", "a" * 100, "Regex")],
        [_replace("(?=.)", "a" * 100, "Regex")],
        [{"type": "Prepend", "prepend": "a" * 1000}],
        [_charsmap("a", "b" * 1000)],
        [_replace("a", "bb"), _replace("b", "cc"), _replace("c", "dd"), _replace("d", "aa")] * 2,
        [_replace("a", "a" * 8)] * 3,
        [_replace("a", "A" * 20), {"type": "Lowercase"}, _replace("a", "b" * 20)],
        [_replace("a", "b" * 20), {"type": "NFKD"}, {"type": "Sequence", "normalizers": [_replace("b", "c" * 20)]}],
        [_replace("x", "", "Regex"), _replace("", "ab", "Regex"), _replace("", "cdefgh" * 5, "Regex")],
    ],
)
def test_rules_that_multiply_a_text_are_refused_by_name(name: str, rules: list[Any]) -> None:
    with pytest.raises(ShardError, match=rf"tokenizer\.json has a {name} that makes \d+ characters .*at most 64"):
        _check(**{name: _in_sequence(name, *rules)})


@pytest.mark.parametrize(
    "parts",
    [
        {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {}}] * 100, "special_tokens": {}}},
        {"post_processor": {"type": "Sequence", "processors": [
            {"type": "TemplateProcessing", "single": [], "special_tokens": {"[CLS]": {"ids": [1] * 100}}}
        ]}},
        {"model": {"type": "WordPiece", "continuing_subword_prefix": "#" * 100}},
        {"model": {"type": "BPE", "end_of_word_suffix": "</w>" * 100}},
        {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**9}},
    ],
)  # fmt: skip
def test_what_else_multiplies_tokens_is_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(ShardError, match=r"tokenizer\.json .*No published tokenizer needs that: do not trust this one"):
        _check(**parts)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"model": 3}', b'{"normalizer": ' + b"[" * 10**5, b"\xff"])
def test_what_is_no_tokenizer_is_damaged(data: bytes) -> None:
    with pytest.raises(ShardError, match=r"tokenizer\.json is damaged: .* Export the model again"):
        check_growth(data, "tokenizer.json")


@pytest.mark.parametrize("name", ["normalizer", "decoder"])
def test_the_library_gets_no_file_that_would_end_the_process(tmp_path: Path, name: str) -> None:
    write_bert_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: _replace("a", "a" * 10**6)}))
    with pytest.raises(ShardError, match=f"has a {name} that makes 1000000 characters"):
        tokenizer_of(ToyRunner(tmp_path, manifest("feature-extraction"), dict))
