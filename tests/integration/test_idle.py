"""`pipeload serve --idle` in a process of its own: its memory when it is idle, and clients that call meanwhile."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_serve import folder as folder

httpx2 = pytest.importorskip("httpx2")

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("serve")]

_PATIENCE_S = 300
_IDLE_BYTES = 60_000_000
_CHAT = {"model": "chat", "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8}
_GATE = """
import os
if "PIPELOAD_HANDOVER" in os.environ:
    open({reached!r}, "w").close()
    open({go!r}).close()
"""


class _Server:
    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        assert process.stdout is not None
        self.process, self._log = process, log
        self.address = process.stdout.readline().strip()
        assert self.address.startswith("http://"), self.log
        self.host, port = self.address.removeprefix("http://").split(":")
        self.port = int(port)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def client(self) -> Any:
        """A client that repeats no request."""
        return httpx2.Client(base_url=self.address, timeout=_PATIENCE_S)

    def libraries(self) -> set[str]:
        """Those of the models that the process has in memory."""
        maps = Path(f"/proc/{self.process.pid}/maps").read_text()
        return {name for name in ("onnxruntime", "numpy", "tokenizers") if f"/{name}/" in maps}

    def descriptors(self) -> int:
        return len([*Path(f"/proc/{self.process.pid}/fd").iterdir()])

    def rss_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _served(folder: Path, log: Path, *paths: Path) -> Iterator[_Server]:
    """A server whose models are idle after a second; `paths` come first where Python looks for modules."""
    command = [sys.executable, "-m", "pipeload", "serve", folder / "chat", folder / "embedder", "--budget", "4GB"]
    command += ["--idle", "1s", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [*map(str, paths), *sys.path]))}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [*map(str, command)], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        try:
            yield _Server(process, log)
        finally:
            process.terminate()
            process.communicate(timeout=_PATIENCE_S)


def _idled(client: Any) -> int:
    """How often the server's process was replaced."""
    (line,) = [one for one in client.get("/metrics").text.splitlines() if one.startswith("pipeload_idled_total ")]
    return int(float(line.split()[1]))


def test_an_idle_server_gives_its_memory_back_and_answers_all_along(folder: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(_served(folder, tmp_path / "log"))
        client = stack.enter_context(server.client())
        pool = stack.enter_context(ThreadPoolExecutor(4))
        first = client.post("/v1/chat/completions", json=_CHAT).json()
        assert server.libraries() == {"onnxruntime", "numpy", "tokenizers"}
        # One client has sent a part of its request, and goes on when the process is another.
        slow = stack.enter_context(socket.create_connection((server.host, server.port), _PATIENCE_S))
        slow.sendall(b"GET /v1/models/chat HTTP/1.1\r\nHost: local")
        idle = threading.Event()

        def call(keep: bool) -> list[int]:
            statuses = []
            with server.client() as own:
                while not idle.is_set():
                    if keep:
                        statuses.append(own.get("/v1/models").status_code)
                    else:
                        with server.client() as other:
                            statuses.append(other.get("/openapi.json").status_code)
            return statuses

        calls = [pool.submit(call, keep) for keep in (True, True, False, False)]
        try:
            while not _idled(client):
                pass
        finally:
            idle.set()
        assert {status for made in calls for status in made.result()} == {200}

        for path in ("/health", "/ready", "/metrics", "/openapi.json", "/v1/models"):
            assert client.get(path).status_code == 200
        assert client.get("/nowhere").status_code == 404
        assert {one["state"] for one in client.get("/v1/models").json()["data"]} == {"closed"}
        assert server.libraries() == set()
        assert server.rss_bytes() < _IDLE_BYTES
        slow.sendall(b"host\r\nConnection: close\r\n\r\n")
        with slow.makefile("rb") as answer:
            assert answer.readline() == b"HTTP/1.1 200 OK\r\n"

        again = client.post("/v1/chat/completions", json=_CHAT).json()
        assert again["choices"] == first["choices"]
        chats = 'pipeload_requests_total{route="/v1/chat/completions",status="200"} 2.0'
        assert chats in client.get("/metrics").text
        descriptors = server.descriptors()
        while _idled(client) < 2:
            pass
        assert server.rss_bytes() < _IDLE_BYTES
        assert server.descriptors() <= descriptors
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(_PATIENCE_S) == 0
        assert server.log.count("the process was replaced, and has") == 2


@contextmanager
def _between(folder: Path, tmp_path: Path) -> Iterator[tuple[_Server, Any]]:
    """A server whose new process has just begun, and a function that lets it go on."""
    reached, go = tmp_path / "reached", tmp_path / "go"
    for one in (reached, go):
        os.mkfifo(one)
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(_GATE.format(reached=str(reached), go=str(go)))
    with _served(folder, tmp_path / "log", site) as server:
        reached.open().close()
        yield server, lambda: go.open("w").close()


def test_a_call_while_the_process_is_replaced_is_answered(folder: Path, tmp_path: Path) -> None:
    with _between(folder, tmp_path) as (server, go_on):
        with socket.create_connection((server.host, server.port), _PATIENCE_S) as connection:
            body = json.dumps(_CHAT).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + body)
            go_on()
            with connection.makefile("rb") as answer:
                assert answer.readline() == b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_process_is_replaced_ends_it(folder: Path, tmp_path: Path, number: int) -> None:
    with _between(folder, tmp_path) as (server, go_on):
        server.process.send_signal(number)
        go_on()
        assert server.process.wait(_PATIENCE_S) == 0, server.log
