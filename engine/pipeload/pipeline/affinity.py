"""On which cores the agents of a pipeline run, where the machine has big and little ones."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from pipeload.machine.cores import affinity, computing_cores, pin, reading_cores

__all__ = ["INFERENCE", "Affinity"]

INFERENCE = "pipeload-inference"
"""The thread that computes; all other agents run where shards are read."""


class Affinity:
    """Pins the threads of a pipeline, and no other thread of the process.

    Once the kernel has refused to pin one, or another program has changed the affinity of one (`taskset -ap`), all
    threads stay where they are.

    Args:
        capacities: of `core_capacities`.
    """

    def __init__(self, capacities: Mapping[int, int]) -> None:
        self._capacities = dict(capacities) if computing_cores(capacities, 1) else {}
        self._pinned: dict[int, frozenset[int]] = {}
        self._computes: int | None = None

    def place(self, agents: Sequence[threading.Thread], threads: int) -> None:
        """Pin agents that are new, and all of them where another number of threads computes.

        Args:
            agents: those that have been started.
            threads: intra-op threads of the plan.
        """
        if not self._capacities:
            return
        if any(affinity(agent) not in (cores, frozenset()) for agent, cores in self._pinned.items()):
            self._capacities = {}
            return
        for agent in agents:
            assert agent.native_id is not None
            computes = agent.name == INFERENCE
            cores = (computing_cores if computes else reading_cores)(self._capacities, threads)
            if not pin(agent.native_id, cores):
                self._capacities = {}
                return
            self._pinned[agent.native_id] = cores
            if computes:
                self._computes = agent.native_id

    def pool(self, threads: int) -> frozenset[int]:
        """Cores for the pool of a session, which would else have those of the Loading Agent that makes it.

        They are the Inference Agent's, also where another program has changed them. None where nothing is pinned.

        Args:
            threads: intra-op threads of the plan.
        """
        if not self._capacities or self._computes is None:
            return frozenset()
        now = affinity(self._computes)
        # A plan with other threads may have come, for which the agents are not placed yet.
        return computing_cores(self._capacities, threads) if now == self._pinned[self._computes] else now
