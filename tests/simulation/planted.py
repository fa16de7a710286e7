"""Faults that the engine once had, put back: a simulation that does not find them proves nothing.

- `spin`: the recovery after a call that was closed fails, and the walk through the error's chain never ends, since that
  leads back to itself.
- `iterate`: what is kept is summed up without the lock, while Loading Agents that a close has overtaken add to it.
- `leak`: a shard's bytes are released only after memory was given back, which may fail.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tests.simulation.primitives import RUNNING
from tests.simulation.run import run
from tests.simulation.scenario import Act, Ask, Scenario, draw

from pipeload.errors import ClosedError
from pipeload.pipeline import agents
from pipeload.pipeline.room import Room
from pipeload.pipeline.weights_memory import WeightsMemory

__all__ = ["PLANTED", "Planted"]


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A fault that is put back.

    Attributes:
        fault: in words.
        owner, name: the function that is replaced.
        stand_in: the faulty one.
        changes: makes a seed's scenario one in which the fault can show.
        found_by: a seed that finds it.
    """

    fault: str
    owner: Any
    name: str
    stand_in: Callable[..., object]
    changes: Callable[[Scenario, random.Random], Scenario]
    found_by: int

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """The engine has the fault while the context is open; the seam is installed."""
        before = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.stand_in)
        try:
            yield
        finally:
            setattr(self.owner, self.name, before)

    def finds(self, seed: int) -> bool:
        """Whether the run of a seed fails with the fault, and does not without it."""
        scenario = self.changes(draw(seed), random.Random(f"planted {seed}"))
        with self.put_back():
            failed = run(scenario, seed).failure is not None
        return failed and run(scenario, seed).failure is None


def _answer(exchange: Any, call: Any, outcome: object) -> None:
    waits = call.outcome.set_running_or_notify_cancel()
    if not isinstance(outcome, BaseException):
        if waits:
            call.outcome.set_result(outcome)
        return
    if isinstance(outcome, ClosedError) and exchange.cause is not None:
        outcome.__cause__ = exchange.cause
    link: BaseException | None = outcome
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    if waits:
        call.outcome.set_exception(outcome)


def _wait_freed(self: Any) -> None:
    residents, memory = self._exchange.residents, self._memory
    expected = sum(loaded.reserved_bytes for loaded in residents.shards.values())
    for parts in residents._parts.values():
        # Here the interpreter may let other threads run, for some milliseconds.
        RUNNING.scheduler.sleep("iterate", 5e-3)
        expected += sum(part.buffer.nbytes for part in parts)
    self._exchange.wait_freed(lambda: memory.reserved_bytes == expected + memory.shared.reserved_bytes)


def _free(self: Any, shard: Any, signal_memory: Callable[[bool], None]) -> None:
    freed_bytes = shard.reserved_bytes
    shard.session = None
    buffer, shard.buffer = shard.buffer, None
    if buffer is not None:
        if shard.pooled:
            self._pool.give(buffer)
        elif shard.shared is None:
            buffer.close()
        elif (left_bytes := self.shared.leave(shard.shared)) is not None:
            freed_bytes += left_bytes
            buffer.close()
    if self._is_short():
        signal_memory(True)
        self.give_back()
        signal_memory(False)
    self.reservations.release(freed_bytes)
    self.sessions.release(shard.session_bytes)


def _failing(**rates: float) -> Callable[[Scenario, random.Random], Scenario]:
    return lambda scenario, _: replace(scenario, rates={**scenario.rates, **rates})


def _closed_early(scenario: Scenario, rng: random.Random) -> Scenario:
    """The budget of partly resident shards changes before the first call, and then the pipeline is closed."""
    step = rng.randint(40, 250)
    return replace(
        scenario,
        kind="parts",
        level=rng.choice([0.1, 0.2, 0.25]),
        callers=((Ask(1.5, 1, 1),),),
        acts=(Act(step, "budget", 1.0), Act(step + rng.randint(1, 40), "close")),
    )


PLANTED = {
    "spin": Planted(
        fault="an error whose chain leads back to itself is walked for ever, after a recovery that fails",
        owner=agents,
        name="answer",
        stand_in=_answer,
        changes=_failing(recovery=0.5),
        found_by=3,
    ),
    "iterate": Planted(
        fault="kept parts are summed up while Loading Agents add to them, after a close",
        owner=Room,
        name="_wait_freed",
        stand_in=_wait_freed,
        changes=_closed_early,
        found_by=5,
    ),
    "leak": Planted(
        fault="bytes are released after a step that may raise",
        owner=WeightsMemory,
        name="free",
        stand_in=_free,
        changes=_failing(arena=0.3),
        found_by=18,
    ),
}
