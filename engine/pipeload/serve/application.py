"""The server for a server of ASGI: all routes, behind the door, over the models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from pipeload.format import manifest as manifests
from pipeload.serve.admission import Admission
from pipeload.serve.door import Door
from pipeload.serve.errors import ApiError, error_response
from pipeload.serve.handover import Handover, IdleConnection
from pipeload.serve.intake import Intake
from pipeload.serve.metrics import Metrics
from pipeload.serve.models import Models
from pipeload.serve.openapi import openapi
from pipeload.serve.routes import machine, page, state
from pipeload.serve.routes.desk import Desk, DeskRoute
from pipeload.serve.settings import Settings
from pipeload.serve.work import Work

__all__ = ["Application"]

_WITHOUT_WORK = (state, page, machine)
"""Modules of routes that call no model. They import none of its libraries."""


class Application:
    """The server without its port.

    Args:
        settings: how it runs.
        on_failure: called when a model cannot be opened at the start.
        handover: of the idle server that it goes on for: its models are opened by their calls.

    Attributes:
        desk: models, places and figures.
        work: its routes that call models.
        openapi: the description of all routes, as JSON.
        asgi: the application for a server of ASGI.
        opening: opens all models, once the application has started.
        failure: the error of a model that could not be opened.
    """

    def __init__(
        self,
        settings: Settings,
        on_failure: Callable[[], object] = lambda: None,
        handover: Handover | None = None,
    ) -> None:
        # A thread for each place, so that no call waits for one; and one that opens or closes a model.
        self._pool = ThreadPoolExecutor(settings.max_waiting + 1, thread_name_prefix="pipeload-caller")
        models = Models(settings, self._pool)
        admission = Admission(settings.max_waiting, self._pool)
        metrics = Metrics(models, admission, handover.counts if handover else {})
        self.desk = Desk(settings=settings, models=models, admission=admission, metrics=metrics)
        self.opening: asyncio.Future[None] | None = None
        self.failure: BaseException | None = None
        self._on_failure = on_failure

        async def describe(_desk: Desk, _request: Request) -> Response:
            """All routes, described for programs."""
            return Response(self.openapi, media_type="application/json")

        routes = [one for module in _WITHOUT_WORK for one in module.routes(self.desk)]
        routes.append(DeskRoute("/openapi.json", describe, self.desk, method="GET"))
        app = Starlette(
            routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _answer_without_route}
        )
        later = handover.work_paths if handover else None
        self.work = Work(app, app.router.routes.extend, self.desk, self._pool, Intake(models.budget, self._pool), later)
        self._routes = routes
        self.openapi = handover.openapi if handover else msgspec.json.encode(openapi(self.routes))
        if handover is not None:
            models.go_on(handover.models)
            metrics.idled()
        door: ASGIApp = Door(self.work, settings, metrics, [*(one.path for one in routes), *self.work.paths])
        if settings.cors_origins:
            from starlette.middleware.cors import CORSMiddleware

            door = CORSMiddleware(
                door,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("authorization", "content-type"),
            )
        self.asgi = door

    @property
    def routes(self) -> list[DeskRoute]:
        """What it answers, as far as it was imported."""
        return [*self._routes, *self.work.routes]

    @property
    def spent(self) -> bool:
        """Whether libraries were imported for models that are idle now, and no request for a model has come lately."""
        idle_s = self.desk.settings.idle_s
        return (
            idle_s is not None
            and bool(self.work.routes)
            and self.desk.models.idle
            and time.monotonic() - self.work.ended_s >= idle_s
        )

    def handover(self, listening: int, connections: Sequence[IdleConnection]) -> Handover:
        """What it leaves to the process that takes the place of this one.

        Args:
            listening: descriptor of the socket that listens.
            connections: of clients.

        Raises:
            ManifestError: a model would not be found again.
        """
        served = self.desk.models.served
        for directory in self.desk.settings.directories.values():
            manifests.read(directory)
        return Handover(
            settings=self.desk.settings,
            listening=listening,
            connections=connections,
            openapi=self.openapi,
            work_paths=sorted(self.work.paths),
            models={name: one.counts for name, one in served.items()},
            counts=self.desk.metrics.counts(),
        )

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self.opening = opening = asyncio.ensure_future(self._open())
        try:
            yield
        finally:
            self.leave()
            opening.cancel()
            await asyncio.wait([opening])
            await self.desk.models.end()
            self._pool.shutdown()

    def leave(self) -> None:
        """End all calls before their next sweep."""
        for place in tuple(self.desk.admission.places):
            place.leave()

    async def _open(self) -> None:
        try:
            if not self.desk.models.ready:
                await self.desk.models.open_all()
        except Exception as error:  # noqa: BLE001 - the server ends with it
            self.failure = error
            self._on_failure()


async def _answer_without_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = "takes no " + request.method if status == 405 else "is no route of this server"
    answer = error_response(ApiError(status, f"{request.url.path:.80} {what}."))
    if isinstance(error, HTTPException):
        # The methods that a route takes.
        answer.headers.update(error.headers or {})
    return answer
