"""Limits for a child process: memory and disk bandwidth by cgroups v1 or v2, where this process may make them.

A limit counts everything that the kernel charges: anonymous memory and page cache alike. Files should be evicted from
the page cache before a measurement (`evict`): pages that were read by somebody else are charged to somebody else.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Outcome", "evict", "permitted", "run"]

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a limited child ended.

    Attributes:
        returncode: as `subprocess` gives it; -9 when the kernel killed it.
        stdout, stderr: what it printed.
        peak_bytes: the cgroup's highest usage, page cache included; None without a cgroup.
        oom_kills: processes that the kernel killed for memory; None without a cgroup.
    """

    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int | None
    oom_kills: int | None


def permitted() -> str | None:
    """None when this process may make memory cgroups, else the reason why not."""
    try:
        with _memory_group(None):
            return None
    except OSError as error:
        return f"no right to make a memory cgroup below {_ROOT}: {error}"


def evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def run(
    command: Sequence[str],
    *,
    memory_bytes: int | None,
    read_bytes_per_s: int | None = None,
    disk_of: Path | None = None,
    timeout_s: float,
    env: dict[str, str] | None = None,
) -> Outcome:
    """Run a command to its end in a fresh memory cgroup.

    Args:
        command: what to run.
        memory_bytes: the cap; None only measures.
        read_bytes_per_s: throttle reads from the disk that holds `disk_of`.
        disk_of: a path on that disk.
        timeout_s: the child is killed after so many seconds.
        env: its environment; None inherits.

    Raises:
        OSError: no right to make the cgroups; see `permitted`.
        subprocess.TimeoutExpired: it took too long.
    """
    with _memory_group(memory_bytes) as memory, _throttle(memory, read_bytes_per_s, disk_of) as groups:

        def enter() -> None:
            for folder in groups:
                (folder / "cgroup.procs").write_text(str(os.getpid()))

        # The child enters the groups between fork and exec, so that all of its memory is charged to them.
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env=env, preexec_fn=enter, check=False
        )
        return Outcome(
            returncode=done.returncode,
            stdout=done.stdout,
            stderr=done.stderr,
            peak_bytes=memory.peak_bytes(),
            oom_kills=memory.oom_kills(),
        )


@dataclass(frozen=True, slots=True)
class _MemoryGroup:
    folder: Path
    unified: bool

    def peak_bytes(self) -> int:
        name = "memory.peak" if self.unified else "memory.max_usage_in_bytes"
        return int((self.folder / name).read_text())

    def oom_kills(self) -> int:
        name = "memory.events" if self.unified else "memory.oom_control"
        fields = dict(line.split() for line in (self.folder / name).read_text().splitlines())
        return int(fields.get("oom_kill", 0))


@contextmanager
def _memory_group(limit_bytes: int | None) -> Iterator[_MemoryGroup]:
    v1 = _ROOT / "memory"
    unified = not v1.is_dir()
    with _group(_ROOT if unified else v1) as folder:
        if unified:
            if not (folder / "memory.max").exists():
                raise OSError("the memory controller is not enabled for child cgroups")
            (folder / "memory.max").write_text("max" if limit_bytes is None else str(limit_bytes))
            (folder / "memory.swap.max").write_text("0")
        else:
            (folder / "memory.swappiness").write_text("0")
            (folder / "memory.limit_in_bytes").write_text("-1" if limit_bytes is None else str(limit_bytes))
        yield _MemoryGroup(folder, unified)


@contextmanager
def _throttle(memory: _MemoryGroup, read_bytes_per_s: int | None, disk_of: Path | None) -> Iterator[list[Path]]:
    """The groups that the child enters: v2 has one for everything, v1 one for each controller."""
    if read_bytes_per_s is None or disk_of is None:
        yield [memory.folder]
        return
    device = disk_of.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    if memory.unified:
        (memory.folder / "io.max").write_text(f"{number} rbps={read_bytes_per_s}")
        yield [memory.folder]
        return
    with _group(_ROOT / "blkio") as folder:
        (folder / "blkio.throttle.read_bps_device").write_text(f"{number} {read_bytes_per_s}")
        yield [memory.folder, folder]


@contextmanager
def _group(parent: Path) -> Iterator[Path]:
    folder = parent / f"pipeload-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        # The kernel needs a moment after the last process left.
        for _ in range(50):
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)
