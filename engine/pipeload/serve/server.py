"""The server on its port, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import FrameType

import msgspec
import prometheus_client
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from pipeload.errors import ConfigError
from pipeload.serve.admission import Admission
from pipeload.serve.connections import Connection
from pipeload.serve.door import Door
from pipeload.serve.errors import ApiError, error_response
from pipeload.serve.metrics import Metrics
from pipeload.serve.models import Models
from pipeload.serve.openapi import openapi
from pipeload.serve.routes import (
    chat,
    classify,
    completions,
    embeddings,
    machine,
    page,
    ranking,
    responses,
    state,
    tokenize,
)
from pipeload.serve.routes.desk import Desk, DeskRoute
from pipeload.serve.settings import Settings

__all__ = ["Application", "serve"]

_KEEP_ALIVE_S = 30
_HEADER_BYTES = 64 << 10
_BACKLOG = 512
_ROUTES = (state, page, machine, chat, completions, responses, embeddings, ranking, classify, tokenize)


class Application:
    """The server without its port.

    Args:
        settings: how it runs.
        on_failure: called when a model cannot be opened at the start.

    Attributes:
        desk: models, places and figures.
        routes: what it answers.
        asgi: the application for a server of ASGI.
        opening: opens all models, once the application has started.
        failure: the error of a model that could not be opened.
    """

    def __init__(self, settings: Settings, on_failure: Callable[[], object] = lambda: None) -> None:
        # A thread for each place, so that no call waits for one; and one that opens or closes a model.
        self._pool = ThreadPoolExecutor(settings.max_waiting + 1, thread_name_prefix="pipeload-caller")
        models = Models(settings, self._pool)
        admission = Admission(settings.max_waiting, self._pool)
        self.desk = Desk(settings=settings, models=models, admission=admission, metrics=Metrics(models, admission))
        self.opening: asyncio.Future[None] | None = None
        self.failure: BaseException | None = None
        self._on_failure = on_failure
        routes = [one for module in _ROUTES for one in module.routes(self.desk)]

        async def describe(_desk: Desk, _request: Request) -> Response:
            """All routes, described for programs."""
            return Response(described, media_type="application/json")

        routes.append(DeskRoute("/openapi.json", describe, self.desk, method="GET"))
        described = msgspec.json.encode(openapi(routes))
        self.routes = routes
        app = Starlette(
            routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _answer_without_route}
        )
        door: ASGIApp = Door(app, settings, self.desk.metrics, [one.path for one in routes])
        if settings.cors_origins:
            from starlette.middleware.cors import CORSMiddleware

            door = CORSMiddleware(
                door,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("authorization", "content-type"),
            )
        self.asgi = door

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self.opening = opening = asyncio.ensure_future(self._open())
        try:
            yield
        finally:
            self.leave()
            opening.cancel()
            await asyncio.wait([opening])
            for served in self.desk.models.served.values():
                await served.end()
            self._pool.shutdown()

    def leave(self) -> None:
        """End all calls before their next sweep."""
        for place in tuple(self.desk.admission.places):
            place.leave()

    async def _open(self) -> None:
        try:
            await self.desk.models.open_all()
        except Exception as error:  # noqa: BLE001 - the server ends with it
            self.failure = error
            self._on_failure()


def serve(settings: Settings, tell: Callable[[str], object]) -> None:
    """Serve until SIGTERM or Ctrl-C; then calls have `settings.drain_s` to end.

    Args:
        settings: how.
        tell: gets the server's address, once it listens.

    Raises:
        ConfigError: the address cannot be listened on.
        PipeloadError: a model cannot be opened.
    """
    # Of all registries of the process: the time at which each series began doubles the answer.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    application = Application(settings, lambda: server.stop())
    config = uvicorn.Config(
        application.asgi,
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.drain_s,  # type: ignore[arg-type] # any number of seconds
        h11_max_incomplete_event_size=_HEADER_BYTES,
    )
    server = _Server(config)
    with _listening(settings.host, settings.port) as listening:
        host, port = listening.getsockname()[:2]
        tell(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        server.run([listening])
    # After a second signal they may still run, and the interpreter waits for their threads.
    application.leave()
    if application.failure is not None:
        raise application.failure


class _Server(uvicorn.Server):
    """Ends by itself: a signal that has drained it is not raised again, so the process ends with exit code 0."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Drain; at the second signal, end."""
        self.force_exit = self.should_exit
        self.stop()

    def stop(self) -> None:
        """Begin to drain."""
        self.should_exit = True


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(_BACKLOG)
        except BaseException:
            made.close()
            raise
        return made
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened on: {error}. Choose another --host or --port, or end the program there."
        ) from error


async def _answer_without_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = "takes no " + request.method if status == 405 else "is no route of this server"
    answer = error_response(ApiError(status, f"{request.url.path:.80} {what}."))
    if isinstance(error, HTTPException):
        # The methods that a route takes.
        answer.headers.update(error.headers or {})
    return answer
