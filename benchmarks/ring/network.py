"""Machines on one switch: network namespaces of this machine, each with a link that has a rate and a latency."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

__all__ = ["SWITCH", "Network", "machines", "within"]

SWITCH = "10.231.77.1"
"""The address of this machine itself, where scheduler and client are; its own link has the latency, and no bound."""
_NAME = "plring"
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TAP, _NO_PI, _VNET_HDR = 0x0002, 0x1000, 0x4000
_CSUM_AND_TSO = 0x0F


class Network:
    """Machines and their links.

    Attributes:
        addresses: of the machines, by name.
    """

    def __init__(
        self, addresses: Mapping[str, str], wire: subprocess.Popen[str], bits_per_s: int, latency_s: float
    ) -> None:
        self.addresses = addresses
        self._wire, self._bits_per_s, self._latency_s = wire, bits_per_s, latency_s

    @property
    def processor_s(self) -> float:
        """The processor's time that the links have taken so far."""
        words = Path(f"/proc/{self._wire.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def limit(self, name: str, bits_per_s: int | None = None) -> None:
        """Change the rate of a machine's link.

        Args:
            name: the machine.
            bits_per_s: in each direction; None is that of the others.
        """
        port = [*self.addresses].index(name) + 1
        change = {"port": port, "bits_per_s": bits_per_s or self._bits_per_s, "latency_s": self._latency_s}
        assert self._wire.stdin is not None
        self._wire.stdin.write(json.dumps(change) + "\n")
        self._wire.stdin.flush()


@contextmanager
def machines(names: Sequence[str], bits_per_s: int, latency_s: float) -> Iterator[Network]:
    """Make machines; they are removed at the end.

    Args:
        names: of at most 200 machines.
        bits_per_s: of each link, in both directions.
        latency_s: from any of these, and from this machine, to any other.

    Raises:
        CalledProcessError, OSError: this user may not make network namespaces, or the machine has no `ip`, or no
            /dev/net/tun.
    """
    with ExitStack() as stack:
        ports = [stack.enter_context(_tap(_NAME))]
        _ip("addr", "add", f"{SWITCH}/24", "dev", _NAME)
        _ip("link", "set", _NAME, "up")
        addresses = {}
        for number, name in enumerate(names):
            space, tap = f"{_NAME}-{name}", f"{_NAME}{number}"
            addresses[name] = f"{SWITCH.rpartition('.')[0]}.{number + 11}"
            _ip("netns", "add", space)
            stack.callback(_ip, "netns", "del", space)
            ports.append(stack.enter_context(_tap(tap)))
            _ip("link", "set", tap, "netns", space)
            _ip("-n", space, "addr", "add", f"{addresses[name]}/24", "dev", tap)
            _ip("-n", space, "link", "set", tap, "up")
            _ip("-n", space, "link", "set", "lo", "up")
        links = [
            {"port": port, "bits_per_s": bits_per_s if port != ports[0] else None, "latency_s": latency_s}
            for port in ports
        ]
        wire = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.ring.wire", json.dumps(links)],
                pass_fds=ports,
                stdin=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(wire.communicate)
        yield Network(addresses, wire, bits_per_s, latency_s)


def within(name: str, command: Sequence[str]) -> list[str]:
    """A command as it runs on a machine, whose files and memory are those of this one."""
    return ["nsenter", f"--net=/run/netns/{_NAME}-{name}", *command]


@contextmanager
def _tap(name: str) -> Iterator[int]:
    """A TAP device, which is there until its descriptor is closed."""
    port = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(port, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP | _NO_PI | _VNET_HDR))
        fcntl.ioctl(port, _TUNSETOFFLOAD, _CSUM_AND_TSO)
        yield port
    finally:
        os.close(port)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
