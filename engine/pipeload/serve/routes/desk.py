"""What all routes share."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from pipeload.serve.admission import Admission, ClientGone, Place
from pipeload.serve.bodies.generation import CachedTokens, Usage
from pipeload.serve.errors import error_response
from pipeload.serve.metrics import Metrics
from pipeload.serve.models import Models, Served
from pipeload.serve.settings import Settings
from pipeload.serve.sse import EventStream

if TYPE_CHECKING:
    from pipeload.model import Model
    from pipeload.serve.generation import Answers

__all__ = ["Desk", "DeskRoute", "json_response", "new_id", "note"]

Endpoint: TypeAlias = Callable[["Desk", Request], Awaitable[Response]]

_GONE = 499
"""The status that logs have for a client that went away; it gets none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """The parts of the server that routes use."""

    settings: Settings
    models: Models
    admission: Admission
    metrics: Metrics

    @asynccontextmanager
    async def call(self, request: Request, served: Served) -> AsyncIterator[tuple[Place, Model]]:
        """A place for one call, whose body was read, and the open model.

        Raises:
            ApiError: all places are taken, or there is no room for the model.
            PipeloadError: the model cannot be opened.
        """
        note(request, model=served.name)
        with self.admission.place() as place:
            watch = asyncio.ensure_future(place.watch(request.receive))
            try:
                async with served.use() as model:
                    yield place, model
            finally:
                watch.cancel()

    async def stream(
        self,
        request: Request,
        served: Served,
        events: Callable[[Place, Model], Awaitable[AsyncGenerator[bytes, None]]],
    ) -> Response:
        """An answer of events, which has a place until it ends."""
        stack = AsyncExitStack()
        try:
            place, model = await stack.enter_async_context(self.call(request, served))
            made = await events(place, model)
        except BaseException:
            await stack.aclose()
            raise
        return await EventStream(made, stack.aclose).begin()


class DeskRoute(Route):
    """A route whose failures are answers.

    Args:
        path: of its requests.
        endpoint: answers them; the first line of its docstring says how.
        desk: what it uses.
        method: of HTTP.
        takes: the kind of its requests' bodies, if they have one.
        gives: the kind of its answers, where these are JSON.
    """

    def __init__(
        self, path: str, endpoint: Endpoint, desk: Desk, *, method: str = "POST", takes: Any = None, gives: Any = None
    ) -> None:
        @wraps(endpoint)
        async def answer(request: Request) -> Response:
            try:
                return await endpoint(desk, request)
            except (ClientGone, ClientDisconnect):
                return Response(status_code=_GONE)
            except Exception as error:  # noqa: BLE001 - the client gets it
                return error_response(error)

        super().__init__(path, answer, methods=[method])
        self.method, self.takes, self.gives = method, takes, gives
        self.summary = (endpoint.__doc__ or "").partition("\n")[0]


def json_response(body: Any) -> Response:
    """An answer with a body."""
    return Response(msgspec.json.encode(body), media_type="application/json")


def note(request: Request, **fields: object) -> None:
    """Have fields in the request's line of the log."""
    request.scope["state"]["note"].update(fields)


def counted(request: Request, answers: Answers, **fields: object) -> Usage:
    """The counts of tokens, which the request's line of the log has, too."""
    prompt, made = answers.prompt_tokens, answers.tokens
    note(request, prompt_tokens=prompt, completion_tokens=made, **fields)
    return Usage(
        prompt_tokens=prompt,
        prompt_tokens_details=CachedTokens(cached_tokens=answers.cached_tokens),
        completion_tokens=made,
        total_tokens=prompt + made,
    )


def new_id(kind: str) -> str:
    """A name for an answer."""
    return f"{kind}-{secrets.token_hex(12)}"
