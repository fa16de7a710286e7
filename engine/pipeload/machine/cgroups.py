"""Limits that cgroups (v1 and v2) put on this process: memory, and rules that throttle reading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["memory_limits", "read_limits"]

_THROTTLES = ("blkio.throttle.read_bps_device", "blkio.throttle.read_iops_device")


def read_limits(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> str:
    """Rules by which cgroups (v1 blkio, v2 `io.max`) slow down what this process reads; empty when there are none.

    All devices' rules: a partition is throttled by its disk's, under another number than its own.
    """
    rules: set[str] = set()
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            rules.update(_rules_upwards(root, path, ("io.max",)))
        elif "blkio" in controllers.split(","):
            rules.update(_rules_upwards(root / "blkio", path, _THROTTLES))
    return "; ".join(sorted(rules))


def _rules_upwards(mount: Path, path: str, names: tuple[str, ...]) -> Iterator[str]:
    # Inside a container the path in /proc may not exist below the mount: the mount itself is then the cgroup.
    folder = mount / path.lstrip("/")
    for place in (folder, *folder.parents):
        if place != mount and mount not in place.parents:
            return
        for name in names:
            try:
                lines = (place / name).read_text().splitlines()
            except OSError:
                continue
            yield from (f"{name} {line.strip()}" for line in lines if line.strip())


def memory_limits(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[int, int]]:
    """(limit, memory in use without page cache that can be dropped) of this process's cgroup and its parents."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _limits_upwards(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            yield from _limits_upwards(
                root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            )


def _limits_upwards(
    mount: Path, path: str, limit_name: str, usage_name: str, cache_name: str
) -> Iterator[tuple[int, int]]:
    # Inside a container the path in /proc may not exist below the mount: the mount itself is then the cgroup.
    folder = mount / path.lstrip("/")
    for place in (folder, *folder.parents):
        if place != mount and mount not in place.parents:
            return
        try:
            limit = (place / limit_name).read_text().strip()
            usage = int((place / usage_name).read_text())
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        # Without a limit v1 reports a number near 2**63, v2 the word "max".
        if limit != "max" and int(limit) < 2**60:
            yield int(limit), max(0, usage - int(stat.get(cache_name, 0)))
