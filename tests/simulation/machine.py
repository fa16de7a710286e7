"""The simulated machine: files that are slow, short, wrong or gone; memory that is counted, scarce, or refused."""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.simulation.primitives import RUNNING

__all__ = ["Faults", "Machine", "Memory", "SimulatedFcntl", "SimulatedMmap", "SimulatedOs"]

DIRECTORY = Path("/simulated/model")
_FIRST_DESCRIPTOR = 1_000_000
_FUTURE_NS = 10**18
"""A file that was changed then is fresh at every moment of a run."""
_SCRATCH_BYTES = 1 << 20
"""Buffers of this size only pass bytes to a hash; the plan has no place for them, as `storage.weights` says."""


class Faults:
    """Says at each place where a fault may occur whether it does.

    Args:
        random: decides.
        rates: place -> how often it fails.

    Attributes:
        on: whether faults occur at all.
        made: place -> faults so far.
        errors: the errors that were raised.
    """

    def __init__(self, random: random.Random, rates: Mapping[str, float]) -> None:
        self._random = random
        self._rates = rates
        self.on = True
        self.made: Counter[str] = Counter()
        self.errors: list[BaseException] = []

    def occurs(self, place: str) -> bool:
        """Whether this place fails now."""
        rate = self._rates.get(place, 0.0)
        if self.on and rate and self._random.random() < rate:
            self.made[place] += 1
            return True
        return False

    def may_raise(self, place: str, make: Callable[[], BaseException]) -> None:
        """Raise the error if this place fails now."""
        if self.occurs(place):
            error = make()
            self.errors.append(error)
            raise error


class Memory:
    """Bytes of weights and sessions that the process occupies.

    Attributes:
        used: now.
        most: since the run began.
        process_bytes: of the process beside them.
    """

    def __init__(self, process_bytes: int) -> None:
        self.used = 0
        self.most = 0
        self.process_bytes = process_bytes

    def take(self, nbytes: int) -> None:
        self.used += nbytes
        self.most = max(self.most, self.used)

    def give(self, nbytes: int) -> None:
        self.used -= nbytes


