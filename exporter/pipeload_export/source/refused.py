"""What a child process refuses, in the words that the user reads."""

from __future__ import annotations

__all__ = ["Refused", "reason"]

_MOST_CHARACTERS = 600


class Refused(Exception):  # noqa: N818
    """The model cannot be exported, for a reason that needs no traceback."""


def reason(error: Exception, most: int = _MOST_CHARACTERS) -> str:
    """An exception of a library in one line of at most `most` characters, without a full stop."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:most].removesuffix(".")
