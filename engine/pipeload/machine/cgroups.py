"""Limits that cgroups (v1 and v2) put on this process: memory, processors, and rules that throttle reading.

A process belongs to one cgroup of each hierarchy, and is bound by the limits of all cgroups above it too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from pipeload.machine.files import read_file

__all__ = ["cpu_quota", "memory_limits", "read_limits"]

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
            rules.update(f"{name} {line.strip()}" for line in _read(place / name).splitlines() if line.strip())
    return "; ".join(sorted(rules))


def memory_limits(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> Iterator[tuple[int, int]]:
    """(limit, memory in use without page cache that can be dropped) of this process's cgroup and its parents."""
    for unified, place in _cgroups("memory", membership, root):
        limit = _read(place / ("memory.max" if unified else "memory.limit_in_bytes")).strip()
        usage = _read(place / ("memory.current" if unified else "memory.usage_in_bytes")).strip()
        stat = dict(line.split(maxsplit=1) for line in _read(place / "memory.stat").splitlines() if " " in line)
        cached = stat.get("inactive_file" if unified else "total_inactive_file", "0")
        # Without a limit v1 reports a number near 2**63, v2 the word "max".
        if stat and limit.isdecimal() and usage.isdecimal() and cached.isdecimal() and int(limit) < 2**60:
            yield int(limit), max(0, int(usage) - int(cached))


def cpu_quota(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> float:
    """Processors that the least quota of this process's cgroup and its parents allows; infinite without one."""
    least = math.inf
    for unified, place in _cgroups("cpu", membership, root):
        if unified:
            quota, _, period = _read(place / "cpu.max").strip().partition(" ")
        else:
            quota, period = (_read(place / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        # Without a quota v1 reports -1, v2 the word "max".
        if quota.isdecimal() and period.isdecimal() and int(period):
            least = min(least, int(quota) / int(period))
    return least


def _cgroups(controller: str, membership: Path, root: Path) -> Iterator[tuple[bool, Path]]:
    """(whether it is of v2, folder) of each cgroup that limits this process by a controller, from its own upwards."""
    for line in _read(membership).splitlines():
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
            yield controllers == "", place


def _read(path: Path) -> str:
    try:
        return read_file(path, most_bytes=_MOST_BYTES).decode(errors="replace")
    except OSError:
        return ""
