"""What the process uses and what it may use, in bytes: sizes as people write them, RSS, cgroup limits, trimming.

`MB` is 1000 * 1000 bytes and `MiB` is 1024 * 1024, as in the SI and as `docker` does not.
"""

from __future__ import annotations

import ctypes
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from pipeload.errors import ConfigError

__all__ = [
    "FreeMemory",
    "auto_budget_bytes",
    "format_bytes",
    "limit_heap",
    "parse_budget",
    "parse_bytes",
    "peak_rss_bytes",
    "reset_peak_rss",
    "rss_bytes",
    "trim",
    "widen_heap",
]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_LIKELY_MEGABYTES = 10**6
"""A text without a unit below it was meant in megabytes: no process runs in less than this number of bytes."""
_AUTO_SHARE, _AUTO_SPARE_BYTES = 0.995, 2_000_000
"""What "auto" takes is this part of the free memory less the spare bytes: the kernel charges some beside RSS."""
_LOOK_S = 0.25
_PRESSURE = Path("/proc/pressure/memory")
_PRESSURE_PERCENT = 10.0
"""Share of time in which some process waited for memory."""
_SCARCE_SHARE = 0.1
_PRESSED_SHARE = 0.95
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PAGE_BYTES = resource.getpagesize()


def parse_bytes(size: int | str) -> int:
    """Bytes of `268435456`, `"256MB"`, `"256 MiB"` or `"1.5GB"`.

    Raises:
        ConfigError: the text is no size, or not positive.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ConfigError(f"A size in bytes is an int or a text such as '256MB', not {size!r}.")
    if isinstance(size, int):
        value = size
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", size.upper())
        if not match or (match[3] and not match[2]):
            raise ConfigError(f"'{size}' is no size in bytes. Write it as 268435456, '256MB' or '256MiB'.")
        if size.strip()[-1].isdigit() and 0 < float(match[1]) < _LIKELY_MEGABYTES:
            raise ConfigError(f"The size in bytes '{size}' means {match[1]} bytes. Write '{match[1]}MB' for megabytes.")
        value = int(float(match[1]) * (_BINARY_UNITS[match[2]] if match[3] else _UNITS[match[2]]))
    if value <= 0:
        raise ConfigError(f"A size in bytes is positive, not {size!r}. Write it as 268435456, '256MB' or '256MiB'.")
    return value


def parse_budget(size: int | str) -> int | None:
    """Bytes of a memory budget: as `parse_bytes`, or None for `"auto"`, in any case."""
    if isinstance(size, str) and size.strip().lower() == "auto":
        return None
    return parse_bytes(size)


def format_bytes(nbytes: float) -> str:
    """`"268.4 MB"`: the size in the decimal unit that fits."""
    for unit in ("B", "kB", "MB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


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


def trim() -> None:
    """Give freed heap memory back to the system where the C library can (glibc's `malloc_trim`)."""
    release = _malloc_trim()
    if release is not None:
        release(0)


def limit_heap() -> None:
    """Keep the C library's heap from piling up freed memory, where it can be told to (glibc's `mallopt`).

    By default glibc keeps up to 64 MB in each of several arenas once large blocks were freed. From this call on, for
    the rest of the process, blocks from 128 KiB on go back to the system when freed, and an arena keeps 1 MiB.
    """
    _set_heap(mapped_from_bytes=128 << 10, kept_bytes=1 << 20)


def widen_heap() -> None:
    """Let the C library's heap keep what is freed, where it can be told to: passes are some percent faster.

    By default glibc gives a few megabytes back after each operator, and the next one has to have its pages made anew.
    From this call on, for the rest of the process, each arena may keep 256 MB.
    """
    _set_heap(mapped_from_bytes=32 << 20, kept_bytes=256 << 20)


def _set_heap(*, mapped_from_bytes: int, kept_bytes: int) -> None:
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, mapped_from_bytes)
        mallopt(_M_TRIM_THRESHOLD, kept_bytes)


def auto_budget_bytes() -> int:
    """The budget that `"auto"` stands for: what the cgroup (v1 or v2) and the machine leave to this process."""
    rss = rss_bytes()
    free = [psutil.virtual_memory().available + rss]
    for limit, used_by_all in _cgroup_limits(Path("/proc/self/cgroup"), _CGROUP_ROOT):
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


def _cgroup_limits(membership: Path, root: Path) -> Iterator[tuple[int, int]]:
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


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        function = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_size_t]
    function.restype = ctypes.c_int
    return function
