"""A disk that fails, is slow, brings too little or lies, below a model that is loaded and called."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.system.preload import ALWAYS, Control, no_compiler
from tests.system.processes import Worker
from tests.system.rows import Finding, Row, judge, lacks_real, real, tiny

__all__ = ["ROWS"]

_MOST = 400
_TASKS = {"bert": "run", "llama": "generate", "minilm": "embed", "smollm2-135m": "generate"}


class _Rig:
    """A worker whose model lies on a disk that is ordered from here."""

    def __init__(self, name: str, place: Path) -> None:
        self.directory = real(name) if name in ("minilm", "smollm2-135m") else tiny(name)
        self.task, self.cache = _TASKS[name], place / "cache"
        self.control = Control(self.directory, place)
        self.worker = Worker({**self.control.environment, "PIPELOAD_CACHE": str(self.cache)})
        self.worker.ask("load", directory=str(self.directory), budget="2GB")
        self.expected: list[float] = self.worker.ask("call", task=self.task).result
        self.worker.ask("close")
        self.budget = 0

    def __enter__(self) -> _Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.__exit__(None, None, None)
        self.control.__exit__(None, None, None)

    def disturb(self, kind: str, *, cold: bool = True, first: int = 1, count: int = ALWAYS, value: int = 0) -> None:
        """Order the disk, for a load under a budget that is hardly more than the smallest.

        Args:
            kind, first, count, value: see `Control.disturb`.
            cold: the load hashes all files.
        """
        if cold:
            shutil.rmtree(self.cache, ignore_errors=True)
        refused = self.worker.ask("load", directory=str(self.directory), budget=1)
        self.budget = refused.needed_bytes + 1_500_000
        self.control.disturb(kind, first=first, count=count, value=value)

    def used(self, found: Finding, words: str, *, must: bool = False) -> None:
        """Load, call twice, rest, call again, and close.

        Args:
            found: gets the promises that were broken.
            words: say what is wrong with the disk.
            must: all is answered while it is.
        """
        found.runs += 1
        loaded = self.worker.ask("load", directory=str(self.directory), budget=self.budget)
        if loaded.error:
            judge(found, loaded, [], f"{words}, load")
            found.expect(not must, f"{words}: {loaded.error}")
            self.control.rest()
            loaded = self.worker.ask("load", directory=str(self.directory), budget=self.budget)
            found.expect(not loaded.error, f"{words}: the next load fails: {loaded.error}")
        else:
            for _ in range(2):
                told = self.worker.ask("call", task=self.task)
                good = judge(found, told, self.expected, words)
                found.expect(good or not must, f"{words}: {told.error}")
        self.control.rest()
        told = self.worker.ask("call", task=self.task)
        if told.error:
            # A Loading Agent has met the bad disk ahead of this call, which is told.
            judge(found, told, self.expected, f"{words}, read ahead")
            told = self.worker.ask("call", task=self.task)
        after = judge(found, told, self.expected, f"{words}, afterwards")
        found.expect(after, f"{words}: no answer when the disk is good again")
        self.worker.ask("close")

    def end(self, found: Finding) -> Finding:
        """Let the worker end, and look at what it has left."""
        ended = self.worker.end()
        found.expect(ended.code == 0 and not ended.stderr, f"the end: {ended.code} {ended.stderr[-500:]}")
        return found


def _each(name: str, kind: str, *, value: int, count: int, step: int = 1) -> Callable[[Path], Finding]:
    """The n-th call is disturbed, for every n until a run meets no call with that number."""

    def make(place: Path) -> Finding:
        found = Finding()
        with _Rig(name, place) as rig:
            first = 1
            while first < _MOST * step:
                rig.disturb(kind, first=first, count=count, value=value)
                rig.used(found, f"{kind}, from number {first} on, {count} times")
                if rig.control.hits < first:
                    break
                first += step
            else:
                found.failures.append(f"{kind}: {_MOST} were not enough")
            return rig.end(found)

    return make


def _all(name: str, kind: str, *, value: int = 0) -> Callable[[Path], Finding]:
    """Every call is disturbed, and every answer is right all the same."""

    def make(place: Path) -> Finding:
        found = Finding()
        with _Rig(name, place) as rig:
            for cold in (True, False):
                rig.disturb(kind, cold=cold, value=value)
                rig.used(found, kind, must=True)
                found.expect(rig.control.hits, f"{kind}: no call was met")
            return rig.end(found)

    return make


_ERROR = "ShardError or LoadError that names the file and the remedy, or the right answer"
_AGAIN = "the next call answers right"
ROWS = (
    Row(
        name="eio",
        fault="the n-th read fails with EIO, for every n",
        outcome=_ERROR,
        recovered=_AGAIN,
        make=_each("bert", "read fails", value=errno.EIO, count=1),
        lacks=no_compiler,
    ),
    Row(
        name="eio-from",
        fault="all reads from the n-th on fail with EIO, a decoder",
        outcome=_ERROR,
        recovered=_AGAIN,
        make=_each("llama", "read fails", value=errno.EIO, count=ALWAYS, step=3),
        lacks=no_compiler,
        long=True,
    ),
    Row(
        name="eio-minilm",
        fault="all reads from the n-th on fail with EIO, MiniLM (every 7th n)",
        outcome=_ERROR,
        recovered=_AGAIN,
        make=_each("minilm", "read fails", value=errno.EIO, count=ALWAYS, step=7),
        lacks=lambda: no_compiler() or lacks_real("minilm")(),
        long=True,
    ),
    Row(
        name="open",
        fault="the n-th file cannot be opened (EMFILE), for every n",
        outcome=_ERROR,
        recovered=_AGAIN,
        make=_each("bert", "open fails", value=errno.EMFILE, count=1),
        lacks=no_compiler,
    ),
    Row(
        name="map",
        fault="the n-th file cannot be mapped (ENOMEM), for every n",
        outcome=_ERROR,
        recovered=_AGAIN,
        make=_each("bert", "map fails", value=errno.ENOMEM, count=1),
        lacks=no_compiler,
    ),
    Row(
        name="short-reads",
        fault="every read brings a third of what was asked for",
        outcome="the right answer",
        recovered=_AGAIN,
        make=_all("bert", "read is short"),
        lacks=no_compiler,
    ),
    Row(
        name="short-read",
        fault="the n-th read brings a third of what was asked for, for every n, a decoder",
        outcome="the right answer",
        recovered=_AGAIN,
        make=_each("llama", "read is short", value=0, count=1),
        lacks=no_compiler,
        long=True,
    ),
    Row(
        name="slow-disk",
        fault="every read takes 30 ms longer than the profile knows",
        outcome="the right answer",
        recovered=_AGAIN,
        make=_all("bert", "read is slow", value=30_000_000),
        lacks=no_compiler,
        long=True,
    ),
    Row(
        name="bit-flip",
        fault="a bit flips in the n-th read of files that were not checked before, for every n",
        outcome="ShardError: the file is damaged; or the right answer",
        recovered=_AGAIN,
        make=_each("bert", "bit flips", value=40, count=1),
        lacks=no_compiler,
        slow=True,
    ),
    Row(
        name="bit-flip-smollm2",
        fault="a bit flips in all reads from the n-th on, SmolLM2 135M (every 40th n)",
        outcome="ShardError: the file is damaged; or the right answer",
        recovered=_AGAIN,
        make=_each("smollm2-135m", "bit flips", value=3000, count=ALWAYS, step=40),
        lacks=lambda: no_compiler() or lacks_real("smollm2-135m")(),
        long=True,
    ),
)
