"""Seconds a token of one text on several nodes, beside llama.cpp and its rpc-servers on the same nodes.

llama.cpp is used in three ways, since its servers hold their weights in memory and read nothing again:

```
            node 1                                   the others
servers     the client, and a server                 a server; together they have all blocks, divided by llama.cpp
mapped      the client, which maps the other blocks  a server with as many of the last blocks as its memory holds
both        the same, and a server                   a server with as many of the last blocks as its memory holds
```
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from rich.console import Console

import pipeload
from benchmarks.generation import weights
from benchmarks.generation.limited import python_of
from benchmarks.models import ROOT
from benchmarks.ring import tokens
from benchmarks.ring.boards import BESIDE_BYTES, boards
from benchmarks.ring.network import machines, within
from benchmarks.study import markdown_table
from pipeload.bench import cgroup
from pipeload.bench.launch import child_environment
from pipeload.bench.machine import machine_facts
from pipeload.bench.table import seconds
from pipeload.errors import RunError
from pipeload.machine.sizes import format_bytes

__all__ = ["Layers", "Llama", "Record", "Report", "compare", "rows", "shares"]

THREADS = 2
PORT = 50052
START_S, END_S = 30, 1800
SERVER_BYTES = 75_000_000
"""What a server takes beside the weights: its process, its buffers, and a tensor on its way."""
CACHE_POSITIONS = 256
"""The least that llama.cpp makes a cache for."""
CLIENT_BYTES = 400_000_000
"""What is left to a client beside a server: Python, and pages of the file on their way through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """An installed llama.cpp.

    Attributes:
        binaries: the folder with `ggml-rpc-server` and the libraries.
        python: of an environment with the llama-cpp-python of the same version.
    """

    binaries: Path
    python: Path

    @classmethod
    def found(cls, binaries: Path, environments: Path) -> Llama:
        """That of these folders.

        Raises:
            RunError: it is not there.
        """
        own = cls(binaries=binaries.absolute(), python=python_of("llama", environments))
        for path in (own.server, own.python):
            if not path.exists():
                raise RunError(f"{path} does not exist. The README of benchmarks/ring says how to make it.")
        return own

    @property
    def server(self) -> Path:
        """Its program for a node."""
        return self.binaries / "ggml-rpc-server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """What llama.cpp can put on a server.

    Attributes:
        blocks: their number.
        block_bytes: of one block, with its KV caches.
        head_bytes: of the head, which counts as the last layer.
    """

    blocks: int
    block_bytes: int
    head_bytes: int

    @classmethod
    def of(cls, path: Path) -> Layers:
        """Those of a GGUF file, whose table of the vocabulary is the head, too."""
        reader = gguf.GGUFReader(path)
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
        blocks = {name.split(".")[1] for name in sizes if name.startswith("blk.")}
        width = int(reader.fields["gpt2.embedding_length"].contents())
        return cls(
            blocks=len(blocks),
            block_bytes=sum(nbytes for name, nbytes in sizes.items() if name.startswith("blk.0."))
            + CACHE_POSITIONS * 2 * 4 * width,
            head_bytes=sizes["token_embd.weight"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One engine on a number of nodes.

    Attributes:
        engine: "pipeload" or "llama.cpp".
        way: how llama.cpp is used; see the module.
        nodes: their number.
        served: layers of each of its servers; empty where llama.cpp has chosen them.
        token_s: seconds a token that counts; None without an answer.
        first_s: from opening the model to the first token; None where it was not taken.
        read_bytes: bytes that all nodes read for a token.
        peak_bytes: the highest usage of each node's cgroup.
        killed: nodes where the kernel ended a process for memory.
        message: why there is no answer.
        right: the tokens are those of one machine that has all memory; None without an answer.
    """

    engine: str
    way: str
    nodes: int
    served: tuple[int, ...] = ()
    token_s: float | None = None
    first_s: float | None = None
    read_bytes: int | None = None
    peak_bytes: dict[str, int]
    killed: tuple[str, ...] = ()
    message: str | None = None
    right: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of them.

    Attributes:
        model: its name.
        budget_bytes: of each node.
        bits_per_s: of each link.
        latency_s: from one machine to another.
        read_bytes_per_s: of each disk.
        llama: version of llama-cpp-python.
        machine: see `machine_facts`.
        records: of the runs, in their order.
    """

    model: str
    budget_bytes: int
    bits_per_s: int
    read_bytes_per_s: int
    llama: str
    latency_s: float = 0.0
    machine: dict[str, Any] = field(default_factory=machine_facts)
    records: list[Record] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no answer is wrong, and pipeload has answered each time within its budget."""
        most_bytes = self.budget_bytes + BESIDE_BYTES
        ours = [one for one in self.records if one.engine == "pipeload"]
        return all(one.right is not False for one in self.records) and all(
            one.right and max(one.peak_bytes.values()) <= most_bytes for one in ours
        )


