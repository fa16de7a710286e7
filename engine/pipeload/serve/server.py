"""The server on its port, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from types import FrameType

import prometheus_client
import uvicorn

from pipeload.errors import PipeloadError
from pipeload.machine.memory import rss_bytes
from pipeload.machine.sizes import format_bytes
from pipeload.machine.terminal import printable
from pipeload.serve.application import Application
from pipeload.serve.connections import Connection
from pipeload.serve.errors import LOGGER
from pipeload.serve.handover import Handover, can_replace, hear_signals, read_handover, replace_process
from pipeload.serve.log import set_up_log
from pipeload.serve.port import Port, idle_connections, listening_socket
from pipeload.serve.settings import Settings, most_connections

__all__ = ["go_on", "serve"]

_KEEP_ALIVE_S = 30
_HEADER_BYTES = 16 << 10


def serve(settings: Settings, tell: Callable[[str], object], *, replaceable: bool = False) -> None:
    """Serve until SIGTERM or Ctrl-C; then calls have `settings.drain_s` to end.

    Args:
        settings: how.
        tell: gets the server's address, once it listens.
        replaceable: this process does nothing else, and its program begins with `pipeload.__main__.main`: when all
            models are idle, it is replaced by one that goes on without them.

    Raises:
        ConfigError: the address cannot be listened on.
        PipeloadError: a model cannot be opened.
    """
    set_up_log(settings.log_format)
    with listening_socket(settings.host, settings.port) as listening:
        server = _Server(settings, listening, replaceable=replaceable and can_replace())
        host, port = listening.getsockname()[:2]
        tell(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        server.serve_all()


def go_on(told: str) -> None:
    """Serve on as the process that has replaced an idle server, until the process ends.

    Args:
        told: the value of `HANDOVER`.
    """
    try:
        handover, caught = read_handover(told)
        set_up_log(handover.settings.log_format)
        with socket.socket(fileno=handover.listening) as listening:
            listening.set_inheritable(False)
            _Server(handover.settings, listening, replaceable=True, handover=handover, caught=caught).serve_all()
    except PipeloadError as error:
        sys.exit(printable(f"error: {' '.join(str(error).split())}"))


class _Server(uvicorn.Server):
    """Ends by itself: a signal that has drained it is not raised again, so the process ends with exit code 0.

    Args:
        settings: how it runs.
        listening: its socket.
        replaceable: whether the process may be replaced when all models are idle.
        handover: of the process before this one.
        caught: the pipe that tells of signals which that one has caught.
    """

    def __init__(
        self,
        settings: Settings,
        listening: socket.socket,
        *,
        replaceable: bool,
        handover: Handover | None = None,
        caught: int | None = None,
    ) -> None:
        # Of all registries of the process: the time at which each series began doubles the answer.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._application = Application(settings, self.stop, handover)
        # A connection to a cluster would not survive it.
        self._replaceable = replaceable and settings.cluster is None
        self._handover, self._caught = handover, caught
        self._port = Port(listening, self._protocol, most_connections(settings.max_waiting))
        super().__init__(
            uvicorn.Config(
                self._application.asgi,
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
        )

    def serve_all(self) -> None:
        """Serve until a signal comes.

        Raises:
            PipeloadError: a model cannot be opened.
        """
        self.run([])
        # After a second signal they may still run, and the interpreter waits for their threads.
        self._application.leave()
        if self._application.failure is not None:
            raise self._application.failure

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Drain; at the second signal, end."""
        self.force_exit = self.should_exit
        self.stop()

    def stop(self) -> None:
        """Begin to drain."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, and open the port."""
        await super().startup(sockets)
        if self._caught is not None and hear_signals(self._caught):
            self.stop()
        if self._handover is not None:
            self._port.take(self._handover.connections, _KEEP_ALIVE_S)
            LOGGER.info("Idle: the process was replaced, and has %s", format_bytes(rss_bytes()))
        self._port.accept()

    async def on_tick(self, counter: int) -> bool:
        """Looks ten times a second whether the process can be replaced."""
        if self._replaceable and self._application.spent:
            await self._port.pause()
            self._replace()
            self._port.accept()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, drain, and end the application."""
        await self._port.close()
        await super().shutdown(sockets)
        if self.force_exit:
            # uvicorn leaves the application as it is, which would end with a traceback: closed models end their calls.
            self._application.leave()
            await self.lifespan.shutdown()

    def _replace(self) -> None:
        """Replace the process, unless there is a request. Nothing is awaited, so none can come meanwhile."""
        connections = idle_connections(self.server_state.connections)
        if connections is None or self.server_state.tasks or not self._application.spent:
            return
        try:
            handover = self._application.handover(self._port.listening.fileno(), connections)
            replace_process(handover, lambda: self.should_exit)
        except (PipeloadError, OSError) as error:
            LOGGER.warning("The process keeps libraries and heap, since it cannot be replaced: %s", error)
            self._replaceable = False

    def _protocol(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)
