"""Bounds on the growth of a text by a tokenizer's own rules.

The tokenizers library obeys `tokenizer.json`, and a rule such as "replace each letter by a million" ends the process,
since a Rust library raises no error when memory runs out. So this module reads the rules before the library gets the
file: each character of a text may become at most `MOST` characters on its way to tokens, and each character of a token
on its way back.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from pipeload.errors import ShardError
from pipeload.foreign import foreign_errors

__all__ = ["MOST", "check_growth"]

MOST = 64
"""Unicode's own longest expansion has 18 characters; rules of published tokenizers stay below that."""
_LONGEST_WORD = 1000
"""WordPiece tries every part of a word; published tokenizers give up at 100 characters."""


class _Model(msgspec.Struct, frozen=True, kw_only=True):
    """The texts that a tokenizer's model puts around pieces of words; its vocabulary is not checked."""

    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    max_input_chars_per_word: int | None = None


class _File(msgspec.Struct, frozen=True, kw_only=True):
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None
    model: _Model = _Model()


@dataclass(frozen=True, slots=True)
class _Rule:
    """A step that transforms text.

    Attributes:
        growth: at most this many characters come out for each character that goes in.
        taken: the only characters that it changes; None for any.
        made: the only characters that it makes; None for any.
    """

    growth: int = 1
    taken: frozenset[str] | None = None
    made: frozenset[str] | None = None

    def may_take_from(self, other: _Rule) -> bool:
        """Whether it may change the output of another rule."""
        return self.taken is None or other.made is None or bool(self.taken & other.made)


def check_growth(data: bytes, where: str) -> None:
    """Raise ShardError if a tokenizer's rules let texts grow too much, or if the file is damaged.

    Args:
        data: the bytes of `tokenizer.json`.
        where: its path, for messages.
    """
    with foreign_errors(ShardError, f"{where} is damaged", "Export the model again."):
        file = msgspec.json.decode(data, type=_File)
        grown = {
            name: _growth([*_rules(getattr(file, name))])
            for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        }
        model = file.model
        grown["model"] = max(len(model.continuing_subword_prefix or ""), len(model.end_of_word_suffix or ""))
        word = model.max_input_chars_per_word or 0
    for name, growth in grown.items():
        if growth > MOST:
            raise ShardError(
                f"{where} has a {name} that makes {growth} characters or tokens of one, and pipeload takes at most "
                f"{MOST}. No published tokenizer needs that: do not trust this one."
            )
    if word > _LONGEST_WORD:
        raise ShardError(
            f"{where} looks for all parts of words of up to {word} characters, and pipeload takes at most "
            f"{_LONGEST_WORD}. No published tokenizer needs that: do not trust this one."
        )


def _growth(rules: list[_Rule]) -> int:
    """The most characters that one may become: the product along the worst chain of rules that feed each other."""
    reached: list[int] = []
    for place, rule in enumerate(rules):
        before = [reached[i] for i in range(place) if rule.may_take_from(rules[i])]
        reached.append(rule.growth * max(before, default=1))
    return max(reached, default=1)


def _rules(part: Any) -> Iterator[_Rule]:
    """The rules in a part of the file, in its order; recognised by their fields, as the library recognises them."""
    if isinstance(part, list):
        for one in part:
            yield from _rules(one)
    if not isinstance(part, dict):
        return
    match part:
        case {"pattern": {"String": str(pattern)}, "content": str(content)} if pattern:
            yield _Rule(-(-len(content) // len(pattern)) or 1, frozenset(pattern), frozenset(content))
        case {"pattern": _, "content": str(content)}:
            # A regular expression may also match between all characters.
            yield _Rule(1 + len(content), None, frozenset(content))
        case {"prepend": str(text)}:
            yield _Rule(1 + len(text), None, frozenset(text))
        case {"precompiled_charsmap": str(charsmap)}:
            yield _Rule(max(map(len, _replacements(charsmap)), default=1) or 1)
        case {"single": single, "special_tokens": dict(special)}:
            yield _Rule(max(len(single), *(len(token["ids"]) for token in special.values()), 1))
        case _:
            inner = [one for value in part.values() if isinstance(value, dict | list) for one in _rules(value)]
            yield from inner or [_Rule()]


def _replacements(charsmap: str) -> list[str]:
    """The replacement texts in SentencePiece's compiled rules: they follow an index, separated by zeros."""
    data = base64.b64decode(charsmap)
    index_bytes = int.from_bytes(data[:4], "little")
    return [text.decode(errors="replace") for text in data[4 + index_bytes :].split(b"\0")]
