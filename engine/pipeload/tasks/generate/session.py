"""A text that goes on: its KV cache stays between calls of `generate`."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Generic, Self, Unpack
from weakref import WeakKeyDictionary

from pipeload.errors import ClosedError, ConfigError
from pipeload.tasks.generate.cached_text import Reading
from pipeload.tasks.generate.generate import called, generate_prompts
from pipeload.tasks.generate.options import GenerationOptions
from pipeload.tasks.generate.prompts import Prompt, check_model, listed
from pipeload.tasks.generate.sequence import Generation
from pipeload.tasks.runner import Decoder, State

__all__ = ["Session"]


class Session(Generic[State]):
    """A text that goes on: its KV cache stays between calls of `generate`. A context manager; made by `Model.session`.

    Args:
        runner: a model exported for text-generation with KV caches.
        capacity: tokens to plan for; more fit while the budget has room.

    Example:
        >>> with pipeload.load("models/exported/smollm2-135m", "256MB") as model, model.session() as session:
        ...     first = session.generate("The capital of France is", max_new_tokens=2)
        ...     session.generate(f"The capital of France is{first.text} The capital of Italy is", max_new_tokens=2).text
        ' Rome.'
    """

    __module__ = "pipeload"

    def __init__(self, runner: Decoder[State], capacity: int = 0) -> None:
        check_model(runner)
        self._runner = runner
        self._reading = Reading(runner, runner.new_state(capacity))
        # The draft models' caches of the text stay as well.
        self._drafting: WeakKeyDictionary[Decoder[Any], Reading[Any]] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens whose keys and values the cache holds."""
        return tuple(self._reading.tokens.ravel().tolist())

    @property
    def nbytes(self) -> int:
        """Memory of the cache."""
        return self._reading.state.nbytes

    def generate(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Generation:
        """Continue a text. A beginning that it shares with the previous text is not computed again.

        After an error, or Ctrl-C, the cache holds the tokens computed up to then.

        Args:
            prompt: the whole text, or its token ids; for a conversation, all turns so far.
            options: as for `generate`.

        Raises:
            ConfigError: as `generate`; also when another thread uses the session.
            ClosedError: the session is closed.
            TypeError: an option is none of `generate`'s.
        """
        if not self._lock.acquire(blocking=False):
            raise ConfigError("Another thread generates with this session. Make a session for each thread.")
        try:
            if self._closed:
                raise ClosedError("The session is closed. Make a new one with model.session().")
            with called(options):
                prompts, single = listed(prompt)
                if not single:
                    raise ConfigError("A session takes one prompt, not a list. Make a session for each.")
                (result,) = generate_prompts(self._runner, prompts, options, None, self._reading_by)
                return result
        finally:
            # The session no longer plans for tokens that did not come.
            for reading in (self._reading, *self._drafting.values()):
                reading.state.expect(0)
            self._lock.release()

    def close(self) -> None:
        """Give the cache's memory back. May be called again."""
        self._closed = True
        for reading in (self._reading, *self._drafting.values()):
            reading.state.close()

    def _reading_by(self, decoder: Decoder[Any]) -> Reading[Any]:
        if decoder is self._runner:
            return self._reading
        if decoder not in self._drafting:
            self._drafting[decoder] = Reading(decoder, decoder.new_state())
        return self._drafting[decoder]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
