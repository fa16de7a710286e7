"""Server-sent events: the form of a stream. The first event is made before the answer begins, so that what fails
before it is an answer with a status of its own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipeload.serve.admission import ClientGone
from pipeload.serve.errors import api_error

__all__ = ["DONE", "EventStream", "event"]

DONE = b"data: [DONE]\n\n"


def event(body: msgspec.Struct, name: str | None = None) -> bytes:
    """One event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(body) + b"\n\n"


class EventStream(Response):
    """An answer of events.

    Args:
        events: as they come.
        close: called when the answer has ended in any way.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], Awaitable[object]]) -> None:
        super().__init__(
            status_code=200,
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            media_type="text/event-stream",
        )
        self._events = events
        self._close = close
        self._first: bytes | None = None

    async def begin(self) -> EventStream:
        """Wait for the first event. Raises what fails before it."""
        try:
            self._first = await anext(self._events)
        except BaseException:
            await self._end()
            raise
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the events until they end or fail; a failure is the last event."""
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": self._first or b"", "more_body": True})
            try:
                async for piece in self._events:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except ClientGone:
                return
            except Exception as error:  # noqa: BLE001 - the client gets it
                await send({"type": "http.response.body", "body": event(api_error(error).answer), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._end()

    async def _end(self) -> None:
        try:
            await self._events.aclose()
        finally:
            await self._close()
