"""What the process uses and what it may use, in bytes: RSS, its peak, and what cgroup and machine leave free."""

from __future__ import annotations

import re
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from pipeload.machine.cgroups import memory_limits

__all__ = ["FreeMemory", "auto_budget_bytes", "peak_rss_bytes", "reset_peak_rss", "rss_bytes"]

_AUTO_SHARE, _AUTO_SPARE_BYTES = 0.995, 2_000_000
"""What "auto" takes is this part of the free memory less the spare bytes: the kernel charges some beside RSS."""
_LOOK_S = 0.25
_PRESSURE = Path("/proc/pressure/memory")
_PRESSURE_PERCENT = 10.0
"""Share of time in which some process waited for memory."""
_SCARCE_SHARE = 0.1
_PRESSED_SHARE = 0.95
_PAGE_BYTES = resource.getpagesize()


def rss_bytes() -> int:
    """Memory that the whole process occupies now."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """The most memory that the whole process has occupied since it began."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        # Elsewhere; on Linux this would count what a parent process occupied before it started this program.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> bool:
    """Make `peak_rss_bytes` begin anew, where the system can (Linux). Returns whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def auto_budget_bytes() -> int:
    """The budget that `"auto"` stands for: what the cgroup (v1 or v2) and the machine leave to this process."""
    rss = rss_bytes()
    free = [psutil.virtual_memory().available + rss]
    for limit, used_by_all in memory_limits():
        # Pages of shared libraries may be charged to another cgroup: then RSS may exceed the limit by as much.
        free.append(limit - (used_by_all - rss))
    return int(max(min(free) - _AUTO_SPARE_BYTES, 1) * _AUTO_SHARE)


class FreeMemory:
    """What cgroup and machine leave to this process, looked up no more often than it changes.

    Where the kernel reports that processes wait for memory (PSI), while little of the machine's memory is free, it is
    less than what the process occupies.
    """

    def __init__(self) -> None:
        self._looked_s = float("-inf")
        self._free_bytes = 0

    def __call__(self) -> int:
        """The bytes that the whole process may occupy."""
        if time.monotonic() - self._looked_s > _LOOK_S:
            self._free_bytes = auto_budget_bytes()
            if _pressed():
                self._free_bytes = min(self._free_bytes, int(rss_bytes() * _PRESSED_SHARE))
            self._looked_s = time.monotonic()
        return self._free_bytes


def _pressed() -> bool:
    machine = psutil.virtual_memory()
    if machine.available > machine.total * _SCARCE_SHARE:
        return False
    with suppress(OSError, LookupError, ValueError):
        some = _PRESSURE.read_text().splitlines()[0]
        return float(some.split("avg10=")[1].split()[0]) > _PRESSURE_PERCENT
    return False
