"""What long work tells its caller on the way: the step, how much of it is done, and how much there is."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Notify", "silent"]

Notify = Callable[[str, int, int], None]
"""Called with the name of the step, the part of it that is done, and the whole (0 where that is not known)."""


def silent(what: str, done: int, total: int) -> None:
    """Takes the place of a caller's function where there is none."""
