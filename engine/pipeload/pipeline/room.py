"""Room for the next sweep: its plan, the plan's memory, and Loading Agents that begin at its first shard."""

from __future__ import annotations

from dataclasses import replace

from pipeload.errors import ClosedError
from pipeload.format.manifest import Manifest, first_places
from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.lent_outputs import LentOutputs
from pipeload.pipeline.weights_memory import WeightsMemory
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan
from pipeload.planning.replanner import Replanner

__all__ = ["Room"]


class Room:
    """Makes room between sweeps. Only the Inference Agent uses it, except for `start` and `stop`.

    Args:
        manifest: the model.
        exchange: stops and starts the Loading Agents, and holds the resident shards.
        memory: holds the plan in force.
        replanner: plans anew.
        lent: outputs of earlier calls, which occupy memory too.

    Attributes:
        needs: of the latest pass that was planned.
    """

    def __init__(
        self, manifest: Manifest, exchange: Exchange, memory: WeightsMemory, replanner: Replanner, lent: LentOutputs
    ) -> None:
        self._manifest = manifest
        self._exchange = exchange
        self._memory = memory
        self._replanner = replanner
        self._lent = lent
        self.needs = Needs(pass_bytes=memory.plan.pass_bytes, cache_bytes=memory.plan.cache_bytes)

    def prepare(self, next_pass: int, needs: Needs | None = None, *, strict: bool = False) -> None:
        """Plan a pass, make room for it, and start the Loading Agents if they are stopped.

        Args:
            next_pass: its number.
            needs: of the pass; None for another pass like the latest one.
            strict: see `Replanner.before_pass`.

        Raises:
            BudgetError: the pass does not fit the budget.
            ClosedError: the exchange was closed meanwhile.
        """
        needs = needs or self.needs
        wanted = self.with_lent(needs)
        packing = self._exchange.residents.packing
        beside = self._memory.beside_bytes(packing=packing)
        if self._replanner.growth_bytes(self._memory.plan, wanted.pass_bytes, beside) > 0:
            self._memory.give_back()
            beside = self._memory.beside_bytes(packing=packing)
        plan = self._replanner.before_pass(self._memory.plan, wanted, beside, strict=strict)
        # The needs of a refused call say nothing about the next one.
        self.needs = needs
        if plan.process_bytes != self._memory.plan.process_bytes:
            # Until now other models may have had more of the budget: their peaks are no faults of the next plan.
            self._memory.take_peak(0)
        if plan.layout != self._memory.plan.layout:
            self._clear_for(plan)
        self._memory.follow(plan)
        if self._exchange.stopped:
            self.start(next_pass)

    def learn_peak(self, *, complete: bool) -> None:
        """After a pass: let the replanner compare the peak of the process with the plan.

        Args:
            complete: whether all resident shards and kept parts were in memory.
        """
        pass_bytes = self.with_lent(self.needs).pass_bytes
        plan, peak = self._memory.plan, self._memory.take_peak(pass_bytes)
        # Loading Agents that pack have all of their copies at the same moment in few passes: most passes tell of room
        # that others need.
        packs = any(shard.packed and shard.name not in plan.resident for shard in self._manifest.shards)
        complete = complete and self._memory.complete and not (packs or plan.packed_streamed)
        self._replanner.correct(plan, peak, pass_bytes, complete=complete)

    def start(self, next_pass: int) -> None:
        """Let the Loading Agents begin at the first shard of a pass."""
        plan = self._memory.plan
        resident = [shard.name in plan.resident for shard in self._manifest.shards]
        firsts = enumerate(first_places(self._manifest.shards))
        weights = [first if resident[place] else place for place, first in firsts]
        self._exchange.start(resident, plan.loaders, next_pass, weights)

    def stop(self) -> None:
        """Stop the Loading Agents, and hand all prefetched shards to the Daemon."""
        self._exchange.reset(self._memory.wake)

    def recover(self) -> None:
        """After a failed pass: throw away prefetched shards; the next call begins with its first shard."""
        self.stop()
        self._wait_freed()

    def with_lent(self, needs: Needs) -> Needs:
        """The needs of a pass, with the outputs that callers keep meanwhile."""
        return replace(needs, pass_bytes=needs.pass_bytes + max(self._lent.nbytes, needs.lent_bytes), lent_bytes=0)

    def _clear_for(self, plan: Plan) -> None:
        """Stop the Loading Agents, and free all memory that has no place in the new plan."""
        self.stop()
        before, residents = self._memory.plan, self._exchange.residents
        for index, loaded in residents.shards.items():
            shard = self._manifest.shards[index]
            packed = loaded.buffer is None and shard.nbytes > 0 and not shard.packed
            # Shards that share their weights have reserved other bytes where they are to be packed.
            reserves_other = loaded.shared is not None and plan.packed != before.packed
            unfit = plan.threads != before.threads or (packed and not plan.packed) or reserves_other
            if shard.name not in plan.resident or unfit:
                residents.drop(index)
        self._wait_freed()
        for index in residents.parts:
            name = self._manifest.shards[index].name
            if plan.partly_resident.get(name) != before.partly_resident.get(name):
                self._memory.release(residents.forget(index))
        if self._exchange.closed:
            raise ClosedError("The model was closed during the call.")

    def _wait_freed(self) -> None:
        """Wait until only resident shards, the weights that they share, and kept parts hold reservations."""
        residents, memory, shared = self._exchange.residents, self._memory, self._memory.shared
        expected = sum(loaded.reserved_bytes for loaded in residents.shards.values())
        expected += sum(part.buffer.nbytes for parts in residents.parts.values() for part in parts)
        self._exchange.wait_freed(lambda: memory.reserved_bytes == expected + shared.reserved_bytes)
