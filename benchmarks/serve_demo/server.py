"""`pipeload serve` in a memory cgroup, where this user may make one."""

from __future__ import annotations

import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeload.bench import cgroup

__all__ = ["Running", "ServerEndedError", "serving"]

_LOOK_S = 0.5
_PEAK_RSS = re.compile(r"^pipeload_peak_rss_bytes (\S+)$", re.MULTILINE)


class ServerEndedError(Exception):
    """The server ended before it was told to; its own message is on stderr."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server.

    Attributes:
        address: where it listens.
        child: its process, in a memory cgroup where this user may make one.
    """

    address: str
    child: cgroup.Started

    def peak_bytes(self) -> int:
        """What the cgroup was charged at most, or the RSS where that is more: it counts libraries in any case."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=60) as response:
            found = _PEAK_RSS.search(response.read().decode())
        assert found
        return max(int(float(found[1])), self.child.peak_bytes() or 0)

    def wait(self) -> None:
        """Return when all models have been opened.

        Raises:
            ServerEndedError: one of them cannot be.
        """
        while True:
            if self.child.process.poll() is not None:
                raise ServerEndedError
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=60):
                    return
            except urllib.error.HTTPError:
                time.sleep(_LOOK_S)


@contextmanager
def serving(directories: Sequence[Path], *, cap_bytes: int, budget_bytes: int, port: int) -> Iterator[Running]:
    """A server that listens, until the end of the block.

    Args:
        directories: its models.
        cap_bytes: the limit of its cgroup, where this user may make one.
        budget_bytes: its budget, below the limit.
        port: of TCP; 0 takes a free one.

    Raises:
        ServerEndedError: it could not start.
    """
    command = [sys.executable, "-m", "pipeload", "serve", *map(str, directories)]
    command += ["--budget", str(budget_bytes), "--port", str(port)]
    with cgroup.started(command, memory_bytes=cap_bytes, grouped=cgroup.permitted() is None) as child:
        assert child.process.stdout
        address = child.process.stdout.readline().strip()
        if not address:
            raise ServerEndedError
        yield Running(address=address, child=child)
