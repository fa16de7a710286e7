"""Every schedule of the smallest systems, within a bound on delays.

All interleavings would be too many: a run has about two hundred steps of seven threads. So each schedule departs from
a fixed one at a bounded number of places ("Delay-Bounded Scheduling", Emmi, Qadeer, Rakamaric, 2011): the thread that
runs goes on until it waits, then the next one in turn runs; a *delay* at a step lets the next one in turn go first.
All schedules with at most this many delays (`--delays`; one more without an act) are run, at any steps. With an act
(close, leave, another budget), they are run with the act at every step: its thread runs at once, which counts as no
delay.

Steps are operations on the locks of exchange, reservations, residents, calls and futures, waits, starts and ends of
threads, and the beginning of each load, session and run. The locks of leaves (trace, buffers, stamps, shares) are
none: what they guard is no other's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tests.simulation.run import Outcome, run
from tests.simulation.scenario import Act, Ask, Scenario
from tests.simulation.scheduler import SimulatedThread

__all__ = ["SYSTEMS", "schedules"]

_LEAVES = frozenset({"trace", "memory", "buffers", "stamps", "shares", "loader", "shared_weights"})


class Delays:
    """The fixed schedule, but for delays.

    Args:
        delays: numbers of the choices at which the next thread in turn goes first.

    Attributes:
        choices: places so far where more than one thread could run.
        steps: until callers and others had ended.
    """

    def __init__(self, delays: Sequence[int]) -> None:
        self._delays = frozenset(delays)
        self._last = 0
        self.choices = 0
        self.steps = 0

    def next(self, runnable: Sequence[SimulatedThread], current: SimulatedThread | None) -> SimulatedThread:
        chosen = next((thread for thread in runnable if thread.name.startswith("act-")), runnable[0])
        if len(runnable) > 1 and not chosen.name.startswith("act-"):
            order = sorted(runnable, key=lambda thread: (thread.number - self._last) % _MOST_THREADS)
            if self.steps:
                chosen = order[0]
            else:
                chosen = order[self.choices in self._delays]
                self.choices += 1
        self._last = chosen.number
        return chosen

    def hurries(self) -> bool:
        return False

    def settled(self, step: int) -> None:
        self.steps = step


_MOST_THREADS = 1000
_ALL = slice(None)


def _systems() -> Iterator[tuple[str, Scenario]]:
    ask = (Ask(0.0, 1, 1),)
    layouts = {"streamed": (0.0, 1.0), "partly resident": (0.25, 0.0), "resident": (1.0, 0.0)}
    for layout, (level, other) in layouts.items():
        system = Scenario(kind="parts", shards=3, loaders=2, level=level, callers=(ask, ask), latency_s=0.0, run_s=0.0)
        yield layout, system
        for act in (Act(0, "close"), Act(0, "leave", 0), Act(0, "budget", other)):
            yield f"{layout}, {act.what}", replace(system, acts=(act,))


SYSTEMS = dict(_systems())
"""Name -> two Loading Agents, three shards, two calls, and at most one act."""


def schedules(
    scenario: Scenario,
    delays: int,
    seen: Callable[[Scenario, Sequence[int], Outcome], None],
    part: int = 0,
    parts: int = 1,
) -> int:
    """Run every schedule of a system. Returns their number.

    Args:
        scenario: of `SYSTEMS`.
        delays: at most this many in a schedule.
        seen: called with the scenario (whose act has its step), the delays, and the outcome.
        part: of them, run only these, from 0 on; by steps of the act, or by the first delay.
        parts: there are.
    """
    count = 0

    def explore(at_step: Scenario, chosen: tuple[int, ...], places: slice = _ALL) -> int:
        """Run one schedule, and those that have further delays behind its own. Returns its steps."""
        nonlocal count
        choice = Delays(chosen)
        outcome = run(at_step, 0, choice=choice, leaves=_LEAVES)
        count += 1
        seen(at_step, chosen, outcome)
        if len(chosen) < delays:
            for place in range(chosen[-1] + 1 if chosen else 0, choice.choices)[places]:
                explore(at_step, (*chosen, place))
        return choice.steps

    if not scenario.acts:
        explore(scenario, (), slice(part, None, parts))
        # Each part has run the one without delays.
        return count - (part > 0)
    step, steps = part, part + 1
    while step < steps:
        acts = tuple(replace(act, step=step) for act in scenario.acts)
        steps = explore(replace(scenario, acts=acts), ())
        step += parts
    return count
