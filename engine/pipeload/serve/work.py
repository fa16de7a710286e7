"""The routes that call models. Their modules bring libraries in (NumPy, tokenizers), so a process that takes the place
of an idle one goes without until the first call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from importlib import import_module

from starlette.types import ASGIApp, Receive, Scope, Send

from pipeload.serve.errors import error_response
from pipeload.serve.intake import Intake
from pipeload.serve.routes.desk import Desk, DeskRoute

__all__ = ["Work"]

_MODULES = ("chat", "completions", "responses", "embeddings", "ranking", "classify", "tokenize")


class Work:
    """Lets requests through to an application, which gets the routes that call models before the first such request.

    Args:
        app: answers the requests.
        add: gives it routes.
        desk: what they use.
        executor: imports them.
        intake: counts what requests hold.
        paths: of the routes, where they are to be imported later; None imports them now.

    Attributes:
        intake: what requests hold.
        routes: those that were imported.
        paths: of all.
        ended_s: when the last request for a model ended, on the clock of `time.monotonic`.
    """

    def __init__(
        self,
        app: ASGIApp,
        add: Callable[[Sequence[DeskRoute]], object],
        desk: Desk,
        executor: Executor,
        intake: Intake,
        paths: Sequence[str] | None,
    ) -> None:
        self._app, self._add, self._desk, self._executor, self.intake = app, add, desk, executor, intake
        self._lock = asyncio.Lock()
        self.routes: list[DeskRoute] = []
        self.ended_s = time.monotonic()
        if paths is None:
            self._take(_imported())
        self.paths = frozenset([one.path for one in self.routes] if paths is None else paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["path"] not in self.paths:
            await self._app(scope, receive, send)
            return
        try:
            async with self._lock:
                if not self.routes:
                    self._take(await asyncio.get_running_loop().run_in_executor(self._executor, _imported))
        except Exception as error:  # noqa: BLE001 - the client gets it
            await error_response(error)(scope, receive, send)
            return
        try:
            with self.intake.request() as held:
                scope["state"]["held"] = held
                await self._app(scope, receive, send)
        finally:
            self.ended_s = time.monotonic()

    def _take(self, routes_of: Sequence[Callable[[Desk], Sequence[DeskRoute]]]) -> None:
        self.routes = [route for routes in routes_of for route in routes(self._desk)]
        self._add(self.routes)


def _imported() -> list[Callable[[Desk], Sequence[DeskRoute]]]:
    return [import_module(f"pipeload.serve.routes.{name}").routes for name in _MODULES]
