"""Memory of the process and its limits, in bytes: RSS, its peak, and the memory that cgroup and machine leave free."""

from __future__ import annotations

import re
import resource
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeload.machine.cgroups import memory_limits

__all__ = [
    "FreeMemory",
    "Peak",
    "PeakWatch",
    "auto_budget_bytes",
    "peak_rss_bytes",
    "reset_peak_rss",
    "rss_bytes",
    "warm_rss_bytes",
]

_AUTO_SHARE, _AUTO_SPARE_BYTES = 0.99, 2_000_000
"""The budget "auto" takes this fraction of free memory, less the spare bytes: the kernel charges some beside RSS, and
plans outlast swings of free memory by 0.5 % (`Replanner.limit_bytes`). What is left lies between them and a kill."""
_LOOK_S = 0.25
_PAGE_BYTES = resource.getpagesize()
_STATM, _STATUS = "/proc/self/statm", Path("/proc/self/status")
_LIBRARY_BYTES = 25_000_000
"""At least this much of the interpreter's and the libraries' files is in memory once a process uses them (x86-64)."""


def rss_bytes() -> int:
    """Memory that the whole process occupies now."""
    try:
        with open(_STATM, "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return int(psutil.Process().memory_info().rss)


def warm_rss_bytes() -> int:
    """`rss_bytes` of a process that has used its libraries.

    A forked child has hardly any pages of its parent's libraries: they come back one by one, when they are used.
    """
    try:
        with open(_STATM, "rb") as file:
            _, resident, of_files, *_ = (int(pages) * _PAGE_BYTES for pages in file.read().split())
    except OSError:
        return rss_bytes()
    return resident + max(0, _LIBRARY_BYTES - of_files)


def peak_rss_bytes() -> int:
    """The most memory that the whole process has occupied since it began."""
    try:
        status = _STATUS.read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        # Elsewhere; on Linux this would count the memory of the parent process before it started this program.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True, slots=True)
class Peak:
    """Bounds on the process's peak memory during some time: the peak lies between these bytes."""

    least_bytes: int
    most_bytes: int


class PeakWatch:
    """Tells the process's peak memory from one `take` to the next.

    Args:
        peak_bytes: the process's peak since it began.
    """

    def __init__(self, peak_bytes: int) -> None:
        self._lock = threading.Lock()
        self._seen_bytes = 0
        self._peak_bytes = peak_bytes

    def note(self, rss: int) -> None:
        """Note the memory that the process occupies now. May be called from any thread."""
        with self._lock:
            self._seen_bytes = max(self._seen_bytes, rss)

    def take(self, peak_bytes: int, unseen_bytes: int) -> Peak:
        """The peak since the last `take`.

        Args:
            peak_bytes: the process's peak since it began.
            unseen_bytes: the most that the process may have grown by, unseen, between two notes.
        """
        with self._lock:
            seen, self._seen_bytes = self._seen_bytes, 0
        before, self._peak_bytes = self._peak_bytes, peak_bytes
        if peak_bytes > before:
            # A new peak, which the system has seen.
            return Peak(peak_bytes, peak_bytes)
        return Peak(seen, min(before, seen + unseen_bytes))


def reset_peak_rss() -> bool:
    """Make `peak_rss_bytes` begin anew, where the system can (Linux). Returns whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def auto_budget_bytes() -> int:
    """The budget that `"auto"` stands for: the memory that cgroup (v1 or v2) and machine leave to this process."""
    rss = rss_bytes()
    free = [psutil.virtual_memory().available + rss]
    for limit, used_by_all in memory_limits():
        # Pages of shared libraries may be charged to another cgroup: then RSS may exceed the limit by as much.
        free.append(limit - (used_by_all - rss))
    return int(max(min(free) - _AUTO_SPARE_BYTES, 1) * _AUTO_SHARE)


class FreeMemory:
    """The memory that cgroup and machine leave to this process, looked up no more often than it changes."""

    def __init__(self) -> None:
        self._looked_s = float("-inf")
        self._free_bytes = 0

    def __call__(self) -> int:
        """The bytes that the whole process may occupy."""
        if time.monotonic() - self._looked_s > _LOOK_S:
            self._free_bytes = auto_budget_bytes()
            self._looked_s = time.monotonic()
        return self._free_bytes
