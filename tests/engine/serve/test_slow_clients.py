"""A client that sends or takes slowly, or never goes on, is left after a time. Clocks are the test's own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from tests.engine.harness import PATIENCE_S
from tests.engine.serve.client import Answer, running, settings
from uvicorn.server import ServerState

from pipeload.serve.connections import Connection
from pipeload.serve.settings import LIMITS

_HEAD = b"POST /x HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\n"
_JUST_BEFORE_S, _JUST_AFTER_S = -1.0, 2.0


class Clock(asyncio.SelectorEventLoop):
    """A loop whose clock the test moves."""

    moved_s = 0.0

    def time(self) -> float:
        return super().time() + self.moved_s

    async def move(self, seconds: float) -> None:
        """Time goes by, and what was due is done."""
        self.moved_s += seconds
        for _ in range(5):
            await asyncio.sleep(0)


def _on(clock: Clock, test: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=lambda: clock) as runner:
        runner.run(test)


def test_a_body_that_never_ends_is_answered_and_takes_no_place(chat_model: Path) -> None:
    clock = Clock()

    async def ask() -> None:
        async with running(settings(chat_model, max_waiting=1)) as client:
            intake = client.application.work.intake
            slow = client.begin("POST", "/v1/completions", raw=b'{"prompt": "x', unfinished=True)
            # The time of a body begins when it is read.
            while intake.free_bytes == LIMITS.bodies_bytes:
                await asyncio.sleep(0)
            await clock.move(LIMITS.body_s + _JUST_BEFORE_S)
            assert slow.status == 0
            # The only place is free meanwhile.
            assert not client.application.desk.admission.places
            await clock.move(_JUST_AFTER_S)
            await asyncio.wait_for(slow.task, PATIENCE_S)  # type: ignore[arg-type]
            _check_408(slow)

    _on(clock, ask())


def _check_408(answer: Answer) -> None:
    assert answer.status == 408
    assert answer.headers["connection"] == "close"
    assert answer.json()["error"]["code"] == "request_timeout"
    assert answer.message == "After 60 s only 13 B of the request had come. Send it faster, or less."


class Wire(asyncio.Transport):
    """What a connection writes; a client that takes nothing fills it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def _echo(_scope: Any, receive: Any, send: Any) -> None:
    """Answers at once, whether or not the body has come."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok", "more_body": False})


async def _read(_scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await _echo(_scope, receive, send)


def _connected(app: Any) -> tuple[Connection, Wire]:
    config = uvicorn.Config(app, http=Connection, ws="none", log_config=None, timeout_keep_alive=5)
    config.load()
    connection = Connection(config=config, server_state=ServerState(), app_state={}, _loop=asyncio.get_running_loop())
    wire = Wire()
    connection.connection_made(wire)
    return connection, wire


@pytest.mark.parametrize("begun", [b"", _HEAD[:20]])
@pytest.mark.parametrize("earlier", [False, True])
def test_headers_that_never_end_close_the_connection(begun: bytes, earlier: bool) -> None:
    clock = Clock()

    async def ask() -> None:
        connection, wire = _connected(_read)
        if earlier:
            connection.data_received(_HEAD + b"body")
            await clock.move(0)
            assert wire.written.endswith(b"ok")
        if begun:
            connection.data_received(begun)
        if begun or not earlier:
            await clock.move(LIMITS.head_s + _JUST_BEFORE_S)
            assert not wire.closed
            # A byte now and then gains nothing.
            if begun:
                connection.data_received(b"x")
            await clock.move(_JUST_AFTER_S)
        else:
            await clock.move(6)  # uvicorn's own time between two requests
        assert wire.closed
        connection.connection_lost(None)

    _on(clock, ask())


def test_the_rest_of_a_body_that_was_answered_is_not_waited_for_for_ever() -> None:
    clock = Clock()

    async def ask() -> None:
        connection, wire = _connected(_echo)
        connection.data_received(_HEAD + b"b")
        await clock.move(0)
        assert wire.written.endswith(b"ok")
        for _ in range(2):
            connection.data_received(b"o")
            await clock.move(LIMITS.body_s / 2 - 1)
        assert not wire.closed
        await clock.move(_JUST_AFTER_S + 1)
        assert wire.closed
        connection.connection_lost(None)

    _on(clock, ask())


def test_a_request_that_came_whole_has_no_time_limit() -> None:
    clock = Clock()

    async def ask() -> None:
        answer = asyncio.Event()

        async def long(scope: Any, receive: Any, send: Any) -> None:
            await answer.wait()
            await _read(scope, receive, send)

        connection, wire = _connected(long)
        connection.data_received(_HEAD + b"body")
        await clock.move(1000 * LIMITS.body_s)
        assert not wire.closed
        answer.set()
        await clock.move(0)
        assert wire.written.endswith(b"ok")
        connection.connection_lost(None)

    _on(clock, ask())


@pytest.mark.parametrize("taken", [False, True])
def test_a_client_that_takes_no_answer_is_left(taken: bool) -> None:
    clock = Clock()

    async def ask() -> None:
        connection, wire = _connected(_read)
        connection.data_received(_HEAD + b"body")
        connection.pause_writing()
        await clock.move(LIMITS.unread_s + _JUST_BEFORE_S)
        assert not wire.aborted
        if taken:
            connection.resume_writing()
        await clock.move(_JUST_AFTER_S)
        assert wire.aborted is not taken
        connection.connection_lost(None)
        await clock.move(0)

    _on(clock, ask())


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x00", b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"x" * (1 << 17)]
)
def test_what_is_no_http_gets_an_error_in_the_shape_of_all_others(data: bytes) -> None:
    clock = Clock()

    async def ask() -> None:
        connection, wire = _connected(_read)
        connection.data_received(data + b"\r\n\r\n")
        head, _, body = wire.written.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["message"].startswith("Invalid HTTP request received. Send HTTP/1.1")
        assert wire.closed
        connection.connection_lost(None)

    _on(clock, ask())


def test_garbage_behind_a_request_ends_the_connection_and_no_other() -> None:
    clock = Clock()

    async def ask() -> None:
        connection, wire = _connected(_echo)
        connection.data_received(_HEAD + b"b")
        await clock.move(0)
        connection.data_received(b"ody" + b"\0\r\n\r\n")
        assert wire.closed
        connection.connection_lost(None)

    _on(clock, ask())
