"""Progress of long work, reported to its caller: the step, the part of it that is done, and the whole."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Notify", "silent"]

Notify = Callable[[str, int, int], None]
"""Called with the name of the step, the part of it that is done, and the whole (0 where that is not known)."""


def silent(what: str, done: int, total: int) -> None:
    """The default where the caller passes no function."""