class Machine:
    """Files, their disk, and memory.

    Args:
        files: name below the directory -> bytes.
        random: decides how long reads take, and which faults occur.
        faults: see there.
        latency_s: of a read, on the average.
        slow_after_s: from this moment on, the disk takes a hundred times as long; None for never.
        fresh: the files have changed just now, so that every read is hashed.
        process_bytes: see `Memory`.
        free_bytes: see below.

    Attributes:
        free_bytes: memory that cgroup and machine leave to the process.
        memory: of the process.
        faults: see above.
        open_files: descriptor -> name.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        random: random.Random,
        faults: Faults,
        *,
        latency_s: float,
        slow_after_s: float | None,
        fresh: bool,
        process_bytes: int,
        free_bytes: int,
    ) -> None:
        self._files = files
        self._random = random
        self._latency_s = latency_s
        self._slow_after_s = slow_after_s
        self._fresh = fresh
        self._next = _FIRST_DESCRIPTOR
        self.faults = faults
        self.memory = Memory(process_bytes)
        self.free_bytes = free_bytes
        self.open_files: dict[int, str] = {}

    def rss_bytes(self) -> int:
        self.faults.may_raise("figures", lambda: OSError(errno.EMFILE, "Too many open files"))
        return self.memory.process_bytes + self.memory.used

    def peak_rss_bytes(self) -> int:
        return self.memory.process_bytes + self.memory.most

    def shrink_arena(self) -> None:
        self.faults.may_raise("arena", MemoryError)

    def free(self) -> int:
        return self.free_bytes

    def may_start(self) -> None:
        self.faults.may_raise("thread", lambda: RuntimeError("can't start new thread"))

    def open(self, path: Path) -> int:
        self.wait("open")
        self.faults.may_raise("open", lambda: OSError(self._random.choice([errno.EIO, errno.EMFILE]), "refused"))
        name = str(path.relative_to(DIRECTORY))
        if name not in self._files:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        self._next += 1
        self.open_files[self._next] = name
        return self._next

    def open_folder(self, path: Path) -> int:
        """It is in the kernel's memory: no disk is asked."""
        self._next += 1
        self.open_files[self._next] = str(path.relative_to(DIRECTORY))
        return self._next

    def close(self, descriptor: int) -> None:
        del self.open_files[descriptor]

    def stat(self, name: str) -> Any:
        return SimpleNamespace(
            st_mode=stat.S_IFREG,
            st_size=len(self._files[name]),
            st_dev=1,
            st_ino=hash_of(name),
            st_mtime_ns=0,
            st_ctime_ns=_FUTURE_NS if self._fresh else 0,
        )

    def read(self, descriptor: int, nbytes: int, offset: int) -> bytes:
        name = self.open_files[descriptor]
        self.wait("read")
        self.faults.may_raise("read", lambda: OSError(errno.EIO, "Input/output error"))
        data = self._files[name][offset : offset + nbytes]
        if data and self.faults.occurs("short read"):
            data = data[: self._random.choice([0, 1, len(data) // 2, max(len(data) - 1, 0)])]
        # Rows of a table are read again after the file was found right; a flip between the two is not noticed.
        if data and self._fresh and name != "table" and self.faults.occurs("bit flip"):
            place = self._random.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ (1 << self._random.randrange(8))]) + data[place + 1 :]
        return data

    def wait(self, operation: str) -> None:
        """The time that the disk takes."""
        scheduler = RUNNING.scheduler
        if not self._latency_s:
            if operation == "open":
                scheduler.step("disk open")
            return
        seconds = self._latency_s * self._random.choice([0.1, 1.0, 1.0, 3.0])
        if self._slow_after_s is not None and scheduler.now_s - 1000 > self._slow_after_s:
            seconds *= 100
        scheduler.sleep(f"disk {operation}", seconds)


def hash_of(name: str) -> int:
    """The same in every process, unlike Python's own."""
    return int.from_bytes(name.encode(), "little") % (1 << 40)


class SimulatedOs:
    """Stands in for the module `os` where files of the model are opened and read."""

    def __init__(self, machine: Callable[[], Machine]) -> None:
        self._machine = machine

    def __getattr__(self, name: str) -> Any:
        # Constants, and functions of names and messages.
        return getattr(os, name)

    def open(self, path: Path | str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        machine = self._machine()
        whole = Path(path) if dir_fd is None else DIRECTORY / machine.open_files[dir_fd] / path
        return machine.open_folder(whole) if flags & os.O_DIRECTORY else machine.open(whole)

    def close(self, descriptor: int) -> None:
        self._machine().close(descriptor)

    def fstat(self, descriptor: int) -> Any:
        machine = self._machine()
        return machine.stat(machine.open_files[descriptor])

    def stat(self, file: int | Path) -> Any:
        return self.fstat(file) if isinstance(file, int) else self._machine().stat(str(file.relative_to(DIRECTORY)))

    def pread(self, descriptor: int, nbytes: int, offset: int) -> bytes:
        return self._machine().read(descriptor, nbytes, offset)

    def preadv(self, descriptor: int, buffers: list[Any], offset: int) -> int:
        (buffer,) = buffers
        data = self._machine().read(descriptor, len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    def posix_fadvise(self, *_: object) -> None:
        pass


class SimulatedFcntl:
    """Stands in for the module `fcntl`: every file takes direct reads."""

    F_GETFL, F_SETFL = 3, 4

    def fcntl(self, descriptor: int, command: int, flags: int = 0) -> int:
        return flags


class SimulatedMmap:
    """Stands in for the module `mmap` where buffers are made: their memory is counted, and may be refused."""

    def __init__(self, machine: Callable[[], Machine]) -> None:
        class Counted(mmap.mmap):
            """Memory of a buffer, counted until its pages are gone."""

            memory: Memory | None
            nbytes: int

            def __new__(cls, descriptor: int, nbytes: int, **options: Any) -> Any:
                found = machine()
                scratch = nbytes == _SCRATCH_BYTES
                if not scratch:
                    found.faults.may_raise("memory", lambda: OSError(errno.ENOMEM, "Cannot allocate memory"))
                made = super().__new__(cls, descriptor, nbytes, **options)
                made.memory, made.nbytes = None if scratch else found.memory, nbytes
                if not scratch:
                    found.memory.take(nbytes)
                return made

            def forget(self) -> None:
                memory, self.memory = self.memory, None
                if memory is not None:
                    memory.give(self.nbytes)

            def close(self) -> None:
                super().close()
                self.forget()

            def madvise(self, advice: int, *rest: int) -> None:
                if advice == mmap.MADV_DONTNEED:
                    self.forget()
                    # As where the process has locked its memory (mlockall).
                    machine().faults.may_raise("unmap", lambda: OSError(errno.EINVAL, "Invalid argument"))
                    super().madvise(advice, *rest)

            def __del__(self) -> None:
                self.forget()

        self.mmap = Counted

    def __getattr__(self, name: str) -> Any:
        return getattr(mmap, name)
