"""Thousands of malformed requests over real connections to a server in a process of its own.

They come from the OpenAPI file of the server (schemathesis), from valid bodies with parts exchanged, and from the bytes
of valid requests with some of them damaged. `make test-requests` sends 10,000; `make test-slow` fewer.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.engine.serve.strange import BODIES, damaged, strange
from tests.integration.test_serve import folder  # noqa: F401 - a fixture

httpx2 = pytest.importorskip("httpx2")
schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.xdist_group("serve")]

REQUESTS = int(os.environ.get("PIPELOAD_TEST_REQUESTS", "250"))
"""Of all three kinds together."""
_PATIENCE_S = 300
_SENDERS = 4
_GROWTH_BYTES = 32 << 20
_CHAT = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6}
_EMBEDDINGS = {"model": "embedder", "input": ["the cat", "a dog sat"]}


class Served:
    """A server, and what it answered."""

    def __init__(self, address: str, process: psutil.Process) -> None:
        self.address = address
        self._process = process
        self.statuses: Counter[int] = Counter()

    def rss_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    def check(self, status: int, headers: Mapping[str, str], body: bytes, sent: object) -> None:
        """Every answer is either right, or an error in OpenAI's shape with a cause."""
        self.statuses[status] += 1
        said = (status, dict(headers), body[:2000], sent)
        assert status < 500 or (status == 503 and "retry-after" in headers), said
        kind = headers.get("content-type", "")
        if status >= 400:
            assert kind == "application/json", said
            _check_error(json.loads(body), said)
        elif kind == "application/json":
            json.loads(body, parse_constant=_refuse)
        elif kind.startswith("text/event-stream"):
            for line in body.decode().splitlines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:], parse_constant=_refuse)
                    if "error" in event and "message" in (event["error"] or {}):
                        assert event["error"]["code"] != "internal_error", said


def _check_error(body: Any, said: object) -> None:
    assert set(body) == {"error"}, said
    assert set(body["error"]) == {"message", "type", "param", "code"}, said
    assert body["error"]["message"], said
    assert isinstance(body["error"]["type"], str), said


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


@contextmanager
def _started(directories: list[Path], log: Path) -> Iterator[Served]:
    command = [sys.executable, "-m", "pipeload", "serve", *map(str, directories), "--port", "0", "--budget", "4GB"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://"), log.read_text()
            with httpx2.Client(base_url=address, timeout=_PATIENCE_S) as http:
                while http.get("/health").status_code != 200:
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.1)
            yield Served(address, psutil.Process(process.pid))
            assert process.poll() is None, log.read_text()
        finally:
            process.terminate()
            process.wait(_PATIENCE_S)


class _Neighbour:
    """A client that asks what is in order, all the time, and must always get the same answers."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._ended = threading.Event()
        self.rounds = 0

    def ask(self, http: Any) -> tuple[Any, Any]:
        chat = http.post("/v1/chat/completions", json=_CHAT)
        vectors = http.post("/v1/embeddings", json=_EMBEDDINGS)
        assert (chat.status_code, vectors.status_code) == (200, 200), (chat.text, vectors.text)
        return chat.json()["choices"], vectors.json()["data"]

    def run(self) -> None:
        with httpx2.Client(base_url=self._address, timeout=_PATIENCE_S) as http:
            expected = self.ask(http)
            # However soon the others have ended, once.
            while not self._ended.is_set() or not self.rounds:
                assert self.ask(http) == expected
                self.rounds += 1

    def end(self) -> None:
        self._ended.set()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("malformed") / "log"


@pytest.fixture(scope="module")
def server(folder: Path, log: Path) -> Iterator[Served]:  # noqa: F811
    with _started([folder / "chat", folder / "embedder"], log) as served:
        neighbour = _Neighbour(served.address)
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(neighbour.run)
            try:
                yield served
            finally:
                neighbour.end()
                beside.result(_PATIENCE_S)
        print(f"{sum(served.statuses.values())} answers: {dict(served.statuses)}")
    # What was no fault of a client would be in the log with its traceback.
    assert "Traceback" not in log.read_text()


def _in_parts(served: Served, count: int, send: Any) -> None:
    """Let several clients send their parts, and hold the memory after the first third against the end's."""
    for part, numbers in enumerate((count // 3, count - count // 3)):
        with ThreadPoolExecutor(_SENDERS) as pool:
            for sent in [pool.submit(send, 10 * part + one, numbers // _SENDERS + 1) for one in range(_SENDERS)]:
                sent.result(3600)
        if part == 0:
            before = served.rss_bytes()
    assert served.rss_bytes() < before + _GROWTH_BYTES


def test_requests_of_the_openapi_file(server: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 10
    each = max(3, REQUESTS // 2 // (2 * sum(bool(operation.body) for operation in operations)))
    for operation in operations:
        # What has no body cannot have a wrong one.
        takes = bool(operation.body)
        for mode in list(schemathesis.GenerationMode)[: 1 + takes]:
            _send_all(server, operation, mode, each)


def _send_all(server: Served, operation: Any, mode: Any, count: int) -> None:
    checks = list(hypothesis.HealthCheck)

    @hypothesis.seed(1)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=checks,
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        answer = case.call(timeout=_PATIENCE_S)
        headers = {name: values[0] for name, values in answer.headers.items()}
        server.check(answer.status_code, headers, answer.content, case.body)

    send()


def test_valid_bodies_with_parts_exchanged(server: Served) -> None:
    def send(seed: int, count: int) -> None:
        chance = random.Random(seed)
        with httpx2.Client(base_url=server.address, timeout=_PATIENCE_S) as http:
            for _ in range(count):
                path = chance.choice(list(BODIES))
                body = json.dumps(strange(chance, BODIES[path])).encode()
                if chance.random() < 0.2:
                    body = damaged(chance, body)
                answer = http.post(path, content=body, headers={"content-type": "application/json"})
                server.check(answer.status_code, answer.headers, answer.content, (path, body))

    _in_parts(server, REQUESTS * 2 // 5, send)


def test_damaged_bytes_of_requests(server: Served) -> None:
    host, port = server.address.removeprefix("http://").split(":")

    def send(seed: int, count: int) -> None:
        chance = random.Random(seed)
        for _ in range(count):
            path = chance.choice(list(BODIES))
            body = json.dumps(BODIES[path]).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            data = damaged(chance, f"{head}Content-Length: {len(body)}\r\n\r\n".encode()) + body
            with socket.create_connection((host, int(port)), timeout=_PATIENCE_S) as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                _check_bytes(server, _all_of(connection), data)

    _in_parts(server, REQUESTS // 10, send)


def _all_of(connection: socket.socket) -> bytes:
    pieces = []
    try:
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def _check_bytes(server: Served, came: bytes, sent: bytes) -> None:
    """The first answer; none where the request is not whole."""
    head, _, body = came.partition(b"\r\n\r\n")
    if not body:
        return
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if "content-length" in headers:
        server.check(int(status.split()[1]), headers, body[: int(headers["content-length"])], sent)
