"""What a child process refuses, in the words that the user reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Declined", "Refused", "only_trusted_code", "reason"]

_MOST_CHARACTERS = 600


class Refused(Exception):  # noqa: N818
    """The model cannot be exported, for a reason that needs no traceback."""


class Declined(Exception):  # noqa: N818
    """One way to export the model does not work, and another may. The message ends without a full stop."""


@contextmanager
def only_trusted_code() -> Iterator[None]:
    """Wraps the loading of a checkpoint or a tokenizer by transformers: refuses one whose code may not be run."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise Refused(
            "it brings Python code of its own. Read that code, and if you trust it, export with --trust-remote-code."
        ) from error


def reason(error: Exception, most: int = _MOST_CHARACTERS) -> str:
    """An exception of a library in one line of at most `most` characters, without a full stop."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:most].removesuffix(".")
