"""Connections that do not wait for ever: neither for the rest of a request, nor for a client that takes no answer.

uvicorn itself ends a connection only between two requests, when no byte has come for a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeload.serve.errors import ApiError
from pipeload.serve.settings import LIMITS

__all__ = ["Connection"]


class Connection(H11Protocol):
    """A connection to one client.

    Attributes:
        on_end: called when it has ended.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._awaited: object = None
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self.on_end: Callable[[], object] = lambda: None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._cancel()
        self.resume_writing()
        super().connection_lost(exc)
        self.on_end()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        self._expect()

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        super().pause_writing()
        self._unread = self.loop.call_later(LIMITS.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has taken what waited."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in the shape of all errors."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # It came while an answer is sent.
            self.transport.close()
            return
        most = self.config.h11_max_incomplete_event_size
        error = ApiError(400, f"{msg} Send HTTP/1.1, with headers of at most {most} bytes.")
        body = msgspec.json.encode(error.answer)
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect(self) -> None:
        """Let the part of a request that comes now have its time."""
        awaited = self.conn.their_state
        if awaited is self._awaited:
            return
        self._cancel()
        self._awaited = awaited
        seconds = {h11.IDLE: LIMITS.head_s, h11.SEND_BODY: LIMITS.body_s}.get(awaited)
        if seconds is not None and not self.transport.is_closing():
            self._late = self.loop.call_later(seconds, self._end, seconds)

    def _end(self, seconds: float) -> None:
        if self._awaited is h11.SEND_BODY and not self.cycle.response_complete:
            # Who reads the body says so.
            self._late = self.loop.call_later(seconds, self._end, seconds)
        else:
            self.timeout_keep_alive_handler()

    def _cancel(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
