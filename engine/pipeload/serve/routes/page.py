"""`/`, a page for people, and its files."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import Response

from pipeload.machine.files import read_file
from pipeload.serve.errors import ApiError
from pipeload.serve.routes.desk import Desk, DeskRoute

__all__ = ["PATHS", "routes"]

_FOLDER = Path(__file__).resolve().parents[1] / "page"
_FILES = MappingProxyType(
    {
        "index.html": "text/html",
        "page.css": "text/css",
        "page.js": "text/javascript",
        "calls.js": "text/javascript",
        "chat.js": "text/javascript",
        "embeddings.js": "text/javascript",
        "machine.js": "text/javascript",
        "icon.svg": "image/svg+xml",
    }
)
PATHS = frozenset({"/", *(f"/page/{name}" for name in _FILES)})
"""They need no key: they are the same for every server, and the page asks for the key."""

_MOST_BYTES = 1 << 20
_HEADERS = MappingProxyType(
    {
        # Nothing from elsewhere, nothing inline, no frame around it: text of a model cannot become a program.
        "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
)


def routes(desk: Desk) -> list[DeskRoute]:
    """The routes of this module."""
    return [
        DeskRoute("/", page, desk, method="GET"),
        DeskRoute("/page/{file}", page_file, desk, method="GET"),
    ]


async def page(_desk: Desk, _request: Request) -> Response:
    """A page for people: chat, embeddings, and the machine."""
    return _response("index.html")


async def page_file(_desk: Desk, request: Request) -> Response:
    """A file of the page."""
    name = request.path_params["file"]
    if name not in _FILES:
        raise ApiError(404, f"{request.url.path:.80} is no file of the page.")
    return _response(name)


def _response(name: str) -> Response:
    data = read_file(_FOLDER / name, most_bytes=_MOST_BYTES)
    return Response(data, headers=_HEADERS, media_type=_FILES[name])
