"""Limits that cgroups (v1 and v2) put on this process: memory, processors, threads, and rules that throttle reading.

A process belongs to one cgroup of each hierarchy, and is bound by the limits of all cgroups above it too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from pipeload.machine.files import read_file

__all__ = ["cpu_quota", "memory_limits", "read_limits", "spare_threads"]

_MEMBERSHIP, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_THROTTLES = ("blkio.throttle.read_bps_device", "blkio.throttle.read_iops_device")
_MOST_BYTES = 1 << 20


def read_limits(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> str:
    """Rules by which cgroups (v1 blkio, v2 `io.max`) throttle this process's reads; empty when there are none.

    All devices' rules: a partition is throttled by its disk's, under another number than its own.
    """
    rules: set[str] = set()
    for unified, place in _cgroups("blkio", membership, root):
        for name in ("io.max",) if unified else _THROTTLES:
            rules.update(f"{name} {line.strip()}" for line in _value(place, name).splitlines() if line.strip())
    return "; ".join(sorted(rules))


def memory_limits(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> Iterator[tuple[int, int]]:
    """(limit, memory in use without page cache that can be dropped) of this process's cgroup and its parents.

    `memory.high` of v2 is a limit, too: the kernel slows a process down that is above it, until nothing goes on.
    """
    for unified, place in _cgroups("memory", membership, root):
        # Without a limit v1 reports a number near 2**63, v2 the word "max".
        limits = [
            int(limit)
            for name in (("memory.max", "memory.high") if unified else ("memory.limit_in_bytes",))
            if (limit := _value(place, name)).isdecimal() and int(limit) < 2**60
        ]
        usage = _value(place, "memory.current" if unified else "memory.usage_in_bytes")
        stat = dict(line.split(maxsplit=1) for line in _value(place, "memory.stat").splitlines() if " " in line)
        if stat and limits and usage.isdecimal():
            yield min(limits), max(0, int(usage) - _cached_bytes(stat, "" if unified else "total_"))


def _cached_bytes(stat: Mapping[str, str], prefix: str) -> int:
    """Page cache that the kernel drops before it kills: of files that no process has mapped, and all of what is old."""

    def number(name: str) -> int:
        found = stat.get(name, "")
        return int(found) if found.isdecimal() else 0

    inactive, active = number(f"{prefix}inactive_file"), number(f"{prefix}active_file")
    mapped = number(f"{prefix}mapped_file") if prefix else number("file_mapped")
    return max(inactive, inactive + active - mapped)


def spare_threads(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> float:
    """Threads that this process may start before `pids.max` of its cgroup or a parent forbids it; else infinite."""
    least = math.inf
    for _, place in _cgroups("pids", membership, root):
        most, current = (_value(place, f"pids.{name}") for name in ("max", "current"))
        # Without a limit it is the word "max".
        if most.isdecimal() and current.isdecimal():
            least = min(least, max(0, int(most) - int(current)))
    return least


def cpu_quota(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> float:
    """Processors that the least quota of this process's cgroup and its parents allows; infinite without one."""
    least = math.inf
    for unified, place in _cgroups("cpu", membership, root):
        if unified:
            quota, _, period = _value(place, "cpu.max").partition(" ")
        else:
            quota, period = (_value(place, f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        # Without a quota v1 reports -1, v2 the word "max".
        if quota.isdecimal() and period.isdecimal() and int(period):
            least = min(least, int(quota) / int(period))
    return least


def _cgroups(controller: str, membership: Path, root: Path) -> Iterable[tuple[bool, Path]]:
    """(whether it is of v2, folder) of each cgroup that limits this process by a controller, from its own upwards."""
    return _places(controller, _read(membership), root)


@lru_cache(maxsize=8)  # new paths would intern their parts anew, as in ModelFiles
def _places(controller: str, memberships: str, root: Path) -> tuple[tuple[bool, Path], ...]:
    found = []
    for line in memberships.splitlines():
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = root
        elif controller in controllers.split(","):
            # Where several controllers share a hierarchy, each has a link to it: cpu -> cpu,cpuacct.
            mount = root / controller
        else:
            continue
        # Inside a container the path in /proc may not exist below the mount: the mount itself is then the cgroup.
        folder = mount / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place != mount and mount not in place.parents:
                break
            found.append((controllers == "", place))
    return tuple(found)


@lru_cache(maxsize=64)
def _file(folder: Path, name: str) -> Path:
    return folder / name


def _value(folder: Path, name: str) -> str:
    """The content of a cgroup's file; empty where it cannot be read."""
    return _read(_file(folder, name)).strip()


def _read(path: Path) -> str:
    try:
        return read_file(path, most_bytes=_MOST_BYTES).decode(errors="replace")
    except OSError:
        return ""