def compare(
    directory: Path,
    counts: Sequence[int],
    *,
    llama: Llama,
    budget_bytes: int,
    bits_per_s: int,
    latency_s: float,
    read_bytes_per_s: int,
    console: Console,
) -> Report:
    """Run a model on these numbers of nodes, by pipeload and by llama.cpp in turns.

    Args:
        directory: the sharded directory of a seeded GPT-2.
        counts: numbers of nodes.
        llama: the other engine.
        budget_bytes: of each node.
        bits_per_s: of each link.
        latency_s: from one machine to another.
        read_bytes_per_s: of each disk.
        console: is told of each run.
    """
    path = weights.gguf_file(console, directory.name)
    layers = Layers.of(path)
    version = [str(llama.python), "-c", "from importlib.metadata import version; print(version('llama-cpp-python'))"]
    report = Report(
        model=directory.name,
        budget_bytes=budget_bytes,
        bits_per_s=bits_per_s,
        latency_s=latency_s,
        read_bytes_per_s=read_bytes_per_s,
        llama=subprocess.run(version, check=True, capture_output=True, text=True).stdout.strip(),
    )
    with pipeload.load(directory) as model:
        prompt, count = [*tokens.PROMPT], tokens.SETTLING + tokens.TOKENS
        expected = model.generate(prompt, max_new_tokens=count, eos_token_id=[]).token_ids

    def keep(record: Record) -> None:
        report.records.append(record)
        console.print(record, markup=False, highlight=False, soft_wrap=True)

    for count in counts:
        cgroup.evict((directory / "shards").iterdir())
        keep(_pipeload(report, directory, count, expected))
        keep(_llama(report, llama, path, count, expected, "servers", None))
        keep(_llama(report, llama, path, count, expected, "mapped", shares(layers, count - 1, budget_bytes)))
        served = shares(layers, count, budget_bytes, first_bytes=budget_bytes - CLIENT_BYTES)
        keep(_llama(report, llama, path, count, expected, "both", served))
    return report


