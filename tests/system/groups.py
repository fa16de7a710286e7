"""Memory cgroups whose limit falls while a model is idle, while it runs, and below what can work."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.system.processes import Told, Worker
from tests.system.rows import Finding, Row, judge, lacks_real, real

from pipeload.bench import cgroup

__all__ = ["ROWS"]

_BEGIN_BYTES = 420_000_000
_HEADROOM_BYTES = 6_000_000
"""What the limit leaves above what is in use at a step: a limit that falls below that at once leaves no way."""
_LOOK_S = 0.3


class _Group:
    """A worker in a memory cgroup of its own."""

    def __init__(self, group: cgroup._MemoryGroup, place: Path) -> None:
        self.group = group
        self.worker = Worker({"PIPELOAD_CACHE": str(place / "cache")}, cgroup._entering([], [group.folder]))

    @property
    def limit_bytes(self) -> int:
        return int(self._file.read_text())

    @property
    def _file(self) -> Path:
        return self.group.folder / ("memory.max" if self.group.unified else "memory.limit_in_bytes")

    def lower(self, target: int, busy: Callable[[], object] = str) -> bool:
        """Let the limit fall to the target, as fast as leaves the headroom. Returns whether it got there.

        Args:
            target: bytes.
            busy: called at each step.
        """
        stuck_s, best = time.monotonic() + 20, self.limit_bytes
        while best > target and time.monotonic() < stuck_s:
            # The page cache in it makes way by itself.
            with suppress(OSError):
                self._file.write_text(str(max(target, self._used_bytes() + _HEADROOM_BYTES)))
            if self.limit_bytes < best:
                stuck_s, best = time.monotonic() + 20, self.limit_bytes
            busy()
            time.sleep(_LOOK_S)
        return self.limit_bytes <= target

    def _used_bytes(self) -> int:
        """What is charged to the group, page cache left out that the kernel drops."""
        stat = dict(line.split() for line in (self.group.folder / "memory.stat").read_text().splitlines())
        prefix, mapped = ("", "file_mapped") if self.group.unified else ("total_", "total_mapped_file")
        cached = int(stat[f"{prefix}inactive_file"]) + int(stat[f"{prefix}active_file"]) - int(stat[mapped])
        return self.group.used_bytes() - max(0, cached)


def _make(budget: int | str, model: str, task: str, *, busy: bool) -> Callable[[Path], Finding]:
    """The limit falls to a little above what the model needs, then below it, and comes back."""

    def make(place: Path) -> Finding:
        found = Finding()
        directory = str(real(model))
        with cgroup._memory_group(_BEGIN_BYTES) as group, (held := _Group(group, place)).worker as worker:
            refused = worker.ask("load", directory=directory, budget=1)
            smallest = refused.needed_bytes
            loaded = worker.ask("load", directory=directory, budget=budget)
            found.expect(not loaded.error, f"load: {loaded.error}")
            expected = worker.ask("call", task=task).result
            waiting = 0

            def call() -> None:
                nonlocal waiting
                worker.send("call", task=task)
                waiting += 1

            def answers(words: str, *, must: bool) -> None:
                nonlocal waiting
                for _ in range(waiting):
                    found.runs += 1
                    try:
                        told = worker.answer()
                    except AssertionError as error:
                        raise AssertionError(
                            f"{words}, limit {held.limit_bytes}, smallest {smallest}: {error}"
                        ) from error
                    right = judge(found, told, expected, words)
                    found.expect(right or not must, f"{words}: it is refused where there is a way")
                waiting = 0

            for target, words, must in (
                (smallest + 60_000_000, "60 MB above what is needed", True),
                (smallest + 14_000_000, "14 MB above what is needed", True),
                (smallest - 12_000_000, "below what can work", False),
            ):
                got_there = held.lower(target, call if busy else str)
                found.expect(
                    got_there or not must, f"{words}: memory is not given back: {held.limit_bytes} of {target}"
                )
                call()
                answers(words, must=must)
            held._file.write_text(str(_BEGIN_BYTES))
            time.sleep(1)
            call()
            answers("when the limit is back", must=True)
            ended = worker.end()
            found.expect(ended.code == 0 and not ended.stderr, f"the end: {ended.code} {ended.stderr[-300:]}")
            found.expect(group.oom_kills() == 0, "the kernel killed it")
        return found

    return make


def _load(place: Path) -> Finding:
    """A model is loaded under limits from too small to ample: in each it works, or is refused with what is needed."""
    found = Finding()
    for limit in range(60_000_000, 200_000_000, 20_000_000):
        with cgroup._memory_group(limit) as group, _Group(group, place).worker as worker:
            found.runs += 1
            try:
                told: Told = worker.ask("load", directory=str(real("minilm")), budget="auto")
                if told.error:
                    found.expect(told.error[0] == "BudgetError", f"{limit}: {told.error}")
                    found.expect(told.needed_bytes > limit * 0.9, f"{limit}: {told.needed_bytes} would have been there")
                else:
                    called = worker.ask("call", task="embed")
                    found.expect(not called.error, f"{limit}: {called.error}")
            except AssertionError:
                # The interpreter and its libraries alone do not fit.
                found.expect(limit < 90_000_000, f"{limit}: it was killed")
    return found


def _lacks() -> str | None:
    return cgroup.permitted() or lacks_real("minilm")()


_ANSWERS = "right answers while there is a way, then BudgetError; never killed"
_BACK = "the next call answers right once the limit is back"
ROWS = (
    *(
        Row(name=name, fault=fault, outcome=_ANSWERS, recovered=_BACK, make=make, lacks=_lacks, long=True)
        for name, fault, make in (
            (
                "cgroup-idle",
                "a cgroup's limit falls while MiniLM is idle, budget auto",
                _make("auto", "minilm", "embed", busy=False),
            ),
            (
                "cgroup-busy",
                "a cgroup's limit falls while MiniLM runs, budget auto",
                _make("auto", "minilm", "embed", busy=True),
            ),
            (
                "cgroup-bytes",
                "a cgroup's limit falls below the budget in bytes of MiniLM",
                _make(300_000_000, "minilm", "embed", busy=True),
            ),
        )
    ),
    Row(
        name="cgroup-load",
        fault="MiniLM is loaded with budget auto in cgroups of 60 to 180 MB",
        outcome="it answers, or BudgetError names what is needed",
        recovered="a larger cgroup works",
        make=_load,
        lacks=_lacks,
        long=True,
    ),
)
