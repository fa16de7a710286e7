"""Pieces of text, from the thread that generates them to the one that shows them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TypeAlias

from pipeload.errors import ConfigError

__all__ = ["Streamer", "TextStream"]

Streamer: TypeAlias = Callable[[str], None]
"""Takes pieces of text as they come. `TextStream` is one."""


class TextStream:
    """New text as an iterator, for a thread other than the one that generates it.

    Pass it to one call of `generate` as `streamer`, in a thread of your own, and iterate, with `for` or, under asyncio,
    with `async for`. The pieces together are the text. The iteration ends with the generation, and raises its error, if
    any. A reader that stops iterating early, closes the stream or is cancelled ends the generation: its result has the
    text up to then, with the `finish_reason` `abort`.

    Example:
        >>> with pipeload.load("models/exported/smollm2-135m", "256MB") as model, pipeload.TextStream() as stream:
        ...     options = {"max_new_tokens": 2, "streamer": stream}
        ...     thread = threading.Thread(target=model.generate, args=("The capital of France is",), kwargs=options)
        ...     thread.start()
        ...     print(list(stream))
        ...     thread.join()
        [' Paris', '.']
    """

    __module__ = "pipeload"

    def __init__(self) -> None:
        self.closed = False
        self._taken = False
        self._pieces: SimpleQueue[str | _End] = SimpleQueue()
        self._wake: Callable[[], object] | None = None

    def __call__(self, piece: str) -> None:
        """Hand a piece over. Never waits."""
        self._put(piece)

    def __iter__(self) -> Iterator[str]:
        """The pieces as they come, once: a second iteration finds nothing.

        Raises:
            PipeloadError: the error of the generation.
        """
        # Also runs when the reader leaves the loop over this generator early.
        try:
            while not self.closed and (piece := _piece(self._pieces.get())) is not None:
                yield piece
        finally:
            self.close()

    async def __aiter__(self) -> AsyncIterator[str]:
        """The same for a task of asyncio, which waits without a thread of its own.

        Raises:
            PipeloadError: the error of the generation.
        """
        # 7 MB, which programs without tasks need not pay.
        import asyncio

        loop, came = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(came.set)
        try:
            while not self.closed:
                came.clear()
                try:
                    item = self._pieces.get_nowait()
                except Empty:
                    await came.wait()
                    continue
                if (piece := _piece(item)) is None:
                    return
                yield piece
        finally:
            self.close()

    def close(self) -> None:
        """End the generation before its next token, and the iteration. May be called again, from any thread."""
        self.closed = True
        # The reader may be waiting for a piece.
        self._put(_End())

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def generation(self) -> Iterator[None]:
        """For `generate`: the iteration ends with this context, and raises its error.

        Raises:
            ConfigError: another generation has had this stream.
        """
        if self._taken:
            raise ConfigError("This TextStream has been given to a generation already. Make a new one for each.")
        self._taken = True
        try:
            yield
        except BaseException as error:
            self._put(_End(error))
            raise
        self._put(_End())

    def _put(self, item: str | _End) -> None:
        self._pieces.put(item)
        if self._wake is not None:
            # The reader's loop may have ended: then no reader waits.
            with suppress(RuntimeError):
                self._wake()


class _End:
    """The mark after the last piece, with the error that ended the generation, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def _piece(item: str | _End) -> str | None:
    """The next piece, or None at the end; raises the error of the generation."""
    if isinstance(item, str):
        return item
    if item.error is not None:
        raise item.error
    return None