def shares(layers: Layers, servers: int, budget_bytes: int, *, first_bytes: int | None = None) -> tuple[int, ...]:
    """Layers of each server, as many as their memory holds: the last one has the head.

    Args:
        layers: of the model.
        servers: their number.
        budget_bytes: of each server's node.
        first_bytes: memory of the first server, where that is less.
    """
    found: list[int] = []
    left = layers.blocks
    for number in reversed(range(servers)):
        room = (budget_bytes if number or first_bytes is None else first_bytes) - SERVER_BYTES
        head = 0 if found else layers.head_bytes
        blocks = min(left, max(0, room - head) // layers.block_bytes)
        left -= blocks
        found.append(blocks + bool(head))
    return tuple(reversed(found))


def _pipeload(report: Report, directory: Path, count: int, expected: Sequence[int]) -> Record:
    with tempfile.TemporaryDirectory(prefix="pipeload-ring-") as folder:
        models = Path(folder) / "models"
        models.mkdir()
        (models / directory.name).symlink_to(directory.resolve())
        with boards(
            models,
            dict.fromkeys(_names(count), report.budget_bytes),
            bits_per_s=report.bits_per_s,
            latency_s=report.latency_s,
            read_bytes_per_s=report.read_bytes_per_s,
            certificates=Path(folder) / "certificates",
        ) as running:
            made = tokens.generate(running, directory, expected, texts=1)
    return Record(
        engine="pipeload",
        way="cluster",
        nodes=count,
        token_s=made.token_s,
        read_bytes=sum(made.read_bytes.values()),
        peak_bytes=made.peak_bytes,
        right=made.right,
    )


def _llama(
    report: Report,
    llama: Llama,
    path: Path,
    count: int,
    expected: Sequence[int],
    way: str,
    served: tuple[int, ...] | None,
) -> Record:
    names = _names(count)
    hosts = names[1:] if way == "mapped" else names
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pipeload-ring-")))
        addresses = stack.enter_context(machines(names, report.bits_per_s, report.latency_s)).addresses
        cgroup.evict([path])
        limits: dict[str, Any] = {
            "memory_bytes": report.budget_bytes + BESIDE_BYTES,
            "read_bytes_per_s": report.read_bytes_per_s,
            "disk_of": path,
        }
        nodes = {}
        for name in hosts:
            words = ["-H", addresses[name], "-p", str(PORT), "-t", str(THREADS)]
            command = within(name, [str(llama.server), *words])
            nodes[name] = stack.enter_context(cgroup.started(command, log=folder / name, **limits))
            _await(addresses[name], nodes[name])
        order = {
            "model": str(path),
            "prompt": tokens.PROMPT,
            "tokens": len(expected),
            "threads": THREADS,
            "servers": [f"{addresses[name]}:{PORT}" for name in hosts],
            "served": served or (),
        }
        client = stack.enter_context(_client(llama, names[0], order, folder / "client", nodes, limits))
        try:
            stdout, _ = client.process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            stdout = ""
        answer = json.loads(stdout.splitlines()[-1]) if stdout and client.process.returncode == 0 else None
        killed = tuple(name for name, one in nodes.items() if one.oom_kills())
        counted = answer["seconds"][tokens.SETTLING :] if answer else []
        return Record(
            engine="llama.cpp",
            way=way,
            nodes=count,
            served=served or (),
            token_s=sum(counted) / len(counted) if answer else None,
            first_s=answer["seconds"][0] if answer else None,
            read_bytes=sum(answer["read_bytes"][tokens.SETTLING :]) // len(counted) if answer else None,
            peak_bytes={name: one.peak_bytes() or 0 for name, one in nodes.items()},
            killed=killed,
            message=None if answer else _last_error(folder / "client", client.process.returncode),
            right=answer["token_ids"] == [*expected] if answer else None,
        )


@contextmanager
def _client(
    llama: Llama,
    name: str,
    order: Mapping[str, Any],
    log: Path,
    nodes: dict[str, cgroup.Started],
    limits: Mapping[str, Any],
) -> Iterator[cgroup.Started]:
    """A client on a node, in the cgroup of its server or, without one, in one of its own, which becomes the node's."""
    environment = child_environment(None) | {"LLAMA_CPP_LIB_PATH": str(llama.binaries)}
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(ROOT)])
    command = [str(llama.python), "-m", "benchmarks.generation.programs.llama_tokens", json.dumps(order)]
    server = nodes.get(name)
    with cgroup.started(
        within(name, command), log=log, env=environment, **({"beside": server} if server else limits)
    ) as client:
        nodes.setdefault(name, client)
        yield client


def _await(address: str, server: cgroup.Started) -> None:
    """Return when a server takes connections."""
    end_s = time.monotonic() + START_S
    while server.process.poll() is None and time.monotonic() < end_s:
        try:
            socket.create_connection((address, PORT), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RunError(f"The rpc-server on {address} did not start.")


def _last_error(log: Path, returncode: int | None) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if any(word in line.lower() for word in ("error", "fail", "crash", "abort"))]
    return (said or [f"It ended with exit code {returncode}."])[-1]


def _names(count: int) -> list[str]:
    return [f"board-{number + 1}" for number in range(count)]


def rows(report: Report) -> str:
    """The table."""
    return markdown_table(
        ("nodes", "engine", "layers on servers", "s/token", "read for a token", "most memory of a node", "tokens"),
        [
            (
                str(one.nodes),
                one.engine if one.engine == "pipeload" else f"{one.engine}, {one.way}",
                _layers(one),
                _figure(one),
                format_bytes(one.read_bytes) if one.right and one.read_bytes is not None else "-",
                format_bytes(max(one.peak_bytes.values())),
                {True: "right", False: "WRONG", None: "-"}[one.right],
            )
            for one in report.records
        ],
    )


def _layers(record: Record) -> str:
    if record.engine == "pipeload":
        return "-"
    return "all" if record.way == "servers" else " + ".join(map(str, record.served)) or "none"


def _figure(record: Record) -> str:
    """Seconds a token; a wrong answer has none."""
    if record.right:
        return seconds(record.token_s)
    if record.right is False:
        return "wrong"
    return f"killed on {', '.join(record.killed)}" if record.killed else f"failed: {record.message}"
