"""The preloaded library that disturbs files and the clock of a child process: compiled here, ordered from here."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["ALWAYS", "KINDS", "Control", "no_compiler"]

ALWAYS = 1 << 40
KINDS = ("none", "read fails", "read is short", "read is slow", "bit flips", "open fails", "map fails")
_KIND, _FIRST, _COUNT, _VALUE, _HITS, _CLOCK, _, _HUGE = range(8)


def no_compiler() -> str | None:
    """Why the library cannot be made here; None where it can."""
    return None if shutil.which("cc") else "needs a C compiler, cc"


@cache
def _library() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="pipeload-faulty-"))
    made = folder / "faulty.so"
    source = Path(__file__).with_name("faulty.c")
    subprocess.run(["cc", "-O1", "-w", "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True, timeout=120)
    return made


class Control:
    """Orders for the library in a child process. A context: its file goes with it.

    Args:
        folder: the folder whose files are disturbed.
        place: an existing folder for the file of orders.
    """

    def __init__(self, folder: Path, place: Path) -> None:
        path = place / f"control-{os.getpid()}-{id(self)}"
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            self._words = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self.environment = {
            "LD_PRELOAD": str(_library()),
            "FAULTY_CONTROL": str(path),
            "FAULTY_FOLDER": str(folder.resolve()),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._words.close()

    def disturb(self, kind: str, *, first: int = 1, count: int = 1, value: int = 0) -> None:
        """From now on: calls of this kind are counted anew, and `count` of them from the `first` on are disturbed.

        Args:
            kind: one of `KINDS`.
            first: number of the first call that is disturbed, from 1 on.
            count: calls that are disturbed.
            value: the error number, the nanoseconds of waiting, or the byte that flips.
        """
        self._put(_KIND, 0)
        for word, number in ((_FIRST, first), (_COUNT, count), (_VALUE, value), (_HITS, 0)):
            self._put(word, number)
        self._put(_KIND, KINDS.index(kind))

    def rest(self) -> None:
        """Disturb nothing."""
        self._put(_KIND, 0)

    @property
    def hits(self) -> int:
        """Calls of the kind since `disturb`."""
        return int(struct.unpack_from("q", self._words, 8 * _HITS)[0])

    def jump(self, clock_s: float) -> None:
        """Let the clock of the day go ahead and back by this much, from one look to the next; 0 lets it be."""
        self._put(_CLOCK, int(clock_s * 1e9))

    def huge_pages(self) -> None:
        """Ask the system for huge pages wherever memory is mapped."""
        self._put(_HUGE, 1)

    def _put(self, word: int, number: int) -> None:
        struct.pack_into("q", self._words, 8 * word, number)
