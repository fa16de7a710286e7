"""What the child process refuses, in the words that the user reads."""

from __future__ import annotations

__all__ = ["Refused"]


class Refused(Exception):  # noqa: N818
    """The model cannot be exported, for a reason that needs no traceback."""
