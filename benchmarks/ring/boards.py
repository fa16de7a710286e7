"""A cluster of boards: each a machine of `network`, with a memory cgroup and a throttled disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pipeload
from benchmarks.ring.network import SWITCH, Network, machines, within
from benchmarks.ring.processors import Quota, quota
from pipeload.bench import cgroup
from pipeload.cluster.connection import Connection

__all__ = ["BESIDE_BYTES", "Board", "Boards", "boards"]

BESIDE_BYTES = 6_000_000
"""The kernel charges it to a cgroup beside the memory of its processes."""
_LEFT_BYTES = 8_000_000
"""A limit that falls leaves this above what was in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A node.

    Attributes:
        budget_bytes: that it was given; its cgroup has `BESIDE_BYTES` more.
    """

    budget_bytes: int
    _started: cgroup.Started
    _quota: Quota | None

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

    def limit_cores(self, cores: float) -> None:
        """Change its part of a processor."""
        assert self._quota is not None
        self._quota.limit(cores)

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
    models: Path,
    budgets_bytes: Mapping[str, int],
    *,
    bits_per_s: int,
    latency_s: float,
    read_bytes_per_s: int | None,
    certificates: Path,
    cores: Mapping[str, float] | None = None,
    later: Collection[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Boards]:
    """Start a cluster by the commands that users start it with, over TLS.

    Args:
        models: the directory of sharded model directories, which all nodes have.
        budgets_bytes: of each node.
        bits_per_s: of each link.
        latency_s: see `machines`.
        read_bytes_per_s: the throttle of each node's disk; None for none.
        certificates: made here.
        cores: the part of a processor of each node; None for all of them.
        later: nodes that `Boards.start` starts.
        env: of the nodes; None inherits.

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
        nodes: dict[str, Board] = {}

        def begin(name: str) -> Board:
            budget_bytes = budgets_bytes[name]
            options = {"cluster": address, "name": name, "budget": str(budget_bytes), "models": str(models)}
            words = [word for option, value in options.items() for word in (f"--{option}", value)]
            command, own = within(name, _command("node", *words, *given)), None
            if cores is not None:
                own = stack.enter_context(quota(cores[name]))
                command = own.entering(command)
            started = stack.enter_context(
                cgroup.started(
                    command,
                    memory_bytes=budget_bytes + BESIDE_BYTES,
                    read_bytes_per_s=read_bytes_per_s,
                    disk_of=models,
                    env=env,
                )
            )
            return Board(budget_bytes=budget_bytes, _started=started, _quota=own)

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


def _command(*words: str) -> Sequence[str]:
    return [sys.executable, "-m", "pipeload", *words]


def _line(one: cgroup.Started) -> str:
    """The line by which a process says that it is there."""
    assert one.process.stdout is not None
    line = one.process.stdout.readline().strip()
    if not line:
        raise SystemExit("a process of the cluster could not start")
    return str(line)
