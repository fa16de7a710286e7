"""A folder that becomes the target at once, or never.

```
 .NAME.lock                one export to a target at a time (flock: it ends with the process, however that ends)
 .NAME.staging-PID-RANDOM  everything is written here, temporary files too: on the disk whose free space is checked
   work floats result      temporary files; shards that are to be rounded; what becomes the target
   identity journal before which export it is; what is finished; files of killed exports of the same identity
 .NAME.old-PID-RANDOM      only where the kernel cannot exchange two folders: the old target, for a moment
```

At every moment the target is the old one, or absent as before, or the new one as a whole. The next export to the same
target removes the leftovers of a killed one, or puts the old target back. Where it is the same export, it takes over
the files that the killed one has made.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeload.errors import ConfigError, ExportError
from pipeload.machine.files import descriptors, opening

__all__ = ["Staging"]

_IDENTITY, _JOURNAL, _BEFORE = "identity", "journal", "before"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


class Staging:
    """A context in which a folder is built that `commit` puts in the target's place.

    Ctrl-C may come before the first line of `__exit__`, and then the `with` ends without it. The end of this object
    does the same.

    Args:
        target: the folder to make.
        marker: a file that marks a folder as one that this program made. Only such a folder, or an empty one, is
            replaced.
        force: an existing target may be replaced.
        wait: while another process builds the same folder, wait for it; otherwise refuse.

    Raises:
        ConfigError: the target exists and may not be replaced, or cannot be a folder at all.
        ExportError: another process is exporting to the same target.
        OSError: the system does not let the folder be made.
    """

    _pid = 0
    """Of the process that has made it; of no process before that is done."""

    def __init__(self, target: Path, marker: str, *, force: bool, wait: bool = False) -> None:
        self._made = False
        # The open lock file, if any; whether this process holds it, under its name.
        self._held: list[int] = []
        self._owned = False
        self._pid = os.getpid()
        try:
            # Resolved, so that two spellings meet at one lock and a symbolic link stays where it is.
            self._target = target.expanduser().resolve()
        except (RuntimeError, ValueError) as error:
            # Python's own words for a circle of links, a user without a home, and a NUL in the name.
            raise ConfigError(
                f"The target {str(target)!r} is no path of a folder: {error}. Name another one."
            ) from error
        self._marker = marker
        self._force = force
        self._wait = wait
        self._folder = self._beside("staging")
        self._identity = ""

    @property
    def work(self) -> Path:
        """A folder for temporary files."""
        return self._folder / "work"

    @property
    def result(self) -> Path:
        """The folder that becomes the target."""
        return self._folder / "result"

    @property
    def floats(self) -> Path:
        """A folder for the sharded model directory that is rounded into the result; not made here."""
        return self._folder / "floats"

    @property
    def root(self) -> Path:
        """The folder that holds all others, for a `Journal`."""
        return self._folder

    @property
    def kept_bytes(self) -> int:
        """Bytes of the files that killed exports have left, once this context is entered."""
        return sum(file.stat().st_size for file in (self._folder / _BEFORE).rglob("*") if file.is_file())

    def resume(self, identity: str) -> None:
        """Go on, once this context is entered, where killed exports of the same identity stopped.

        Args:
            identity: equal for exports that make the same files.
        """
        self._identity = identity

    @property
    def disk(self) -> Path:
        """A folder that exists on the target's file system."""
        return next(folder for folder in self._target.parents if folder.is_dir())

    def overlaps(self, other: Staging) -> bool:
        """Whether one of the two targets is the other, or lies in it."""
        one, two = self._target, other._target
        return one == two or one in two.parents or two in one.parents

    def check(self) -> None:
        """Raise ConfigError if the target may not be made or replaced. Changes nothing."""
        target = self._target
        if not target.name:
            raise ConfigError(f"The target {target} is the root of the file system. Name a folder in it.")
        if not os.path.lexists(target):
            return
        if not target.is_dir():
            raise ConfigError(f"The target {target} exists and is a file. Name a folder that does not exist.")
        if not self._force:
            raise ConfigError(f"The target {target} exists. Name another one, or pass --force to replace it.")
        if any(target.iterdir()) and not (target / self._marker).is_file():
            raise ConfigError(
                f"The target {target} holds files, but no {self._marker}, so it was not made by this command and is "
                "not replaced. Name another target, or remove it yourself."
            )

    def commit(self) -> None:
        """Flush the result to the disk, then put it in the target's place."""
        _sync(self.result)
        try:
            self.check()
            if not self._target.exists():
                self.result.rename(self._target)
            elif not _exchange(self.result, self._target):
                old = self._beside("old")
                self._target.rename(old)
                self.result.rename(self._target)
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise ExportError(
                f"The export could not be moved to {self._target}: {error.strerror or error}. Was it made meanwhile?"
            ) from error
        _sync_folder(self._target.parent)

    def __enter__(self) -> Self:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._acquire()
            leftovers = list(self._leftovers("staging"))
            # New, whatever lies there: a link that was planted would lead all files elsewhere.
            self._made = True
            try:
                self._folder.mkdir()
            except OSError:
                self._made = False
                raise
            (self._folder / _BEFORE).mkdir()
            (self._folder / _IDENTITY).write_text(self._identity)
            self._clean_up(leftovers)
            self.check()
            self.work.mkdir()
            self.result.mkdir()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BaseException:
            # Ctrl-C; a second one leaves the rest to the next export.
            self.close()
            raise

    def __del__(self) -> None:
        if self._pid == os.getpid():
            self.close()

    def close(self) -> None:
        """Remove everything but the target. May be called again."""
        if self._made:
            shutil.rmtree(self._folder, ignore_errors=True)
            # Once more where the disk has failed for a moment.
            shutil.rmtree(self._folder, ignore_errors=True)
            self._made = False
        self._release()

    def _release(self) -> None:
        """Close the lock file, and remove it where this process holds it."""
        if self._held:
            # Removed while it is held: a process that waits for the old file finds it gone, and makes a new one.
            owned, self._owned = self._owned, False
            with suppress(OSError):
                if owned or self._is_own(self._held[0]):
                    self._lock_path.unlink()
            closing = map(os.close, self._held)
            self._held = []
            deque(closing, 0)

    def _is_own(self, descriptor: int) -> bool:
        """Whether this process can hold the lock file, and it still has its name."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(descriptor)
        return _is_lock(found) and os.path.samestat(found, self._lock_path.lstat())

    @property
    def _lock_path(self) -> Path:
        return self._target.with_name(f".{self._target.name}.lock")

    def _beside(self, kind: str) -> Path:
        name = self._target.name or "root"
        return self._target.parent / f".{name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"

    def _acquire(self) -> None:
        while True:
            descriptor = self._open_lock()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if self._wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                owner = os.pread(descriptor, 32, 0).decode(errors="replace")
                raise ExportError(
                    f"Another export to {self._target} is under way (process {owner or 'unknown'}). "
                    "Wait for it, or name another target."
                ) from error
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), self._lock_path.lstat()):
                    self._owned = True
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                    return
            self._release()

    def _open_lock(self) -> int:
        """The open lock file, which no other name, link or pipe stands for: the process id is written into it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._held += opening(self._lock_path, flags)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._foreign_lock("a symbolic link") from error
            raise
        found = os.fstat(self._held[0])
        if not _is_lock(found):
            regular = stat.S_ISREG(found.st_mode)
            raise self._foreign_lock("a file with a second name" if regular else "no regular file")
        return self._held[0]

    def _foreign_lock(self, kind: str) -> ExportError:
        return ExportError(
            f"{self._lock_path} is {kind}, which no export has made. Remove it, or name a target in a folder of your "
            "own."
        )

    def _leftovers(self, kind: str) -> Iterator[Path]:
        """Folders that killed exports of this user have left: another user's could hold anything."""
        pattern = re.compile(rf"\.{re.escape(self._target.name)}\.{kind}-\d+-[0-9a-f]{{8}}")
        for path in self._target.parent.iterdir():
            if pattern.fullmatch(path.name):
                found = path.lstat()
                if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
                    yield path

    def _is_same(self, leftover: Path) -> bool:
        with suppress(OSError, UnicodeDecodeError):
            return bool(self._identity) and (leftover / _IDENTITY).read_text() == self._identity
        return False

    def _take_over(self, leftover: Path) -> None:
        """Move what a killed export has made, and what it had taken over, into the folder of this one."""
        journal = self._folder / _JOURNAL
        with suppress(FileNotFoundError), journal.open("ab") as lines:
            lines.write((leftover / _JOURNAL).read_bytes() + b"\n")
        _sync_file(journal)
        before, earlier = self._folder / _BEFORE, leftover / _BEFORE
        for folder in earlier.iterdir() if earlier.is_dir() else ():
            folder.rename(before / folder.name)
        shutil.rmtree(earlier, ignore_errors=True)
        shutil.rmtree(leftover / "work", ignore_errors=True)
        leftover.rename(before / leftover.name)

    def _clean_up(self, leftovers: Iterable[Path]) -> None:
        """Under the lock no other process works on this target, so its folders here are leftovers."""
        for old in self._leftovers("old"):
            if self._target.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(self._target)
        for folder in leftovers:
            if self._is_same(folder):
                self._take_over(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _is_lock(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_nlink <= 1


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step, where the kernel and the file system can (Linux `renameat2`)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _sync(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync_file(Path(parent, name))
        _sync_folder(Path(parent))


def _sync_file(path: Path) -> None:
    with descriptors() as held:
        held += opening(path, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(held[0])


def _sync_folder(path: Path) -> None:
    # Some file systems cannot do that for folders; the data itself is safe all the same.
    with suppress(OSError):
        _sync_file(path)
