"""Connections of clients, and which of them another process can go on with."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import uvicorn
from tests.engine.harness import PATIENCE_S
from uvicorn.server import ServerState

from pipeload.serve import port as ports
from pipeload.serve.connections import Connection
from pipeload.serve.handover import IdleConnection
from pipeload.serve.port import Port, idle_connections, listening_socket

_HEAD = b"GET /x HTTP/1.1\r\nHost: localhost\r\n"


class _Process:
    """The parts of a server that have to do with connections; its answers wait at a gate."""

    def __init__(self, most: int = 9) -> None:
        self.state, self.gate = ServerState(), asyncio.Event()
        self._config = uvicorn.Config(
            self._answer, http="h11", ws="none", lifespan="off", log_config=None, interface="asgi3"
        )
        self.port = Port(listening_socket("127.0.0.1", 0), self._protocol, most)

    def connections(self) -> list[IdleConnection] | None:
        return None if self.state.tasks else idle_connections(self.state.connections)

    async def until(self, holds: Callable[[], bool]) -> None:
        async def wait() -> None:
            while not holds():
                await asyncio.sleep(0)

        await asyncio.wait_for(wait(), PATIENCE_S)

    def _protocol(self) -> Connection:
        return Connection(self._config, self.state, {})

    async def _answer(self, scope: Any, _receive: Any, send: Any) -> None:
        await self.gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": scope["path"].encode()})


def test_only_connections_without_a_request_go_over_and_those_with_a_part_of_one_lose_nothing() -> None:
    async def main() -> None:
        first, second = _Process(), _Process()
        first.port.accept()
        reader, writer = await asyncio.open_connection(*first.port.listening.getsockname())

        writer.write(_HEAD)
        await first.until(lambda: any(one.received == _HEAD for one in first.connections() or ()))
        writer.write(b"\r\n")
        await first.until(lambda: first.connections() is None)
        first.gate.set()
        assert (await reader.readuntil(b"/x")).startswith(b"HTTP/1.1 200")
        await first.until(lambda: bool(first.connections()))

        writer.write(_HEAD)
        await first.until(lambda: any(one.received == _HEAD for one in first.connections() or ()))
        await first.port.pause()
        (left,) = first.connections() or ()
        # What this process has read goes over; what comes from now on, only the next one reads.
        (protocol,) = first.state.connections
        protocol.transport.pause_reading()
        writer.write(b"\r\n")
        second.gate.set()
        taken = IdleConnection(descriptor=os.dup(left.descriptor), received=left.received)
        second.port.take([taken], keep_alive_s=PATIENCE_S)
        assert not os.get_inheritable(taken.descriptor)
        assert (await reader.readuntil(b"/x")).startswith(b"HTTP/1.1 200")
        writer.close()
        await second.until(lambda: not second.state.connections)
        protocol.transport.abort()
        await first.port.close()
        await second.port.close()

    asyncio.run(main())


def test_a_connection_that_was_taken_and_stays_silent_is_closed() -> None:
    async def main() -> None:
        first, second = _Process(), _Process()
        first.port.accept()
        reader, writer = await asyncio.open_connection(*first.port.listening.getsockname())
        await first.until(lambda: bool(first.connections()))
        (left,) = first.connections() or ()
        (protocol,) = first.state.connections
        second.port.take([IdleConnection(descriptor=os.dup(left.descriptor))], keep_alive_s=0)
        protocol.transport.abort()
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        writer.close()
        await second.until(lambda: not second.state.connections)
        await first.port.close()
        await second.port.close()

    asyncio.run(main())


def test_of_too_many_connections_the_longest_idle_is_closed_and_none_that_has_a_request() -> None:
    async def main() -> None:
        process = _Process(most=2)
        process.port.accept()
        address = process.port.listening.getsockname()
        first, second = [await asyncio.open_connection(*address) for _ in range(2)]
        await process.until(lambda: len(process.state.connections) == 2)
        second[1].write(_HEAD + b"\r\n")
        await process.until(lambda: bool(process.state.tasks))
        third = await asyncio.open_connection(*address)
        assert await asyncio.wait_for(first[0].read(), PATIENCE_S) == b""
        third[1].write(_HEAD + b"\r\n")
        await process.until(lambda: len(process.state.tasks) == 2)
        # Both have a request, so one more waits in the kernel until one has ended.
        fourth = await asyncio.open_connection(*address)
        fourth[1].write(_HEAD + b"\r\n")
        process.gate.set()
        for reader, _ in (second, third, fourth):
            assert (await asyncio.wait_for(reader.readuntil(b"/x"), PATIENCE_S)).startswith(b"HTTP/1.1 200 ")
        for _, writer in (first, second, third, fourth):
            writer.close()
        await process.port.close()
        await process.until(lambda: not process.state.connections)

    asyncio.run(main())


def test_connections_leave_the_descriptors_that_answers_need(monkeypatch: pytest.MonkeyPatch) -> None:
    most = [0]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (most[0], most[0]))
    monkeypatch.setattr(ports, "_PAUSE_S", 0)

    async def main() -> None:
        process = _Process()
        has_descriptor = partial(ports._has_descriptor, process.port.listening)
        lowest = os.dup(0)
        os.close(lowest)
        # Half of the descriptors are kept. Clients' ends are in this process, too: a connection takes two numbers.
        most[0] = 2 * (lowest + 4)
        process.port.accept()
        clients = []
        for _ in range(6):
            clients.append(await asyncio.open_connection(*process.port.listening.getsockname()))
            await process.until(lambda: len(process.state.connections) == len(clients) or not has_descriptor())
        assert 0 < len(process.state.connections) < len(clients)
        most[0] += 100
        await process.until(lambda: len(process.state.connections) == len(clients))
        for _, writer in clients:
            writer.close()
        await process.until(lambda: not process.state.connections)
        await process.port.close()

    asyncio.run(main())
