"""Limits for a child process: memory and disk bandwidth by cgroups v1 or v2, if this process may make them.

A limit counts everything that the kernel charges: anonymous memory and page cache alike. Files should be evicted from
the page cache before a measurement (`evict`): pages that another process read are charged to that process.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeload.errors import ConfigError

__all__ = ["READ_COUNTER", "Outcome", "Started", "disk_number", "evict", "permitted", "read_bytes", "run", "started"]

READ_COUNTER = "PIPELOAD_BENCH_READ_COUNTER"
"""Environment variable of the child: the file that counts its cgroup's reads from disks."""
_ROOT = Path("/sys/fs/cgroup")
_ENTER = 'n=$1; shift; while [ "$n" -gt 0 ]; do echo $$ > "$1" || exit 126; shift; n=$((n - 1)); done; exec "$@"'
_SAMPLE_S = 0.05
_END_S = 30
_UNTHROTTLED_BYTES_PER_S = 1 << 60
"""v1 counts a group's bytes only on disks for which the group has a rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a child ended.

    Attributes:
        returncode: as `subprocess` gives it; -9 when the kernel killed it.
        stdout, stderr: its output.
        peak_bytes: the cgroup's highest usage, page cache included; None without a cgroup.
        oom_kills: processes that the kernel killed for memory; None without a cgroup.
        samples: (seconds since the child began, bytes in use), about 20 a second; the cgroup's usage, or the RSS
            without a cgroup.
    """

    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int | None
    oom_kills: int | None
    samples: tuple[tuple[float, int], ...] = ()


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
    memory_bytes: int | None = None,
    read_bytes_per_s: int | None = None,
    disk_of: Path | None = None,
    grouped: bool = True,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a command to its end in a fresh cgroup.

    Args:
        command: the command to run.
        memory_bytes: the cap; None only measures.
        read_bytes_per_s: throttle reads from the disk that holds `disk_of`; None only counts them.
        disk_of: a path on that disk.
        grouped: False runs it without a cgroup, and measures only the RSS.
        timeout_s: the child is killed after this many seconds.
        env: its environment; None inherits.

    Raises:
        ConfigError: the disk cannot be throttled.
        OSError: this process may not make the cgroups; see `permitted`.
        subprocess.TimeoutExpired: it took too long.
    """
    if not grouped:
        return _watch(command, (), env, timeout_s, None)
    with _memory_group(memory_bytes) as memory, _disk_group(memory, read_bytes_per_s, disk_of) as disk:
        environment = dict(os.environ if env is None else env)
        if disk:
            environment[READ_COUNTER] = str(disk / ("io.stat" if memory.unified else "blkio.throttle.io_service_bytes"))
        return _watch(command, _folders(memory, disk), environment, timeout_s, memory)


@dataclass(frozen=True, slots=True)
class Started:
    """A child that goes on.

    Attributes:
        process: the child; its standard output is a pipe of text.
    """

    process: subprocess.Popen[str]
    _memory: _MemoryGroup | None
    _groups: tuple[Path, ...] = ()

    def peak_bytes(self) -> int | None:
        """The cgroup's highest usage so far, page cache included; None without one, and with v2 before Linux 5.19."""
        return self._memory.peak_bytes() if self._memory else None

    def forget_peak(self) -> None:
        """Let `peak_bytes` count from now on. With v1 only."""
        if self._memory:
            self._memory.forget_peak()

    def oom_kills(self) -> int:
        """Processes of the cgroup that the kernel has killed for memory."""
        return self._memory.oom_kills() if self._memory else 0

    def used_bytes(self) -> int:
        """What is charged to the cgroup now, page cache included."""
        return self._memory.used_bytes() if self._memory else 0

    def limit_bytes(self) -> int | None:
        """The cap of the cgroup; None without one."""
        return self._memory.limit_bytes() if self._memory else None

    def limit_memory(self, memory_bytes: int) -> None:
        """Change the cap of the cgroup.

        Raises:
            OSError: v1, and more is in use that the kernel cannot take away.
        """
        if self._memory:
            self._memory.limit(memory_bytes)


