"""A client of the server's application in the same event loop, which sees each piece of an answer as it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.engine.harness import PATIENCE_S

from pipeload.serve.application import Application
from pipeload.serve.handover import Handover
from pipeload.serve.models import beside_bytes
from pipeload.serve.settings import Settings

__all__ = ["Answer", "Client", "running", "settings", "with_server"]


def settings(*directories: Path, budget: int | str = "8GB", **options: Any) -> Settings:
    """Settings of a server.

    Args:
        directories: of its models.
        budget: what the models may use.
        options: other settings.
    """
    named = {directory.name: directory for directory in directories}
    made = Settings(**{"directories": named, "aliases": {}, "budget": budget, **options})
    return replace(made, budget=budget + beside_bytes(made.max_waiting)) if isinstance(budget, int) else made


class Answer:
    """The answer to a request, as it comes."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        self.ended = False
        self._changed = asyncio.Condition()
        self._gone = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return str(self.json()["error"]["message"])

    def events(self) -> list[Any]:
        """The events of a stream so far, without the mark of its end."""
        lines = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def leave(self) -> None:
        """The client goes away."""
        self._gone.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something is true of what has come."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(holds), PATIENCE_S)

    async def _take(self, message: Any) -> None:
        async with self._changed:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                self.pieces.append(message.get("body", b""))
                self.ended = not message.get("more_body", False)
            self._changed.notify_all()


class Client:
    """Sends requests to an application."""

    def __init__(self, application: Application) -> None:
        self.application = application

    def begin(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        headers: dict[str, str] | None = None,
        unfinished: bool = False,
    ) -> Answer:
        """Send a request, or the begin of one that never ends. Its answer comes by and by."""
        data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        given = {"host": "localhost:8080", "content-type": "application/json"} | (headers or {})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8080),
            "state": {},
        }
        answer, sent = Answer(), False

        async def receive() -> Any:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": data, "more_body": unfinished}
            await answer._gone.wait()
            return {"type": "http.disconnect"}

        answer.task = asyncio.ensure_future(self.application.asgi(scope, receive, answer._take))  # type: ignore[arg-type]
        return answer

    async def send(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        """Send a request, and wait for all of its answer."""
        answer = self.begin(method, path, body, **options)
        await asyncio.wait_for(answer.task, PATIENCE_S)  # type: ignore[arg-type]
        return answer

    async def post(self, path: str, body: Any, **options: Any) -> Answer:
        return await self.send("POST", path, body, **options)

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.send("GET", path, **options)


@asynccontextmanager
async def running(chosen: Settings, *, opened: bool = True, handover: Handover | None = None) -> AsyncIterator[Client]:
    """The application from its start to its end; all models are open when it begins, unless the test says otherwise."""
    application = Application(chosen, handover=handover)
    sent: asyncio.Queue[Any] = asyncio.Queue()
    got: asyncio.Queue[Any] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    task = asyncio.ensure_future(application.asgi(scope, sent.get, got.put))  # type: ignore[arg-type]
    await sent.put({"type": "lifespan.startup"})
    assert (await got.get())["type"] == "lifespan.startup.complete"
    try:
        if opened:
            await asyncio.wait_for(application.opening, PATIENCE_S)  # type: ignore[arg-type]
        yield Client(application)
    finally:
        await sent.put({"type": "lifespan.shutdown"})
        assert (await got.get())["type"] == "lifespan.shutdown.complete"
        await task


def with_server(chosen: Settings, test: Callable[[Client], Coroutine[Any, Any, Any]]) -> Any:
    """Run a test's coroutine beside a server."""

    async def main() -> Any:
        async with running(chosen) as client:
            return await test(client)

    return asyncio.run(main())
