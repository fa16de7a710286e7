"""A server whose disk fails, whose descriptors run out, and that is told to end, while it streams answers."""

from __future__ import annotations

import errno
import http.client
import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from tests.models import REPOSITORY
from tests.system.preload import Control, no_compiler
from tests.system.processes import PATIENCE_S, environment
from tests.system.rows import Finding, Row, tiny

__all__ = ["ROWS"]

_STREAMS, _TOKENS = 4, 40
_DESCRIPTORS, _CONNECTIONS = 64, 120


class _Server:
    """A server of a tiny chat model, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], control: Control | None) -> None:
        self.process, self.control = process, control
        assert process.stdout is not None
        self.port = int(process.stdout.readline().strip().rpartition(":")[2])

    def ask(self, number: int, *, stream: bool = False, begun: threading.Event | None = None) -> tuple[str, str]:
        """The text of an answer, and its error; `begun` is set once the first piece of it is there."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            body = {
                "model": "chat",
                "prompt": f"w{number} w7",
                "max_tokens": _TOKENS,
                "stream": stream,
                "temperature": 0,
            }
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if not stream:
                told = json.loads(answer.read())
                return (told["choices"][0]["text"], "") if "choices" in told else ("", told["error"]["message"])
            text, error = "", ""
            for line in answer:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    error = error or (event.get("error") or {}).get("message", "")
                    text += "".join(one["text"] for one in event.get("choices", ()))
                    if begun is not None:
                        begun.set()
            return text, error
        except (OSError, http.client.HTTPException) as broken:
            return "", f"the connection: {type(broken).__name__}"
        finally:
            connection.close()
            if begun is not None:
                begun.set()

    def end(self, found: Finding) -> None:
        """The end after SIGTERM: exit code 0, without a traceback."""
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        found.expect(self.process.returncode == 0, f"exit code {self.process.returncode}: {errors[-500:]}")
        found.expect("Traceback" not in errors, f"a traceback: {errors[-800:]}")


@contextmanager
def _served(place: Path, *, control: bool = False, descriptors: int | None = None) -> Iterator[_Server]:
    from tests.engine.serve.conftest import with_words

    directory = with_words(Path(shutil.copytree(tiny("llama"), place / "chat")))
    made = Control(directory, place) if control else None

    def limit() -> None:
        if descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    command = [sys.executable, "-m", "pipeload", "serve", str(directory), "--port", "0", "--budget", "2GB"]
    process = subprocess.Popen(
        [*command, "--prefix-cache", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment({"PIPELOAD_CACHE": str(place / "cache"), **(made.environment if made else {})}),
        preexec_fn=limit,
    )
    try:
        server = _Server(process, made)
        until_s = time.monotonic() + PATIENCE_S
        while not server.ask(0)[0] and time.monotonic() < until_s:
            time.sleep(0.2)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        if made is not None:
            made.__exit__(None, None, None)


class _Streams:
    """Answers that are streamed at the same time, each in a thread of its own; all have begun."""

    def __init__(self, server: _Server) -> None:
        self.answers: dict[int, tuple[str, str]] = {}
        begun = [threading.Event() for _ in range(_STREAMS)]

        def take(number: int) -> None:
            self.answers[number] = server.ask(number, stream=True, begun=begun[number])

        self._threads = [threading.Thread(target=take, args=(number,), daemon=True) for number in range(_STREAMS)]
        for thread in self._threads:
            thread.start()
        for one in begun:
            one.wait(PATIENCE_S)

    def all(self) -> dict[int, tuple[str, str]]:
        """Wait for their ends."""
        for thread in self._threads:
            thread.join(PATIENCE_S)
        return self.answers


def _right(server: _Server) -> list[str]:
    return [server.ask(number)[0] for number in range(_STREAMS)]


def _disk(place: Path) -> Finding:
    """One read, and then all reads, fail in the middle of streams."""
    found = Finding()
    with _served(place, control=True) as server:
        assert server.control is not None
        right = _right(server)
        for first, count in ((1, 1), (5, 1), (11, 1), (3, 50), (1, 1 << 30)):
            found.runs += 1
            words = f"reads fail from number {first} on, {count} times"
            streams = _Streams(server)
            server.control.disturb("read fails", first=first, count=count, value=errno.EIO)
            for number, (text, error) in streams.all().items():
                found.expect(error or text == right[number], f"{words}: stream {number}: a wrong answer")
                found.expect(not error.startswith("the connection"), f"{words}: stream {number}: {error}")
                found.expect(right[number].startswith(text), f"{words}: stream {number}: a wrong beginning")
            server.control.rest()
            found.expect(server.process.poll() is None, f"{words}: the server has ended")
            # What a Loading Agent has met ahead of a call is told to that call.
            server.ask(0)
            found.expect(_right(server) == right, f"{words}: other answers afterwards")
        server.process.send_signal(signal.SIGTERM)
        server.end(found)
    return found


def _descriptors(place: Path) -> Finding:
    """Idle connections take all descriptors while answers are streamed."""
    found = Finding()
    with _served(place, descriptors=_DESCRIPTORS) as server:
        right = _right(server)
        for _ in range(3):
            found.runs += 1
            streams = _Streams(server)
            idle = []
            with suppress(OSError):
                for _ in range(_CONNECTIONS):
                    idle.append(socket.create_connection(("127.0.0.1", server.port), timeout=5))
            answers = streams.all()
            found.expect(answers == {i: (text, "") for i, text in enumerate(right)}, f"other answers: {answers}")
            for one in idle:
                one.close()
            found.expect(_right(server) == right, "other answers afterwards")
        server.process.send_signal(signal.SIGTERM)
        server.end(found)
    return found


def _ended(place: Path) -> Finding:
    """SIGTERM in the middle of streams, and again: the second one ends them at once."""
    found = Finding()
    for signals in (1, 1, 2):
        found.runs += 1
        with _served(place / str(found.runs)) as server:
            right = _right(server)
            streams = _Streams(server)
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
            answers = streams.all()
            for number, (text, error) in answers.items():
                whole = text == right[number] and not error
                found.expect(whole or signals > 1, f"stream {number} ends otherwise: {text!r}, {error}")
                found.expect(right[number].startswith(text), f"stream {number} has another beginning: {text!r}")
            server.end(found)
    return found


def _lacks() -> str | None:
    missing = [name for name in ("uvicorn", "starlette", "tokenizers", "torch") if not find_spec(name)]
    return f"needs {', '.join(missing)}" if missing else None


ROWS = (
    Row(
        name="serve-disk",
        fault="reads fail with EIO while a server streams 4 answers",
        outcome="each stream is right, or ends with the error",
        recovered="the next answers are right",
        make=_disk,
        lacks=lambda: no_compiler() or _lacks(),
        long=True,
    ),
    Row(
        name="serve-nofile",
        fault="idle connections take all descriptors of a server that streams 4 answers",
        outcome="the streams are right",
        recovered="new connections are answered when the idle ones are gone",
        make=_descriptors,
        lacks=_lacks,
        long=True,
    ),
    Row(
        name="serve-sigterm",
        fault="SIGTERM while a server streams 4 answers",
        outcome="all streams end right (at a second SIGTERM, at once); exit code 0, no traceback",
        recovered="-",
        make=_ended,
        lacks=_lacks,
        slow=True,
    ),
)
