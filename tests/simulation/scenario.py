"""One run's facts: the model, the budget, the calls, the acts of others, and the faults. Drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from tests.simulation.models import KINDS, Kind

__all__ = ["LEVELS", "Act", "Ask", "Scenario", "draw"]

LEVELS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 1.0)
"""Budgets: from one buffer for the largest shard to packed copies of all."""
_PLACES = (
    "open",
    "read",
    "short read",
    "bit flip",
    "memory",
    "session",
    "session memory",
    "run",
    "run memory",
    "unmap",
    "figures",
    "recovery",
    "free",
    "thread",
    "progress",
    "exit",
    "close inside",
)
"""Where faults may occur."""


@dataclass(frozen=True)
class Ask:
    """One call of a caller.

    Attributes:
        after_s: it waits before it calls.
        rows: of its inputs.
        length: of each row.
        joins: its rows may share a batch.
        more_bytes: needs of the pass beyond the usual.
    """

    after_s: float
    rows: int
    length: int
    joins: bool = False
    more_bytes: int = 0


@dataclass(frozen=True)
class Act:
    """What another thread does, once the run has had some steps.

    Attributes:
        step: not before this one.
        what: close the pipeline; change its budget to a level, or to a budget that is too small (-1) or to the free
            memory (-2); let a caller leave; interrupt it; change the free memory, or the host's own.
        which: the level, or the number of the caller, or kilobytes.
    """

    step: int
    what: Literal["close", "budget", "leave", "interrupt", "free", "host"]
    which: float = 0


@dataclass(frozen=True)
class Scenario:
    """See the module.

    Attributes:
        kind, shards: of the model.
        loaders: Loading Agents; None lets the planner choose.
        level: of the first budget; see `LEVELS`.
        auto: the first budget is the free memory, which has that level.
        packs: packing pays.
        learns: the replanner learns from the passes' times.
        callers: the calls of each.
        acts: see there.
        rates: place -> how often it fails.
        latency_s: of a read.
        slow_after_s: from then on the disk takes a hundred times as long.
        fresh: every read is hashed.
        run_s: of a shard.
        policy: "any": at each step a thread is drawn with probability `p`; "priorities": the thread of the highest
            priority runs, and priorities change at some steps.
        p: see above.
        hurry: how often a wait ends early.
        lines: lines of pipeline/ are steps too.
    """

    kind: Kind = "plain"
    shards: int = 3
    loaders: int | None = 2
    level: float = 0.0
    auto: bool = False
    packs: bool = False
    learns: bool = False
    callers: tuple[tuple[Ask, ...], ...] = ()
    acts: tuple[Act, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)
    latency_s: float = 1e-3
    slow_after_s: float | None = None
    fresh: bool = False
    run_s: float = 1e-3
    policy: Literal["any", "priorities"] = "any"
    p: float = 0.2
    hurry: float = 0.0
    lines: bool = False


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = random.Random(f"scenario {seed}")
    callers = tuple(
        tuple(
            Ask(
                after_s=rng.choice([0.0, 0.0, 1e-3, 1e-2, 1.5]),
                rows=rng.randint(1, 3),
                length=rng.randint(1, 4),
                joins=rng.random() < 0.4,
                more_bytes=rng.choice([0, 0, 0, 60_000, 400_000]),
            )
            for _ in range(rng.randint(1, 3))
        )
        for _ in range(rng.randint(1, 4))
    )
    acts: list[Act] = []
    # What happens at the same time is most likely to go wrong.
    middle = rng.randint(0, 800) if rng.random() < 0.5 else None
    width = rng.choice([40, 150, 400])
    for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4])):
        what = rng.choice(["close", "budget", "budget", "budget", "leave", "interrupt", "free", "host"])
        which = {
            "close": lambda: 0,
            "budget": lambda: rng.choice([*LEVELS, *LEVELS, -1, -2]),
            "leave": lambda: rng.randrange(len(callers)),
            "interrupt": lambda: rng.randrange(len(callers)),
            "free": lambda: rng.choice(LEVELS),
            "host": lambda: rng.choice([-100, 100, 300, 1000]),
        }[what]()
        step = (
            rng.choice([rng.randint(0, 60), rng.randint(0, 1500)]) if middle is None else middle + rng.randint(0, width)
        )
        acts.append(Act(step, what, which))
    # Half of the runs have no fault: there every call must be answered.
    rates = {}
    if rng.random() < 0.5:
        for place in rng.sample(_PLACES, rng.randint(1, 3)):
            rates[place] = rng.choice([0.01, 0.05, 0.3])
    lines = rng.random() < 0.1
    return Scenario(
        kind=rng.choice(KINDS),
        shards=rng.randint(1, 8),
        loaders=rng.choice([1, 2, 2, 3, None]),
        level=rng.choice(LEVELS),
        auto=rng.random() < 0.15,
        packs=rng.random() < 0.4,
        learns=rng.random() < 0.15,
        callers=callers,
        acts=tuple(acts),
        rates=rates,
        latency_s=rng.choice([1e-5, 3e-4, 3e-3]),
        slow_after_s=rng.choice([None, None, 0.0, 0.02]),
        fresh=rng.random() < 0.5,
        run_s=rng.choice([1e-5, 3e-4, 3e-3]),
        policy=rng.choice(["any", "any", "priorities"]),
        p=0.03 if lines else rng.choice([0.05, 0.2, 0.6]),
        hurry=rng.choice([0.0, 0.0, 0.002, 0.02]),
        lines=lines,
    )
