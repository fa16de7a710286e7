"""Pieces of text, from the thread that generates them to the one that shows them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TypeAlias

from pipeload.errors import ConfigError
from pipeload.pipeline import deadlines

__all__ = ["Streamer", "TextStream"]

Streamer: TypeAlias = Callable[[str], None]
"""Takes pieces of text as they come. `TextStream` is one."""
_LATE = "while its reader waited for text"


class TextStream:
    """New text as an iterator, for a thread other than the one that generates it.

    Pass it to one call of `generate` as `streamer`, in a thread of your own, and iterate, with `for` or, under asyncio,
    with `async for`. The pieces together are the text. The iteration ends with the generation, and raises its error, if
    any. A reader that stops iterating early, closes the stream or is cancelled ends the generation: its result has the
    text up to then, with the `finish_reason` `abort`. A `pipeload.deadline` in whose body the stream is made holds for
    the generation too, and the one in whose body it is read for its reader.

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
        # The generation's thread knows nothing of it.
        self._deadline = deadlines.current()
        self._pieces: SimpleQueue[str | _End] = SimpleQueue()
        self._wake: Callable[[], object] | None = None

    def __call__(self, piece: str) -> None:
        """Hand a piece over. Never waits."""
        self._put(piece)

    def __iter__(self) -> Iterator[str]:
        """The pieces as they come, once: a second iteration finds nothing.

        Raises:
            PipeloadError: the error of the generation.
            DeadlineError: the reader's deadline has passed.
        """
        # Also runs when the reader leaves the loop over this generator early.
        try:
            while not self.closed and (piece := _piece(self._next())) is not None:
                yield piece
        finally:
            self.close()

    async def __aiter__(self) -> AsyncIterator[str]:
        """The same for a task of asyncio, which waits without a thread of its own.

        Raises:
            PipeloadError: the error of the generation.
            DeadlineError: the reader's deadline has passed.
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
                    try:
                        async with asyncio.timeout(deadlines.left_s()):
                            await came.wait()
                    except TimeoutError:
                        raise deadlines.late(_LATE) from None
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
            with deadlines.within(self._deadline):
                yield
        except BaseException as error:
            self._put(_End(error))
            raise
        self._put(_End())

    def _next(self) -> str | _End:
        try:
            return self._pieces.get(timeout=deadlines.left_s())
        except Empty:
            raise deadlines.late(_LATE) from None

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
