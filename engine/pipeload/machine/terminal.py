"""Text of strangers on a terminal or in a log: shown, never obeyed."""

from __future__ import annotations

import re

__all__ = ["printable"]

_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, which move the cursor or begin an order of the terminal; and the marks that
turn the direction of text, with which one name looks like another."""


def printable(text: str) -> str:
    r"""The text with each control character but tab and newline spelled out, as `\x1b`."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
