"""Ways to decide which thread runs next."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.simulation.scheduler import SimulatedThread

__all__ = ["Any", "Priorities"]


class Any:
    """Each thread may be next.

    Args:
        rng: draws.
        p: how often a thread is drawn although the current one could go on.
        hurry: how often a wait with a timeout ends although threads could run.
    """

    def __init__(self, rng: random.Random, p: float, hurry: float) -> None:
        self._rng, self._p, self._hurry = rng, p, hurry

    def next(self, runnable: Sequence[SimulatedThread], current: SimulatedThread | None) -> SimulatedThread:
        if current is not None and self._rng.random() >= self._p:
            return current
        return runnable[int(self._rng.random() * len(runnable))]

    def hurries(self) -> bool:
        return bool(self._hurry) and self._rng.random() < self._hurry

    def settled(self, step: int) -> None:
        pass


class Priorities(Any):
    """The thread of the highest priority runs; at some steps that priority falls below all others.

    Source: "A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs" (Burckhardt et al., 2010).
    """

    def __init__(self, rng: random.Random, hurry: float, changes: int = 4, steps: int = 2000) -> None:
        super().__init__(rng, 0.0, hurry)
        self._priorities: dict[int, float] = {}
        self._changes = {rng.randrange(steps) for _ in range(changes)}
        self._steps = 0

    def next(self, runnable: Sequence[SimulatedThread], current: SimulatedThread | None) -> SimulatedThread:
        self._steps += 1
        for thread in runnable:
            if thread.number not in self._priorities:
                self._priorities[thread.number] = self._rng.random()
        best = max(runnable, key=lambda thread: self._priorities[thread.number])
        if self._steps in self._changes:
            self._priorities[best.number] = -float(self._steps)
        return best
