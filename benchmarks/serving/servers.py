"""The servers, each in a process and a cgroup of its own, with cold files."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
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
from pipeload.bench.spec import Unsplit
from pipeload.errors import RunError
from pipeload_export.source.catalog import PackageRecipe, fetch_package, recipe

__all__ = ["CHAT", "CONTENDERS", "EMBEDDER", "Limits", "Models", "Server", "Weights", "run_server"]

CHAT, EMBEDDER = "smollm2-135m", "minilm"
"""As requests call them."""
CONTENDERS = {
    "chat": ("pipeload", "llama.cpp"),
    "chat-fp32": ("pipeload", "llama.cpp"),
    "embeddings": ("pipeload", "fastembed"),
    "embeddings-large": ("pipeload", "fastembed"),
    "mixed": ("pipeload",),
}
"""Part -> servers."""
_LARGE = "bert-large"
_MODELS = {
    "chat": ("chat",),
    "chat-fp32": ("chat-fp32",),
    "embeddings": ("embeddings",),
    "embeddings-large": ("embeddings-large",),
    "mixed": ("chat", "embeddings"),
}
"""Part -> its models, by the part that has each alone."""
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
class Weights:
    """One model.

    Attributes:
        name: as requests call it.
        shards: sharded directory.
        other: the same weights for the other server: a GGUF file, or the folder of an ONNX graph.
    """

    name: str
    shards: Path
    other: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The same models as each server has them.

    Attributes:
        weights: by the part that has the model alone.
        environments: folder of the other servers' virtual environments.
        cache: pipeload's cache, with a profile of each model under the throttle.
    """

    weights: dict[str, Weights]
    environments: Path
    cache: Path

    @classmethod
    def prepared(
        cls, parts: set[str], environments: Path, cache: Path, disk_bytes_per_s: int | None, console: Console
    ) -> Models:
        """Export what is missing of the parts, and profile.

        Raises:
            RunError: another server is not installed.
        """
        for engine in ("llama", "fastembed"):
            if not python_of(engine, environments).exists():
                raise RunError(f"{python_of(engine, environments)} does not exist. The README says how to make it.")
        make = {
            "chat": lambda: Weights(name=CHAT, shards=exported(CHAT, console)[0], other=_gguf()),
            "chat-fp32": lambda: Weights(
                name=CHAT, shards=exported(CHAT, console, "fp32")[0], other=_widened(_gguf(), environments)
            ),
            "embeddings": lambda: _embedder(*exported(EMBEDDER, console)),
            "embeddings-large": lambda: _embedder(
                *_with_texts(*exported(_LARGE, console), exported(EMBEDDER, console)[0])
            ),
        }
        weights = {model: make[model]() for part in sorted(parts) for model in _MODELS[part]}
        for one in weights.values():
            profile(one.shards, disk_bytes_per_s, cache)
        return cls(weights=weights, environments=environments, cache=cache)

    def of(self, part: str) -> list[Weights]:
        """The models of a part."""
        return [self.weights[model] for model in _MODELS[part]]

    def files(self, name: str, part: str) -> list[Path]:
        """The weights of a server."""
        return [file for one in self.of(part) for file in files_of(one.shards if name == "pipeload" else one.other)]

    def command(self, name: str, part: str, port: int, cap_bytes: int | None) -> list[str]:
        """The command line of a server; the cap is pipeload's budget."""
        if name == "llama.cpp":
            options = {
                "model": self.of(part)[0].other,
                "model_alias": CHAT,
                "n_ctx": _CONTEXT,
                "n_threads": THREADS,
                "n_threads_batch": THREADS,
                # Or it keeps logits of 512 tokens, 100 MB; a prompt has fewer than 64.
                "n_batch": 64,
                # Or all weights count as locked, and the kernel ends it below them.
                "use_mlock": False,
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
            return [
                str(python_of("fastembed", self.environments)),
                "-m",
                program,
                str(self.of(part)[0].other),
                str(port),
            ]
        directories = [str(one.shards) for one in self.of(part)]
        aliases = [
            word
            for one in self.of(part)
            if one.name != one.shards.name
            for word in ("--alias", f"{one.name}={one.shards}")
        ]
        budget = "auto" if cap_bytes is None else str(cap_bytes)
        options = ["--port", str(port), "--max-waiting", str(_PLACES), "--budget", budget]
        return [sys.executable, "-m", "pipeload", "serve", *directories, *aliases, *options]


def _gguf() -> Path:
    found = recipe(CHAT)
    assert isinstance(found, PackageRecipe)
    return fetch_package(found.package) / found.model


def _widened(gguf: Path, environments: Path) -> Path:
    """The same weights in float32, written by llama.cpp."""
    path = ROOT / "models" / "exported" / f"{CHAT}.F32.gguf"
    if not path.exists():
        made = path.with_suffix(".partial")
        program = ROOT / "benchmarks" / "serving" / "programs" / "widen_gguf.py"
        subprocess.run([python_of("llama", environments), program, gguf, made], check=True, capture_output=True)
        made.replace(path)
    return path


def _embedder(shards: Path, unsplit: Unsplit) -> Weights:
    return Weights(name=EMBEDDER, shards=shards, other=unsplit.folder)


def _with_texts(shards: Path, unsplit: Unsplit, texts: Path) -> tuple[Path, Unsplit]:
    """A model without a tokenizer, with the one of another directory: hard links of its files. Pooling: mean."""
    targets = []
    for source in (shards, unsplit.folder):
        target = source.with_name(f"{source.name}-texts")
        if not target.exists():
            made = target.with_name(f"{target.name}.partial")
            shutil.rmtree(made, ignore_errors=True)
            shutil.copytree(source, made, copy_function=os.link)
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "modules.json"):
                shutil.copy(texts / name, made / name)
            (made / "1_Pooling").mkdir()
            (made / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
            made.rename(target)
        targets.append(target)
    return targets[0], Unsplit(graph=targets[1] / unsplit.graph.name, folder=targets[1])


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
            failure = _awaited(child, _probe(name, address), log)
            yield Server(name=name, address=address, child=child, log=log, failure=failure)


def _probe(name: str, address: str) -> str:
    """A route that answers once the models are open."""
    return f"{address}/health" if name == "pipeload" else f"{address}/docs" if name == "llama.cpp" else address


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
