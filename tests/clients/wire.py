"""The server on a port of loopback, in a thread of this process; what goes over the wire is kept."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from tests.engine.harness import PATIENCE_S

from pipeload.serve.application import Application
from pipeload.serve.connections import Connection
from pipeload.serve.port import listening_socket
from pipeload.serve.settings import Settings

__all__ = ["Wire", "on_loopback"]


class Wire:
    """The latest request and its answer.

    Attributes:
        address: of the server.
        application: the server.
        sent: the body of the request.
        answer: bytes of the answer.
    """

    def __init__(self, application: Application) -> None:
        self.application = application
        self.address = ""
        self.sent: Any = None
        self.answer = b""
        self._app: Any = application.asgi

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        came, gone = bytearray(), bytearray()

        async def receive_noting() -> Any:
            message = await receive()
            came.extend(message.get("body", b""))
            return message

        async def send_noting(message: Any) -> None:
            gone.extend(message.get("body", b""))
            # Before the client has it: it may go on as soon as it has the last byte.
            self.sent, self.answer = json.loads(came), bytes(gone)
            await send(message)

        await self._app(scope, receive_noting, send_noting)


@contextmanager
def on_loopback(settings: Settings) -> Iterator[Wire]:
    """A server until the context ends. All of its models are open when it begins."""
    ready = threading.Event()
    application = Application(settings, ready.set)
    wire = Wire(application)
    config = uvicorn.Config(wire, http=Connection, ws="none", lifespan="on", log_config=None, loop="asyncio")
    server = uvicorn.Server(config)
    with listening_socket("127.0.0.1", 0) as listening:
        wire.address = f"http://127.0.0.1:{listening.getsockname()[1]}"

        async def serve() -> None:
            serving = asyncio.ensure_future(server.serve([listening]))
            while application.opening is None:
                await asyncio.wait([serving], timeout=0.01)
            await application.opening
            ready.set()
            await serving

        thread = threading.Thread(target=lambda: asyncio.run(serve()), name="served")
        thread.start()
        try:
            assert ready.wait(PATIENCE_S)
            assert application.failure is None
            yield wire
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
