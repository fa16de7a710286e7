"""A cluster of boards: each a machine of `network`, with a memory cgroup and a throttled disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pipeload
from benchmarks.ring.network import SWITCH, Network, machines, within
from pipeload.bench import cgroup
from pipeload.cluster.connection import Connection

__all__ = ["BESIDE_BYTES", "Board", "Boards", "boards"]

BESIDE_BYTES = 6_000_000
"""The kernel charges it to a cgroup beside the memory of its processes."""


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
    def read_bytes(self) -> int:
        """Bytes that the node has read from the disk so far."""
        text = Path(f"/proc/{self._started.process.pid}/io").read_text()
        return int(dict(line.split(": ") for line in text.splitlines())["read_bytes"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Boards:
    """Nodes, and a connection to them.

    Attributes:
        connection: of a client on a machine of its own.
        nodes: by name.
        network: that they are on.
    """

    connection: Connection
    nodes: Mapping[str, Board]
    network: Network


@contextmanager
def boards(
    models: Path,
    budgets_bytes: Mapping[str, int],
    *,
    bits_per_s: int,
    latency_s: float,
    read_bytes_per_s: int | None,
    certificates: Path,
) -> Iterator[Boards]:
    """Start a cluster by the commands that users start it with, over TLS.

    Args:
        models: the directory of sharded model directories, which all nodes have.
        budgets_bytes: of each node.
        bits_per_s: of each link.
        latency_s: see `machines`.
        read_bytes_per_s: the throttle of each node's disk; None for none.
        certificates: made here.

    Raises:
        OSError, CalledProcessError: this user may not make cgroups or network namespaces.
    """
    with ExitStack() as stack:
        network = stack.enter_context(machines([*budgets_bytes], bits_per_s, latency_s))
        init = stack.enter_context(cgroup.started(_command("cluster", "init", str(certificates)), grouped=False))
        init.process.communicate()
        given = ["--certificates", str(certificates)]
        words = ["cluster", "start", "--host", SWITCH, "--port", "0", *given]
        address = _line(stack.enter_context(cgroup.started(_command(*words), grouped=False)))
        started = {}
        for name, budget_bytes in budgets_bytes.items():
            options = {"cluster": address, "name": name, "budget": str(budget_bytes), "models": str(models)}
            words = [word for option, value in options.items() for word in (f"--{option}", value)]
            started[name] = stack.enter_context(
                cgroup.started(
                    within(name, _command("node", *words, *given)),
                    memory_bytes=budget_bytes + BESIDE_BYTES,
                    read_bytes_per_s=read_bytes_per_s,
                    disk_of=models,
                )
            )
        for one in started.values():
            _line(one)
        connection = stack.enter_context(pipeload.connect(address, certificates))
        yield Boards(
            connection=connection,
            network=network,
            nodes={name: Board(budget_bytes=budgets_bytes[name], _started=one) for name, one in started.items()},
        )


def _command(*words: str) -> Sequence[str]:
    return [sys.executable, "-m", "pipeload", *words]


def _line(one: cgroup.Started) -> str:
    """The line by which a process says that it is there."""
    assert one.process.stdout is not None
    line = one.process.stdout.readline().strip()
    if not line:
        raise SystemExit("a process of the cluster could not start")
    return str(line)
