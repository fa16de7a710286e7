"""Machines on one switch: network namespaces of this machine, each with a link of its own, whose rate is bounded."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

__all__ = ["SWITCH", "machines", "within"]

SWITCH = "10.231.77.1"
"""The address of this machine itself, where scheduler and client are; its own link has no bound."""
_BRIDGE = "plring"


@contextmanager
def machines(names: Sequence[str], bits_per_s: int) -> Iterator[Mapping[str, str]]:
    """Make machines with the addresses that it gives; they are removed at the end.

    Args:
        names: of at most 200 machines.
        bits_per_s: of each link, in both directions.

    Raises:
        CalledProcessError: this user may not make network namespaces, or the machine has no `ip` and `tc`.
    """
    with ExitStack() as stack:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        stack.callback(_ip, "link", "del", _BRIDGE)
        _ip("addr", "add", f"{SWITCH}/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        addresses = {}
        for number, name in enumerate(names):
            space, outer, inner = f"{_BRIDGE}-{name}", f"{_BRIDGE}{number}", f"{_BRIDGE}{number}i"
            addresses[name] = f"{SWITCH.rpartition('.')[0]}.{number + 11}"
            _ip("netns", "add", space)
            stack.callback(_ip, "netns", "del", space)
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            # Connections of a killed process keep its namespace for a while, and so both ends of the link.
            stack.callback(_ip, "link", "del", outer)
            _ip("link", "set", inner, "netns", space)
            _ip("link", "set", outer, "master", _BRIDGE, "up")
            _ip("-n", space, "addr", "add", f"{addresses[name]}/24", "dev", inner)
            _ip("-n", space, "link", "set", inner, "up")
            _ip("-n", space, "link", "set", "lo", "up")
            # A bucket of 2 ms: large enough for the kernel's timer at a gigabit.
            shape = ["root", "tbf", "rate", f"{bits_per_s}bit", "burst", str(bits_per_s // 4000), "latency", "100ms"]
            subprocess.run(["tc", "qdisc", "add", "dev", outer, *shape], check=True)
            subprocess.run(["tc", "-n", space, "qdisc", "add", "dev", inner, *shape], check=True)
        yield addresses


def within(name: str, command: Sequence[str]) -> list[str]:
    """A command as it runs on a machine, whose files and memory are those of this one."""
    return ["nsenter", f"--net=/run/netns/{_BRIDGE}-{name}", *command]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