@contextmanager
def started(
    command: Sequence[str],
    *,
    log: Path | None = None,
    memory_bytes: int | None = None,
    read_bytes_per_s: int | None = None,
    disk_of: Path | None = None,
    grouped: bool = True,
    beside: Started | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Started]:
    """Start a command in a fresh cgroup; at the end of the context it gets SIGTERM, and SIGKILL 30 s later.

    Args:
        command: the command to start.
        log: a file that gets its standard error; None leaves it to the caller's.
        memory_bytes: see `run`.
        read_bytes_per_s: see `run`.
        disk_of: see `run`.
        grouped: False starts it without a cgroup.
        beside: a child in whose cgroup it is started, under the same limits, which are not given again; None for a
            cgroup of its own.
        env: see `run`.

    Raises:
        ConfigError: the disk cannot be throttled.
        OSError: this process may not make the cgroups; see `permitted`.
    """
    with ExitStack() as stack:
        memory: _MemoryGroup | None = None
        groups: tuple[Path, ...] = ()
        if beside:
            memory, groups = beside._memory, beside._groups
        elif grouped:
            memory = stack.enter_context(_memory_group(memory_bytes))
            groups = _folders(memory, stack.enter_context(_disk_group(memory, read_bytes_per_s, disk_of)))
        errors = stack.enter_context(log.open("w")) if log else None
        child = stack.enter_context(
            subprocess.Popen(_entering(command, groups), stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        )
        try:
            yield Started(child, memory, groups)
        finally:
            child.terminate()
            try:
                child.wait(_END_S)
            except subprocess.TimeoutExpired:
                child.kill()


def read_bytes() -> int:
    """Bytes that this process's cgroup (in a child of `run`), or else this process, has read from disks so far."""
    counter = os.environ.get(READ_COUNTER)
    if counter is None:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["read_bytes"])
    total = 0
    for line in Path(counter).read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[1] == "Read":  # v1: "254:0 Read 50388992"
            total += int(words[2])
        total += sum(int(word[7:]) for word in words[1:] if word.startswith("rbytes="))  # v2
    return total


def disk_number(path: Path, system: Path = Path("/sys/dev/block")) -> str | None:
    """`MAJOR:MINOR` of the whole disk that holds a path; not of a partition, since only disks can be throttled.

    None if the file system is not on one disk (tmpfs, overlay, network).
    """
    device = path.stat().st_dev
    entry = system / f"{os.major(device)}:{os.minor(device)}"
    if not entry.exists():
        return None
    whole = entry.resolve().parent if (entry / "partition").exists() else entry
    return (whole / "dev").read_text().strip()


@dataclass(frozen=True, slots=True)
class _MemoryGroup:
    """A memory cgroup.

    Attributes:
        folder: where the kernel shows it.
        unified: it is of cgroups v2.
    """

    folder: Path
    unified: bool

    def peak_bytes(self) -> int | None:
        """The highest usage; None with v2 before Linux 5.19."""
        path = self.folder / ("memory.peak" if self.unified else "memory.max_usage_in_bytes")
        return int(path.read_text()) if path.exists() else None

    def forget_peak(self) -> None:
        """Let the highest usage count from now on. With v1 only."""
        (self.folder / "memory.max_usage_in_bytes").write_text("0")

    def used_bytes(self) -> int:
        """What is charged to it now, page cache included."""
        return int((self.folder / ("memory.current" if self.unified else "memory.usage_in_bytes")).read_text())

    @property
    def _cap(self) -> Path:
        return self.folder / ("memory.max" if self.unified else "memory.limit_in_bytes")

    def limit_bytes(self) -> int | None:
        """The cap; None with v2 where there is none. v1 then tells a number of exabytes."""
        text = self._cap.read_text().strip()
        return None if text == "max" else int(text)

    def limit(self, limit_bytes: int) -> None:
        """Change the cap."""
        self._cap.write_text(str(limit_bytes))

    def oom_kills(self) -> int:
        """Processes in it that the kernel killed for memory."""
        name = "memory.events" if self.unified else "memory.oom_control"
        fields = dict(line.split() for line in (self.folder / name).read_text().splitlines())
        return int(fields.get("oom_kill", 0))


