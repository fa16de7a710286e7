"""The port: the socket that listens, and clients' connections, which another process can take over as they are."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import weakref
from collections.abc import Callable, Iterable
from functools import partial

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeload.errors import ConfigError
from pipeload.serve.connections import Connection
from pipeload.serve.handover import IdleConnection

__all__ = ["Port", "idle_connections", "listening_socket"]

_BACKLOG = 512
_FULL_PAUSE_S = 0.05
"""Before it is looked again whether a connection has ended."""
_PAUSE_S = 1.0
"""Before connections are accepted again, where the process has no descriptor left for one."""
_KEPT_DESCRIPTORS = 64
"""Of the process, or half of all, are not for connections: Loading Agents open files for calls that run."""


class Port:
    """Accepts connections. uvicorn would by itself, and close them all at its end.

    Args:
        listening: the socket.
        protocol: makes the protocol of a connection.
        most: connections. For another one, the one is closed that has had no request for the longest time; where all
            have one, it waits in the kernel.
    """

    def __init__(self, listening: socket.socket, protocol: Callable[[], Connection], most: int) -> None:
        listening.setblocking(False)
        self.listening = listening
        self._protocol, self._most = protocol, most
        self._connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._beginning: set[asyncio.Task[object]] = set()
        self._open = False

    def accept(self) -> None:
        """Accept connections."""
        self._open = True
        asyncio.get_running_loop().add_reader(self.listening, self._accept_one)

    async def pause(self) -> None:
        """Accept no more: those that come wait in the kernel. Returns when all accepted ones have their protocol."""
        self._open = False
        asyncio.get_running_loop().remove_reader(self.listening)
        if self._beginning:
            await asyncio.wait(self._beginning)

    async def close(self) -> None:
        """Accept no more: those that come are refused."""
        await self.pause()
        self.listening.close()

    def take(self, connections: Iterable[IdleConnection], keep_alive_s: float) -> None:
        """Go on with connections of the process before this one.

        Args:
            connections: what it has left.
            keep_alive_s: one on which nothing comes for so long is closed.
        """
        for one in connections:
            protocol = self._protocol()
            if one.received:
                protocol.conn.receive_data(one.received)
            connected = socket.socket(fileno=one.descriptor)
            connected.set_inheritable(False)
            self._begin(connected, protocol).add_done_callback(partial(_expect, protocol, keep_alive_s))

    def _accept_one(self) -> None:
        if not self._has_room():
            self._pause(_FULL_PAUSE_S)
            return
        try:
            if not _has_descriptor(self.listening):
                self._pause(_PAUSE_S)
                return
            accepted, _ = self.listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:
            self._pause(_PAUSE_S)
            return
        self._begin(accepted, self._protocol())

    def _has_room(self) -> bool:
        """Whether one more connection may come, perhaps after another one was closed."""
        known = [one for one in self._connections if one.transport is not None and not one.transport.is_closing()]
        if len(known) < self._most:
            return True
        idle = min((one for one in known if _is_idle(one)), key=lambda one: one.since_s, default=None)
        if idle is not None:
            idle.transport.close()
        return idle is not None

    def _pause(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.listening)
        loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        if self._open:
            self.accept()

    def _begin(self, connected: socket.socket, protocol: Connection) -> asyncio.Task[object]:
        self._connections.add(protocol)
        begun = asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connected)
        task: asyncio.Task[object] = asyncio.ensure_future(begun)
        self._beginning.add(task)
        task.add_done_callback(self._begun)
        return task

    def _begun(self, task: asyncio.Task[object]) -> None:
        self._beginning.discard(task)
        if not task.cancelled():
            # A client may have gone already.
            task.exception()


def _has_descriptor(listening: socket.socket) -> bool:
    """Whether one more connection leaves the descriptors that answers need.

    Raises:
        OSError: there is none at all.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY:
        return True
    # The system gives the lowest number that is free.
    lowest = os.dup(listening.fileno())
    os.close(lowest)
    return lowest < most - min(_KEPT_DESCRIPTORS, most // 2)


def _expect(protocol: H11Protocol, keep_alive_s: float, begun: asyncio.Task[object]) -> None:
    """Have a connection closed on which nothing comes; uvicorn waits so only after an answer."""
    if begun.cancelled() or begun.exception() is not None or protocol.cycle is not None:
        return
    loop = asyncio.get_running_loop()
    protocol.timeout_keep_alive_task = loop.call_later(keep_alive_s, protocol.timeout_keep_alive_handler)


def idle_connections(protocols: Iterable[object]) -> list[IdleConnection] | None:
    """Connections that another process can go on with: None while one has a request, or something left to send."""
    found = []
    for one in protocols:
        if not isinstance(one, H11Protocol) or not _is_idle(one):
            return None
        received, _ = one.conn.trailing_data
        found.append(IdleConnection(descriptor=one.transport.get_extra_info("socket").fileno(), received=received))
    return found


def _is_idle(protocol: H11Protocol) -> bool:
    return (
        (protocol.cycle is None or protocol.cycle.response_complete)
        and (protocol.conn.our_state, protocol.conn.their_state) == (h11.IDLE, h11.IDLE)
        and not protocol.transport.is_closing()
        and not protocol.transport.get_write_buffer_size()
    )


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the address cannot be listened on.
    """
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
