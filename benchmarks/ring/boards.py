"""A cluster of boards: each a machine of `network`, with memory, a disk and processors of its own, by cgroups."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pipeload
from benchmarks.ring.network import SWITCH, Network, machines, within
from pipeload.bench import cgroup
from pipeload.cluster.connection import Connection

__all__ = ["BESIDE_BYTES", "Board", "Boards", "Hardware", "boards", "command", "limited"]

BESIDE_BYTES = 6_000_000
"""The kernel charges it to a cgroup beside the memory of its processes."""
_LEFT_BYTES = 8_000_000
"""A limit that falls leaves this above what was in use."""


_TOLD = """
for file in "$1"/*; do mount --bind "$file" /sys/devices/system/cpu/$(basename "$file")/cpu_capacity || exit 125; done
shift; exec "$@"
"""
"""Puts files over those in which the kernel tells capacities, for a command and its children."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A node, beside its memory.

    Attributes:
        read_bytes_per_s: the throttle of its disk; None for none.
        processors: its quota of processor time; None for none.
        capacities: a folder with a file `cpu1`, and so on, for each core of which the kernel is to tell the node
            another capacity; None leaves them as they are. It changes what is told, not the core.
        cache: its user's cache, with its profiles; None for that of this user.
    """

    read_bytes_per_s: int | None = None
    processors: float | None = None
    capacities: Path | None = None
    cache: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A node.

    Attributes:
        budget_bytes: that it was given; its cgroup has `BESIDE_BYTES` more.
    """

    budget_bytes: int
    _started: cgroup.Started

    @property
    def peak_bytes(self) -> int:
        """The cgroup's highest usage so far, page cache included."""
        peak_bytes = self._started.peak_bytes()
        assert peak_bytes is not None
        return peak_bytes

    @property
    def used_bytes(self) -> int:
        """The cgroup's usage now."""
        return self._started.used_bytes()

    @property
    def oom_kills(self) -> int:
        """Processes that the kernel has killed for memory."""
        return self._started.oom_kills()

    @property
    def read_bytes(self) -> int:
        """Bytes that the node has read from the disk so far."""
        text = Path(f"/proc/{self._started.process.pid}/io").read_text()
        return int(dict(line.split(": ") for line in text.splitlines())["read_bytes"])

    @property
    def limit_bytes(self) -> int:
        """The cgroup's limit."""
        limit_bytes = self._started.limit_bytes()
        assert limit_bytes is not None
        return limit_bytes

    def limit_memory(self, memory_bytes: int) -> None:
        """Lower the cgroup's limit, but to no less than what was in use since the call before, and a little more.

        A machine whose neighbours take more at once kills one of them. Also lets `peak_bytes` count from now on.
        """
        limit_bytes = max(memory_bytes, min(self.limit_bytes, self.peak_bytes + _LEFT_BYTES))
        with suppress(OSError):
            self._started.limit_memory(limit_bytes)
        self._started.forget_peak()

    def limit_processors(self, processors: float) -> None:
        """Change its quota of processor time."""
        self._started.limit_processors(processors)

    def kill(self) -> None:
        """End it at once."""
        self._started.process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class Boards:
    """Nodes, and a connection to them.

    Attributes:
        connection: of a client on a machine of its own.
        nodes: by name; those that have started.
        network: that they are on.
        start: starts one of the others.
    """

    connection: Connection
    nodes: Mapping[str, Board]
    network: Network
    start: Callable[[str], None]


@contextmanager
def boards(
    directories: Sequence[Path],
    budgets_bytes: Mapping[str, int],
    *,
    bits_per_s: int,
    latency_s: float,
    read_bytes_per_s: int | None = None,
    hardware: Mapping[str, Hardware] = MappingProxyType({}),
    later: Collection[str] = (),
) -> Iterator[Boards]:
    """Start a cluster by the commands that users start it with, over TLS.

    Args:
        directories: sharded model directories, which all nodes have.
        budgets_bytes: of each node.
        bits_per_s: of each link.
        latency_s: see `machines`.
        read_bytes_per_s: the throttle of the disk of each node that has no hardware of its own; None for none.
        hardware: of nodes that differ.
        later: nodes that `Boards.start` starts.

    Raises:
        OSError, CalledProcessError: this user may not make cgroups or network namespaces.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pipeload-ring-")))
        models, certificates = folder / "models", folder / "certificates"
        models.mkdir()
        for directory in directories:
            (models / directory.name).symlink_to(directory.resolve())
        network = stack.enter_context(machines([*budgets_bytes], bits_per_s, latency_s))
        init = stack.enter_context(cgroup.started(command("cluster", "init", str(certificates)), grouped=False))
        init.process.communicate()
        given = ["--certificates", str(certificates)]
        words = ["cluster", "start", "--host", SWITCH, "--port", "0", *given]
        address = _line(stack.enter_context(cgroup.started(command(*words), grouped=False)))
        nodes: dict[str, Board] = {}

        def begin(name: str) -> Board:
            budget_bytes = budgets_bytes[name]
            options = {"cluster": address, "name": name, "budget": str(budget_bytes), "models": str(models)}
            words = [word for option, value in options.items() for word in (f"--{option}", value)]
            own = hardware.get(name, Hardware(read_bytes_per_s=read_bytes_per_s))
            node = within(name, command("node", *words, *given))
            started = stack.enter_context(limited(node, own, budget_bytes, directories[0]))
            return Board(budget_bytes=budget_bytes, _started=started)

        def start(name: str) -> None:
            node = begin(name)
            _line(node._started)
            nodes[name] = node

        begun = {name: begin(name) for name in budgets_bytes if name not in later}
        for node in begun.values():
            _line(node._started)
        nodes |= begun
        connection = stack.enter_context(pipeload.connect(address, certificates))
        yield Boards(connection=connection, nodes=nodes, network=network, start=start)


def limited(
    words: Sequence[str], hardware: Hardware, budget_bytes: int, models: Path
) -> AbstractContextManager[cgroup.Started]:
    """Start a command with the memory and the hardware of a node.

    Args:
        words: the command.
        hardware: the node's.
        budget_bytes: its budget; the cgroup has `BESIDE_BYTES` more.
        models: a path on its disk.
    """
    if hardware.capacities is not None:
        words = ["unshare", "--mount", "/bin/sh", "-c", _TOLD, "told", str(hardware.capacities), *words]
    return cgroup.started(
        words,
        memory_bytes=budget_bytes + BESIDE_BYTES,
        read_bytes_per_s=hardware.read_bytes_per_s,
        disk_of=models,
        processors=hardware.processors,
        env=None if hardware.cache is None else os.environ | {"PIPELOAD_CACHE": str(hardware.cache)},
    )


def command(*words: str) -> Sequence[str]:
    """A command of pipeload."""
    return [sys.executable, "-m", "pipeload", *words]


def _line(one: cgroup.Started) -> str:
    """The line by which a process says that it is there."""
    assert one.process.stdout is not None
    line = one.process.stdout.readline().strip()
    if not line:
        raise SystemExit("a process of the cluster could not start")
    return str(line)
