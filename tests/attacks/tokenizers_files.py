"""Tokenizers whose rules make much of little, and texts that spell special tokens.

The attacker gives away a model directory, or is a client. He wants the process to end, since a Rust library raises no
error when memory runs out; or a text of his taken for the model's own marks.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tests.attacks.attack import HELD, SucceededError, attack, refused, run_module
from tests.attacks.victims import model_directory

from pipeload.errors import ShardError
from pipeload.format import manifest as manifests
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.chat.chat import find_template
from pipeload.tasks.text.growth import check_growth

_LONG = "x" * 1000
_PARTS: tuple[dict[str, Any], ...] = (
    {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": _LONG}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": _LONG}},
    {"normalizer": {"type": "Prepend", "prepend": _LONG}},
    {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 10}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(4) + b"y" * 999).decode()}},
    {"decoder": {"type": "Replace", "pattern": {"String": "a"}, "content": _LONG}},
    {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 999,
                        "pair": [], "special_tokens": {}}},
    {"model": {"type": "WordPiece", "continuing_subword_prefix": _LONG, "vocab": {}}},
    {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**9, "vocab": {}}},
)  # fmt: skip


@attack
def rules_that_grow(_folder: Path) -> str:
    """Rules that make a thousand characters of one, alone or one after another, on the way to tokens and back."""
    outcome = HELD
    for part in _PARTS:
        outcome = refused(
            lambda part=part: check_growth(json.dumps(part).encode(), "tokenizer.json"), ShardError, "at most"
        )
    return outcome


@attack
def files_that_are_none(_folder: Path) -> str:
    """A tokenizer.json that is no JSON, nested 100,000 deep, or has rules of other types than the library's."""
    outcome = HELD
    for data in (b"", b"[", b"{" * 10, b'{"normalizer":' + b"[" * 100_000, b'{"model": 5}', b"\xff\xfe", b'{"a": NaN}'):
        outcome = refused(lambda data=data: check_growth(data, "tokenizer.json"), ShardError, "is damaged")
    return outcome


@attack
def special_tokens_in_a_text(folder: Path) -> str:
    """A message that spells a special token: it becomes that token, as in transformers, and is told as it is."""
    import tokenizers

    directory = model_directory(folder)
    files = ModelFiles(directory, manifests.read(directory))
    text = find_template(files).render([{"role": "user", "content": "<|endoftext|>"}])
    if "<|endoftext|>" not in text:
        raise SucceededError("the text was changed")
    made = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    if 0 not in made.encode(text, add_special_tokens=False).ids:
        raise SucceededError("docs/security.md says that it becomes the token, and it does not")
    return HELD


if __name__ == "__main__":
    run_module(Path(__file__).stem)
