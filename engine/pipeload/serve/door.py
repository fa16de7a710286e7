"""What may come in: the key, the host that a browser believes it talks to, and the bytes of all bodies together.

Each request has one line in the log.
"""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Mapping, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeload.serve.errors import ApiError, error_response
from pipeload.serve.intake import Intake, Share
from pipeload.serve.log import log_request
from pipeload.serve.metrics import Metrics
from pipeload.serve.routes.page import PATHS as PAGE_PATHS
from pipeload.serve.settings import Settings, is_loopback

__all__ = ["Door"]

_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?", re.ASCII)
_OPEN = frozenset({"/health", "/ready"}) | PAGE_PATHS
"""Paths without a key: the probes of a supervisor, which tell nothing else, and the page, which asks for the key."""


class Door:
    """Lets requests in, counts them, and logs them.

    Args:
        app: answers those that may come in.
        settings: keys and host.
        metrics: counts.
        paths: of all routes, for the log and for metrics.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, paths: Sequence[str]) -> None:
        self._app, self._metrics = app, metrics
        self._keys = settings.keys
        self._paths = frozenset(paths)
        self._intake = Intake()
        # Without a key, a page that a browser has loaded under a name of its own for this machine could call.
        self._own_names_only = not settings.keys and is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin_s, status = time.perf_counter(), 499
        share = Share(self._intake, receive)
        note: dict[str, object] = {}
        scope.setdefault("state", {})["note"] = note

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                await error_response(error)(scope, receive, send_noting)
            else:
                await self._app(scope, share.receive, send_noting)
        finally:
            share.end()
            seconds = time.perf_counter() - begin_s
            route = self._route(scope["path"])
            self._metrics.request(route, status, seconds)
            log_request(scope["method"], route, status, seconds, note)

    def _check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raise ApiError if a request may not come in."""
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy before this server may go by the other one, and take what follows for another request.
            raise ApiError(
                400, "The request has two lengths. Send Content-Length or Transfer-Encoding.", code="two_lengths"
            )
        if self._own_names_only and not is_loopback(_name(headers.get("host", ""))):
            raise ApiError(
                403, f"This server answers to localhost, not to '{headers.get('host', ''):.80}'.", code="wrong_host"
            )
        if not self._keys or path in _OPEN:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1", "replace") if kind.lower() == "bearer" else b""
        # All of them, so that the time says nothing about which one is near.
        fits = [hmac.compare_digest(given, one) for one in self._keys]
        if not any(fits):
            raise ApiError(401, "The API key is missing or wrong. Send it as a bearer token.", code="invalid_api_key")

    def _route(self, path: str) -> str:
        if path in self._paths:
            return path
        if path in PAGE_PATHS:
            return "/page/{file}"
        return "/v1/models/{model}" if path.startswith("/v1/models/") else "other"


def _name(host: str) -> str:
    """A host without its port; empty where it is no host."""
    found = _HOST.fullmatch(host)
    return found["name"].strip("[]") if found else ""
