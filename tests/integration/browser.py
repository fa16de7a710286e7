"""Chromium, as the system has it, with Playwright; and a server in a thread of this process, so that tests can stop it
at gates.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from pipeload.serve.application import Application
from pipeload.serve.settings import Settings

__all__ = ["CHROMIUM", "browser", "listening"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
"""Its program; None where there is none. Playwright's own copy is not used."""
_PATIENCE_S = 60


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox needs namespaces of users, which containers and root do not have. All pages are the server's own.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()


@contextmanager
def listening(settings: Settings) -> Iterator[tuple[str, Application]]:
    """A server on a port of its own, with all models open: its address, and its application."""
    application = Application(settings)
    began = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            assert application.opening is not None
            application.opening.add_done_callback(lambda _: began.set())

    server = Server(uvicorn.Config(application.asgi, port=0, log_config=None, ws="none", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, name="test-server")
    thread.start()
    try:
        assert began.wait(_PATIENCE_S)
        assert application.failure is None, application.failure
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", application
    finally:
        server.should_exit = True
        thread.join(_PATIENCE_S)
        assert not thread.is_alive()
