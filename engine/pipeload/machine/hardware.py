"""The machine that this process runs on: processors, memory, and the storage device below a directory."""

from __future__ import annotations

import math
import os
import platform
import re
from pathlib import Path

import psutil

from pipeload.machine.cgroups import cpu_quota

__all__ = ["cores", "cpu_name", "device_of", "memory_bytes"]

_ROUND_BYTES = 100_000_000
"""Another kernel keeps a few megabytes more for itself; it is the same machine."""


def cores() -> int:
    """Processors by affinity, and by the quota of this process's cgroup and its parents, where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(count, cpu_quota())))


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name: its model name, or on Arm the numbers of its designs, big and little."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        text = ""
    for key in ("model name", "CPU part"):
        if found := re.findall(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE):
            return ", ".join(dict.fromkeys(found))
    return platform.processor()


def memory_bytes() -> int:
    """The machine's memory, in whole 100 MB."""
    return round(int(psutil.virtual_memory().total) / _ROUND_BYTES) * _ROUND_BYTES


def device_of(path: Path) -> str:
    """The storage device that a file or directory lies on, as `major:minor`; empty when there is no such path."""
    try:
        number = path.stat().st_dev
    except OSError:
        return ""
    return f"{os.major(number)}:{os.minor(number)}"
