"""What a decoder keeps between steps: the KV caches of one batch of sequences."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from pipeload.errors import ClosedError
from pipeload.session import Value

__all__ = ["DecodeState"]


class DecodeState:
    """KV caches of one batch, counted in the model's budget until `close`.

    Attributes:
        length: tokens in the caches.
        capacity: tokens that the budget has room for; grows when more are needed.
        batch: sequences; 0 before the first step.
        caches: graph input -> value, as the latest step made it.
    """

    def __init__(self, capacity: int, on_close: Callable[[DecodeState], None]) -> None:
        self.length = 0
        self.capacity = capacity
        self.batch = 0
        self.caches: dict[str, Value] = {}
        self._on_close = on_close
        self.closed = False

    def check_open(self) -> None:
        """Raise ClosedError when the state was closed."""
        if self.closed:
            raise ClosedError("This decode state is closed. Make a new one with model.new_state().")

    def close(self) -> None:
        """Give the caches' memory back. May be called again."""
        if not self.closed:
            self.closed = True
            self.caches.clear()
            self._on_close(self)

    def __enter__(self) -> DecodeState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
