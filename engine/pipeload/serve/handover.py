"""What an idle server leaves to the process that takes its place, which has the same id and no models.

Closed models leave libraries, heaps and threads behind, several times as much as the server itself, and no process
gets rid of them. So the process is replaced (execve) by the same program, which goes on from here:

```
models closed, no request  ->  execve  ->  the same port and connections; libraries come with the next call
```

What clients send meanwhile waits in their sockets, which stay open, and signals wait until they are heard again.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pipeload.errors import ConfigError
from pipeload.serve import HANDOVER
from pipeload.serve.metrics import Count
from pipeload.serve.models import ModelCounts
from pipeload.serve.settings import Settings

__all__ = ["IdleConnection", "Handover", "can_replace", "hear_signals", "read_handover", "replace_process"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Those that end a server."""


class IdleConnection(msgspec.Struct, frozen=True, kw_only=True):
    """A client's connection that has no request.

    Attributes:
        descriptor: of its socket.
        received: the beginning of a request that has come.
    """

    descriptor: int
    received: bytes = b""


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """All that a server needs to go on.

    Attributes:
        settings: how it runs.
        listening: descriptor of the socket that listens.
        connections: of clients.
        openapi: the description of all routes.
        work_paths: of the routes that call models.
        models: name -> counts.
        counts: name of a figure -> counts of requests.
    """

    settings: Settings
    listening: int
    connections: Sequence[IdleConnection]
    openapi: bytes
    work_paths: Sequence[str]
    models: Mapping[str, ModelCounts]
    counts: Mapping[str, Sequence[Count]]


def can_replace() -> bool:
    """Whether the system can replace this process by the same program."""
    return hasattr(os, "memfd_create") and bool(sys.executable) and len(sys.orig_argv) > 1


def replace_process(handover: Handover, ends: Callable[[], bool]) -> None:
    """Replace this process by one that goes on with `handover`. Returns only if a signal has come to end it.

    Args:
        handover: what it gets.
        ends: whether a signal was heard.

    Raises:
        OSError: it cannot be replaced, and is as it was.
    """
    kept = os.memfd_create("pipeload-handover", 0)
    caught, catch = os.pipe()
    os.set_blocking(catch, False)
    passed = [caught, handover.listening, *(one.descriptor for one in handover.connections)]
    # A library's thread may still catch a signal that this thread holds back: the pipe tells the new process.
    before = signal.set_wakeup_fd(catch, warn_on_full_buffer=False)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        if ends():
            return
        os.write(kept, msgspec.json.encode(handover, enc_hook=str))
        for descriptor in passed:
            os.set_inheritable(descriptor, True)
        told = {HANDOVER: f"{kept},{caught}"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | told)
    finally:
        for descriptor in passed:
            os.set_inheritable(descriptor, False)
        signal.set_wakeup_fd(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for descriptor in (kept, caught, catch):
            os.close(descriptor)


def read_handover(told: str) -> tuple[Handover, int]:
    """What the process before this one has left, and the pipe that tells of signals.

    Args:
        told: the value of the variable `HANDOVER`.

    Raises:
        ConfigError: no process has left this.
    """
    try:
        kept, caught = map(int, told.split(","))
        with os.fdopen(kept, "rb") as file:
            file.seek(0)
            made = msgspec.json.decode(file.read(), type=Handover, dec_hook=_decoded)
        os.set_blocking(caught, False)
    except (ValueError, OSError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"{HANDOVER} is '{told:.80}', which no server has left: {error}. Unset this variable."
        ) from error
    return made, caught


def hear_signals(caught: int) -> bool:
    """Hear signals that were held back, now that they have handlers.

    Args:
        caught: the pipe of `read_handover`, which is closed.

    Returns:
        Whether one had been caught before.
    """
    with os.fdopen(caught, "rb", buffering=0) as pipe:
        came = bool(pipe.read(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    return came


def _decoded(kind: type[Any], value: Any) -> Any:
    return kind(value) if kind is Path else value
