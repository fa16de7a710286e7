"""Big and little cores: which of the logical processors compute, and which read.

Where all cores are equal, the kernel places threads best, and nothing here does anything. Where they differ, n threads
compute on the n cores of the largest capacity, and Loading Agents have the others, or all when there are none.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

from pipeload.machine.files import read_file

__all__ = ["affinity", "big_cores", "computing_cores", "core_capacities", "pin", "reading_cores", "spelled"]

_SYSTEM = Path("/sys/devices/system/cpu")
_WHOLE = 1024
"""The capacity of a machine's largest core, as Linux counts."""
_LITTLE = 1.2
"""Cores whose capacities differ by less than this factor are equal: desktop processors let their best cores run a few
percent faster than the others."""
_MOST_BYTES = 4096
_LOGGER = logging.getLogger("pipeload")


def core_capacities(system: Path = _SYSTEM) -> dict[int, int]:
    """Logical processors that this process may use -> their capacities, of 1024 for the machine's largest.

    By `cpu_capacity`, which Linux has where it knows more than one kind of core, or else by the greatest frequencies.
    Empty where none of them is little, where the system does not tell, and where threads cannot be pinned.

    Args:
        system: the folder of the machine's processors in /sys.
    """
    if not hasattr(os, "sched_getaffinity"):
        return {}
    usable = os.sched_getaffinity(0)
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        known = {
            int(found[1]): value
            for folder in sorted(system.glob("cpu[0-9]*"))
            if (found := re.fullmatch(r"cpu(\d+)", folder.name)) and (value := _number(folder / name))
        }
        if usable <= known.keys():
            whole = max(known.values())
            capacities = {core: max(1, round(known[core] * _WHOLE / whole)) for core in sorted(usable)}
            return capacities if min(capacities.values()) * _LITTLE <= _WHOLE else {}
    return {}


def big_cores(capacities: Mapping[int, int]) -> int:
    """The number of big cores: those before the widest gap between one capacity and the next smaller one.

    Args:
        capacities: of `core_capacities`.
    """
    ordered = sorted(capacities.values(), reverse=True)
    gaps = [(larger / smaller, count) for count, (larger, smaller) in enumerate(pairwise(ordered), 1)]
    factor, count = max(gaps, default=(1.0, 0))
    return count if factor >= _LITTLE else len(ordered)


def computing_cores(capacities: Mapping[int, int], threads: int) -> frozenset[int]:
    """Cores for this many threads that compute; empty where threads are not pinned.

    Args:
        capacities: of `core_capacities`.
        threads: intra-op threads of a session.
    """
    if big_cores(capacities) == len(capacities):
        return frozenset()
    return frozenset(sorted(capacities, key=lambda core: (-capacities[core], core))[:threads])


def reading_cores(capacities: Mapping[int, int], threads: int) -> frozenset[int]:
    """Cores for Loading Agents beside this many threads that compute: the others, or all; empty where none is pinned.

    Args:
        capacities: of `core_capacities`.
        threads: intra-op threads of a session.
    """
    computing = computing_cores(capacities, threads)
    return (frozenset(capacities) - computing or computing) if computing else frozenset()


def spelled(capacities: Mapping[int, int], threads: int) -> str:
    """Which cores compute and which read, for a user; empty where threads are not pinned."""
    computing, reading = computing_cores(capacities, threads), reading_cores(capacities, threads)
    return f"computing on {_numbers(computing)}, reading on {_numbers(reading)}" if computing else ""


def affinity(thread: int) -> frozenset[int]:
    """Cores that a thread may run on; none where it has ended.

    Args:
        thread: its `native_id`.
    """
    try:
        return frozenset(os.sched_getaffinity(thread))
    except OSError:
        return frozenset()


def pin(thread: int, cores: Collection[int]) -> bool:
    """Let a thread run on these cores only; where none is given it stays. Returns whether the kernel has agreed.

    Args:
        thread: its `native_id`; 0 for the calling one.
        cores: logical processors.
    """
    if not cores:
        return True
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:
        # It has ended.
        return True
    except OSError as error:
        _tell(_numbers(cores), error.strerror or str(error))
        return False
    return True


@cache
def _tell(cores: str, reason: str) -> None:
    _LOGGER.info("threads are not pinned to the cores %s, the kernel refuses: %s", cores, reason)


def _numbers(cores: Collection[int]) -> str:
    """`0-3, 6`."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _number(path: Path) -> int:
    """The number in a file; 0 where it has none."""
    try:
        text = read_file(path, most_bytes=_MOST_BYTES).strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0
