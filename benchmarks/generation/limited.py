"""A program of this benchmark in a process of its own, under its limits, with cold files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import ROOT
from pipeload.bench import cgroup
from pipeload.bench.launch import back_memory, child_environment, last_words
from pipeload.errors import RunError

__all__ = ["Done", "files_of", "profile", "python_of", "run_program"]

_PROGRAMS = "benchmarks.generation.programs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a program ended.

    Attributes:
        answer: its report; None when it ended without one.
        peak_bytes: the cgroup's peak, page cache included.
        killed: the kernel ended it for memory.
        message: why there is no answer.
    """

    answer: dict[str, Any] | None
    peak_bytes: int | None = None
    killed: bool = False
    message: str | None = None


def run_program(
    name: str,
    order: Mapping[str, Any],
    *,
    files: Iterable[Path],
    python: Path = Path(sys.executable),
    memory_bytes: int | None = None,
    read_bytes_per_s: int | None = None,
    cache: Path | None = None,
    timeout_s: float = 7200,
) -> Done:
    """Run `programs/NAME.py` with an order, and take the last line that it prints.

    Args:
        name: of the program.
        order: its argument.
        files: those that it reads, evicted from the page cache before.
        python: the interpreter of its virtual environment.
        memory_bytes: the cgroup's limit.
        read_bytes_per_s: the throttle of the disk that holds the files.
        cache: pipeload's cache folder, instead of the user's.
        timeout_s: it is ended when it takes longer.
    """
    files = list(files)
    back_memory(memory_bytes or 0)
    cgroup.evict(files)
    environment = child_environment(cache)
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(ROOT)])
    try:
        outcome = cgroup.run(
            [str(python), "-m", f"{_PROGRAMS}.{name}", json.dumps(order)],
            memory_bytes=memory_bytes,
            read_bytes_per_s=read_bytes_per_s,
            disk_of=ROOT,
            timeout_s=timeout_s,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return Done(answer=None, message=f"It took longer than {timeout_s:.0f} s.")
    if outcome.oom_kills:
        return Done(answer=None, peak_bytes=outcome.peak_bytes, killed=True, message="The kernel killed it for memory.")
    if outcome.returncode:
        return Done(answer=None, peak_bytes=outcome.peak_bytes, message=last_words(outcome))
    return Done(answer=json.loads(outcome.stdout.strip().splitlines()[-1]), peak_bytes=outcome.peak_bytes)


def profile(directory: Path, read_bytes_per_s: int | None, cache: Path) -> None:
    """What `pipeload profile` finds out about a model under the throttle; kept in the cache, where runs find it."""
    outcome = cgroup.run(
        [sys.executable, "-m", "pipeload", "profile", str(directory)],
        read_bytes_per_s=read_bytes_per_s,
        disk_of=directory,
        timeout_s=600,
        env=child_environment(cache),
    )
    if outcome.returncode:
        raise RunError(f"The model could not be profiled: {last_words(outcome)}")


def python_of(engine: str, environments: Path) -> Path:
    """The interpreter of an engine's virtual environment."""
    return environments.absolute() / engine / "bin" / "python"


def files_of(path: Path) -> list[Path]:
    """The file, or every file in the folder."""
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
