"""One contender in a process of its own, under its limits, with cold files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

import pipeload
from pipeload.bench import cgroup
from pipeload.bench.record import Run
from pipeload.bench.spec import Result, Spec, from_json, to_json
from pipeload.machine.sizes import format_bytes
from pipeload.measuring.bandwidth import filled_buffer

__all__ = ["back_memory", "child_environment", "last_words", "run_contender"]


def run_contender(
    spec: Spec,
    *,
    memory_bytes: int | None = None,
    read_bytes_per_s: int | None = None,
    grouped: bool = True,
    timeout_s: float = 3600,
    cache: Path | None = None,
) -> Run:
    """Run one contender; its outputs are not checked.

    Args:
        spec: the contender's work.
        memory_bytes: the cgroup's limit.
        read_bytes_per_s: the throttle of the disk that holds the model.
        grouped: False if this process may not make cgroups.
        timeout_s: the contender is ended after this many seconds.
        cache: a folder that pipeload uses instead of the user's cache.

    Raises:
        ConfigError: the disk cannot be throttled.
    """
    files = spec.weight_files()
    # A default session briefly holds the weights three times: as file, loaded, and packed.
    back_memory(min(3 * sum(file.stat().st_size for file in files), memory_bytes or sys.maxsize))
    cgroup.evict(files)
    with tempfile.TemporaryDirectory(prefix="pipeload-bench-") as folder:
        path = Path(folder) / "spec.json"
        path.write_bytes(to_json(spec))
        try:
            outcome = cgroup.run(
                [sys.executable, "-m", "pipeload.bench.contender", str(path)],
                memory_bytes=memory_bytes,
                read_bytes_per_s=read_bytes_per_s,
                disk_of=spec.directory,
                grouped=grouped,
                timeout_s=timeout_s,
                env=child_environment(cache),
            )
        except subprocess.TimeoutExpired:
            return Run(result=None, message=f"It took longer than {timeout_s:.0f} s.")
    result = from_json(outcome.stdout, Result) if outcome.returncode == 0 else None
    killed = bool(outcome.oom_kills)
    message = None
    if killed:
        message = f"The kernel killed it: it needs more than {format_bytes(memory_bytes or 0)}."
    elif result is None:
        message = last_words(outcome)
    peak = outcome.peak_bytes
    if peak is None:
        peak = result.peak_rss_bytes if result else max((used for _, used in outcome.samples), default=None)
    return Run(result=result, peak_bytes=peak, killed=killed, message=message, samples=outcome.samples)


def back_memory(nbytes: int) -> None:
    """Touch `nbytes` once (at most half of what is free), so that the machine has backed these pages before timing.

    A virtual machine's host must first find memory for a page that is new to the machine or was given back: this took
    two seconds per GB, fifteen times as long as any other page, and chance would decide which contender pays for it.
    """
    # In large pages, like buffers: the kernel hands out freed large pages first.
    filled_buffer(min(nbytes, psutil.virtual_memory().available // 2)).close()


def last_words(outcome: cgroup.Outcome) -> str:
    """The last output of a child before it ended."""
    return (outcome.stderr.strip().splitlines() or [f"It ended with exit code {outcome.returncode}."])[-1]


def child_environment(cache: Path | None) -> dict[str, str]:
    """Variables of a child: it imports this process's pipeload, and uses `cache` instead of the user's cache."""
    root = str(Path(pipeload.__file__).resolve().parents[1])
    known = os.environ.get("PYTHONPATH")
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([root, known] if known else [root])}
    return variables | ({"PIPELOAD_CACHE": str(cache)} if cache else {})