def _watch(
    command: Sequence[str],
    groups: Sequence[Path],
    env: Mapping[str, str] | None,
    timeout_s: float,
    memory: _MemoryGroup | None,
) -> Outcome:
    command = _entering(command, groups)
    begin = time.monotonic()
    samples: list[tuple[float, int]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as child:
        try:
            while True:
                try:
                    stdout, stderr = child.communicate(timeout=_SAMPLE_S)
                    break
                except subprocess.TimeoutExpired:
                    elapsed = time.monotonic() - begin
                    samples.append((round(elapsed, 3), memory.used_bytes() if memory else _rss_bytes(child.pid)))
                    if elapsed > timeout_s:
                        raise subprocess.TimeoutExpired(command, timeout_s) from None
        except BaseException:
            child.kill()
            raise
    peak = None
    if memory:
        peak = memory.peak_bytes() or max((used for _, used in samples), default=None)
    return Outcome(
        returncode=child.returncode,
        stdout=stdout,
        stderr=stderr,
        peak_bytes=peak,
        oom_kills=memory.oom_kills() if memory else None,
        samples=tuple(samples),
    )


def _folders(memory: _MemoryGroup, disk: Path | None) -> tuple[Path, ...]:
    """The groups of a child, each once: with v2 the group of its memory may be that of the disk."""
    return tuple(dict.fromkeys(folder for folder in (memory.folder, disk) if folder))


def _entering(command: Sequence[str], groups: Sequence[Path]) -> list[str]:
    """A shell enters the groups and becomes the command, so that all of the command's memory is charged to them."""
    if not groups:
        return [*command]
    places = [str(folder / "cgroup.procs") for folder in groups]
    return ["/bin/sh", "-c", _ENTER, "enter", str(len(places)), *places, *command]


def _rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


@contextmanager
def _memory_group(limit_bytes: int | None) -> Iterator[_MemoryGroup]:
    """A fresh memory cgroup without swap; it is removed at the end, when its processes have ended.

    Args:
        limit_bytes: the cap; None only measures.

    Raises:
        OSError: this process may not make one; see `permitted`.
    """
    v1 = _ROOT / "memory"
    unified = not v1.is_dir()
    with _group(_ROOT if unified else v1) as folder:
        if unified:
            if not (folder / "memory.max").exists():
                raise OSError(
                    f"child cgroups have no memory controller (write +memory into {_ROOT}/cgroup.subtree_control)"
                )
            (folder / "memory.max").write_text("max" if limit_bytes is None else str(limit_bytes))
            if (folder / "memory.swap.max").exists():
                (folder / "memory.swap.max").write_text("0")
        else:
            (folder / "memory.swappiness").write_text("0")
            (folder / "memory.limit_in_bytes").write_text("-1" if limit_bytes is None else str(limit_bytes))
        yield _MemoryGroup(folder, unified)


@contextmanager
def _disk_group(memory: _MemoryGroup, read_bytes_per_s: int | None, disk_of: Path | None) -> Iterator[Path | None]:
    """The group that counts and throttles reads: in v2 the memory group, in v1 one of its own; None without either."""
    number = disk_number(disk_of) if disk_of else None
    if number is None:
        if read_bytes_per_s is not None:
            raise ConfigError(
                f"{disk_of} does not lie on a disk that can be throttled. Copy it to one, or leave the disk as it is."
            )
        yield None
    elif memory.unified:
        if not (memory.folder / "io.stat").exists():
            if read_bytes_per_s is not None:
                raise ConfigError(
                    "The io controller is not enabled for child cgroups, so no disk can be throttled. As root, write "
                    f"+io into {_ROOT}/cgroup.subtree_control, or leave out the throttle."
                )
            yield None
            return
        if read_bytes_per_s is not None:
            (memory.folder / "io.max").write_text(f"{number} rbps={read_bytes_per_s}")
        yield memory.folder
    elif not (_ROOT / "blkio").is_dir():
        if read_bytes_per_s is not None:
            raise ConfigError(f"There is no blkio controller below {_ROOT}, so no disk can be throttled. Mount it.")
        yield None
    else:
        with _group(_ROOT / "blkio") as folder:
            rule = f"{number} {read_bytes_per_s or _UNTHROTTLED_BYTES_PER_S}"
            (folder / "blkio.throttle.read_bps_device").write_text(rule)
            yield folder


@contextmanager
def _group(parent: Path) -> Iterator[Path]:
    folder = parent / f"pipeload-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        # The kernel needs a moment after the last process has left.
        for _ in range(50):
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)
