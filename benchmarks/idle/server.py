"""A server in a process of its own, whose memory is looked at from outside."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeload.bench import cgroup
from pipeload.bench.launch import child_environment
from pipeload.errors import RunError

__all__ = ["Server", "served"]

_PATIENCE_S = 600
_LOOK_S = 0.02


class Server:
    """A running server.

    Args:
        process: its process.
        log: the file of its log, whose lines are JSON.
    """

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        assert process.stdout is not None
        self._process, self._log = process, log
        address = process.stdout.readline().strip()
        if not address:
            raise RunError(f"The server has not started: {log.read_text()[-400:]}")
        self._host, _, port = address.removeprefix("http://").partition(":")
        self._port = int(port)
        while self.get("/health")[0] != 200:
            time.sleep(_LOOK_S)

    def get(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """The status and the body of an answer, over a connection of its own."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_PATIENCE_S)
        try:
            head = {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", path, body and json.dumps(body), head)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[float, Any]:
        """Seconds until an answer has come, and the answer.

        Raises:
            RunError: the answer is an error.
        """
        begin_s = time.perf_counter()
        status, data = self.get(path, body)
        seconds = time.perf_counter() - begin_s
        if status != 200:
            raise RunError(f"{path} answers {status}: {data.decode()[:400]}")
        return seconds, json.loads(data)

    def wait_until_idle(self) -> int:
        """Wait until the process was replaced by one without onnxruntime. Returns its memory then."""
        end_s = time.monotonic() + _PATIENCE_S
        maps = Path(f"/proc/{self._process.pid}/maps")
        while "/onnxruntime/" in maps.read_text() or self.get("/health")[0] != 200:
            if time.monotonic() > end_s:
                raise RunError(f"The server is not idle after {_PATIENCE_S} s.")
            time.sleep(_LOOK_S)
        return self.rss_bytes()

    def rss_bytes(self) -> int:
        """The memory of the process."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @contextmanager
    def watched(self, samples: list[tuple[float, int]]) -> Iterator[None]:
        """Memory over time, as seconds since the epoch and bytes."""
        ends = threading.Event()

        def look() -> None:
            while not ends.wait(_LOOK_S):
                samples.append((time.time(), self.rss_bytes()))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            ends.set()
            thread.join()

    def messages(self) -> list[tuple[float, str]]:
        """Lines of the log that are no requests, with seconds since the epoch."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [
            (datetime.fromisoformat(line["time"]).timestamp(), line["message"]) for line in lines if "message" in line
        ]


@contextmanager
def served(directories: Sequence[Path], budget: str, idle: str, folder: Path) -> Iterator[Server]:
    """A server of these models, with a log and a cache of its own in the folder."""
    log = folder / "log"
    command = [sys.executable, "-m", "pipeload", "serve", *map(str, directories), "--budget", budget, "--idle", idle]
    command += ["--port", "0", "--log-format", "json"]
    with cgroup.started(command, log=log, grouped=False, env=child_environment(folder / "cache")) as child:
        yield Server(child.process, log)
