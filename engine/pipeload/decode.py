"""What a decoder keeps between steps: the KV caches of one batch of sequences."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType

import numpy as np

from pipeload.errors import ClosedError, ConfigError
from pipeload.pipeline.session import Value, to_array, to_value

__all__ = ["DecodeState"]


class DecodeState:
    """KV caches of one batch, counted in the model's budget until `close`.

    Attributes:
        length: tokens in the caches.
        capacity: tokens that the budget has room for.
        expected: tokens that the next steps will need in the end.
        batch: sequences; 0 before the first step.
        caches: graph input -> value, as the latest step made it.
    """

    def __init__(
        self,
        capacity: int,
        on_close: Callable[[DecodeState], None],
        maker: object,
        *,
        length_axis: int | None,
        in_place: bool,
    ) -> None:
        self.length = 0
        self.capacity = self.expected = self._first_capacity = capacity
        self.batch = 0
        self.caches: dict[str, Value] = {}
        self._on_close = on_close
        self._length_axis = length_axis
        self._in_place = in_place
        # Weak: a state that is kept must not keep a model that nobody else has.
        self._maker = weakref.ref(maker)
        self.closed = False

    def check_usable_by(self, model: object) -> None:
        """Raise ClosedError when the state was closed, ConfigError when another model than this one made it."""
        if self.closed:
            raise ClosedError("This decode state is closed. Make a new one with model.new_state().")
        if self._maker() is not model:
            raise ConfigError(
                "This decode state holds the caches of another model. Make one with new_state() of the model that "
                "takes the step."
            )

    @property
    def room(self) -> int:
        """Tokens that the caches have memory for."""
        if not self._in_place or self._length_axis is None:
            return self.length
        # A copy: a pass that was withdrawn may still make some larger.
        return max((value.shape()[self._length_axis] for value in [*self.caches.values()]), default=0)

    def expect(self, tokens: int) -> None:
        """The next steps will need so many tokens; they are planned for when one of them is taken."""
        self.expected = tokens
        self.capacity = min(self.capacity, max(tokens, self._first_capacity, self.room))

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length`, as if their steps had not been taken.

        Raises:
            ConfigError: the state has fewer tokens, or keeps something that does not grow with them.
        """
        if not isinstance(length, int | np.integer) or not 0 <= length <= self.length:
            raise ConfigError(f"length is {length!r}; this decode state can be cut to 0 to {self.length} tokens.")
        if not length:
            self.caches = {}
        elif length < self.length and self._length_axis is None:
            raise ConfigError(
                "This model keeps something between its steps that does not grow with the text, so no tokens can be "
                "forgotten. Generate without drafts, and with a new state for each text."
            )
        elif not self._in_place and self._length_axis is not None:
            # Also when the length is right: whoever was interrupted may have kept longer caches.
            kept = (slice(None),) * self._length_axis + (slice(length),)
            self.caches = {name: _cut(value, kept) for name, value in self.caches.items()}
        self.length = length

    def close(self) -> None:
        """Give the caches' memory back. May be called again."""
        if not self.closed:
            self.closed = True
            self.caches, self.length = {}, 0
            self._on_close(self)

    def __enter__(self) -> DecodeState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cut(cache: Value, kept: tuple[slice, ...]) -> Value:
    array = to_array(cache)
    return cache if array[kept].shape == array.shape else to_value(array[kept].copy())
