"""Waiting for a cluster always ends: with a result, with an error of pipeload, or with the connection."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import Future

import pytest
from tests.engine.harness import PATIENCE_S, Background, Gate, agents

import pipeload
from pipeload.cluster.loop import Loop
from pipeload.pipeline import callers, deadlines
from pipeload.pipeline.callers import Caller


async def _forever(begun: Gate) -> None:
    begun.open()
    await asyncio.Event().wait()


async def _failing() -> None:
    raise ZeroDivisionError("of a library")


def test_a_call_that_waits_ends_with_the_connection() -> None:
    loop, begun = Loop(), Gate()
    call = Background(lambda: loop.ask(_forever(begun)))
    begun.stop_here()
    loop.close()
    assert isinstance(call.wait(), pipeload.ClosedError)
    assert agents() == []
    with pytest.raises(pipeload.ClosedError):
        loop.ask(_failing())
    loop.close()


def test_what_a_library_raises_is_an_error_of_the_cluster() -> None:
    loop = Loop()
    try:
        with pytest.raises(pipeload.ClusterError, match="of a library"):
            loop.ask(_failing())
    finally:
        loop.close()


def test_what_an_interrupted_caller_waited_for_is_cancelled() -> None:
    class Interrupted(Future[None]):
        def result(self, timeout: float | None = None) -> None:
            raise KeyboardInterrupt

    loop, future = Loop(), Interrupted()
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.result(future)
        assert future.cancelled()
    finally:
        loop.close()


def test_a_call_whose_caller_has_left_is_cancelled() -> None:
    """A server's client goes away: its text ends at the token that is on its way."""
    loop, begun, ended = Loop(), Gate(), threading.Event()

    async def cancelled() -> None:
        try:
            await _forever(begun)
        finally:
            ended.set()

    caller = Caller()

    def call() -> None:
        with caller:
            loop.ask(cancelled())

    try:
        waiting = Background(call)
        begun.stop_here()
        caller.leave()
        assert isinstance(waiting.wait(), pipeload.ClosedError)
        assert ended.wait(PATIENCE_S)
    finally:
        loop.close()


def test_a_call_that_is_late_is_cancelled() -> None:
    loop, future = Loop(), Future[None]()
    try:
        with pytest.raises(pipeload.DeadlineError, match="while the cluster was asked"), pipeload.deadline(0.01):
            loop.result(future)
        assert future.cancelled()
    finally:
        loop.close()


def test_what_a_call_has_begun_is_not_bound_to_it() -> None:
    """A model that is opened in a call adapts after it: neither its caller nor its deadline end that."""
    loop = Loop()

    async def context() -> tuple[object, object]:
        return await asyncio.to_thread(lambda: (callers._CURRENT.get(), deadlines.current()))

    try:
        with Caller() as caller, pipeload.deadline(PATIENCE_S):
            begun = loop.begin(context())
            caller.leave()
        assert begun.result(PATIENCE_S) == (None, None)
    finally:
        loop.close()


def test_the_last_words_are_said_before_the_loop_ends() -> None:
    loop, said = Loop(), threading.Event()

    async def farewell() -> None:
        said.set()

    loop.at_the_end(farewell)
    loop.close()
    assert said.is_set()


def test_an_address_where_none_answers_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeload.cluster.connection._CONNECT_S", 0.2)
    before = threading.active_count()
    with socket.socket() as taken:
        # It is bound, and does not listen.
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(pipeload.ClusterError, match="No cluster answers"):
            pipeload.connect(f"tcp://127.0.0.1:{taken.getsockname()[1]}")
    assert threading.active_count() <= before
