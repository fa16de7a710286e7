"""A text, or a pair of texts, in the forms in which callers pass them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from pipeload.errors import ConfigError

__all__ = ["Pair", "TextOrPair", "check_text", "is_pair", "text_or_pair"]

Pair: TypeAlias = "tuple[str, str] | Mapping[str, str]"
"""`(text, text_pair)`, or `{"text": ..., "text_pair": ...}` as the pipelines of transformers take it."""

TextOrPair: TypeAlias = "str | tuple[str, str]"
"""The form in which the tokenizer takes one or two texts."""

_KEYS = frozenset({"text", "text_pair"})


def check_text(text: object) -> None:
    """Raise ConfigError unless it is a string of valid Unicode."""
    if not isinstance(text, str):
        raise ConfigError(f"A text must be a string, not {type(text).__name__}: {text!r:.80}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"The text is no valid Unicode: {error.reason} at {error.start}.") from error


def is_pair(value: object) -> bool:
    """Whether the value, given alone, is meant as one pair: a tuple or a dict. A list is a list of texts.

    Raises:
        ConfigError: a tuple that is no pair. It might be meant as a list, and two texts of it would be one input.
    """
    if isinstance(value, tuple) and len(value) != 2:
        raise ConfigError(
            f"A tuple is one pair, (text, text_pair), and this one has {len(value)} entries. Put texts into a list."
        )
    return isinstance(value, tuple | Mapping)


def text_or_pair(value: Any) -> TextOrPair:
    """One or two texts out of a text, a tuple or a list of two, or a dict. The tokenizer checks that they are strings.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(value, Mapping):
        if value.keys() - _KEYS or "text" not in value:
            raise ConfigError(f"A pair as a dict has the keys 'text' and 'text_pair', not {[*value]!r:.80}.")
        return (value["text"], value["text_pair"]) if value.get("text_pair") is not None else value["text"]
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ConfigError(f"A pair has two texts, (text, text_pair), not {len(value)}: {value!r:.80}.")
        return value[0], value[1]
    return value  # type: ignore[no-any-return]
