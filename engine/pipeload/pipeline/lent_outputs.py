"""Outputs of earlier calls, which occupy memory while their callers keep them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from pipeload.pipeline.session import Value, to_array

__all__ = ["LentOutputs"]


class LentOutputs:
    """Counts the bytes of outputs that callers still keep. Callers may drop them in any thread, at any moment."""

    def __init__(self) -> None:
        self._sizes: dict[weakref.ref[Value], int] = {}

    def add(self, values: Iterable[Value]) -> None:
        """Count these outputs until they are collected."""
        for value in values:
            self._sizes[weakref.ref(value, self._forget)] = to_array(value).nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs that callers keep now."""
        # Sum a copy: the interpreter copies in one step, while callers may drop outputs between the steps of a sum.
        return sum(list(self._sizes.values()))

    def _forget(self, reference: weakref.ref[Value]) -> None:
        self._sizes.pop(reference, None)
