"""Seconds that work takes if it goes on: a quota of processor time lets a process run ahead, and then stops it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipeload.machine.cgroups import cpu_quota

__all__ = ["Lap", "LastingClock"]


@dataclass(frozen=True, slots=True)
class Lap:
    """A moment.

    Attributes:
        wall_s: by a clock that never goes back.
        processor_s: that all threads of this process have taken so far.
    """

    wall_s: float
    processor_s: float


class LastingClock:
    """Measures short work as it would last within the quota of this process's cgroup.

    Without a quota that is the time that passes. With one of half a processor, work of 5 ms of one thread is done in
    5 ms ten times in a row, and then waits for 50 ms: it lasts 10 ms.
    """

    def __init__(self) -> None:
        self._quota = cpu_quota()

    def now(self) -> Lap:
        """The present moment."""
        return Lap(time.perf_counter(), time.process_time())

    def since(self, begin: Lap, wall_s: float | None = None) -> float:
        """Seconds that the work since then lasts.

        Args:
            begin: of the work.
            wall_s: the part of the time that has passed which counts; None for all of it.
        """
        end = self.now()
        passed_s = end.wall_s - begin.wall_s if wall_s is None else wall_s
        return max(passed_s, (end.processor_s - begin.processor_s) / self._quota)
