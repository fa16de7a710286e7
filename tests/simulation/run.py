"""One run: a pipeline, its callers, and others who close it, change its budget or take its memory, under one schedule.

Held at every step:

- The reservations of weights and of sessions are never below nothing, and never above their limits.
- The buffers and sessions that exist take no more memory than the plan in force has for weights and packing.
- For each call, the shards run in order.
- No thread waits for ever, and none spins.

Held at the end of each call and of the run:

- A call has the right answer, or an error of pipeload whose causes are faults that the run has made, or a caller's own.
- After a failure the pipeline answers again, or is closed for good, with a cause.
- After `close`, no agent lives, nothing is reserved, no buffer, session or file is left, and calls are refused.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import numpy as np
from tests.simulation import choices
from tests.simulation.machine import DIRECTORY, Faults, Machine
from tests.simulation.models import Model, make_model
from tests.simulation.primitives import RUNNING
from tests.simulation.scenario import Act, Ask, Scenario
from tests.simulation.scheduler import Choice, Failure, Scheduler, SimulatedThread
from tests.simulation.seam import make_machine_current
from tests.simulation.sessions import Sessions, SimulatedSession

from pipeload.errors import BudgetError, ClosedError, LoadError, PipeloadError, RunError, ShardError
from pipeload.foreign import chain
from pipeload.pipeline.callers import Caller
from pipeload.pipeline.joining import Joins, Padding, Rows
from pipeload.pipeline.pipeline import Pipeline
from pipeload.pipeline.session import to_array, to_value
from pipeload.pipeline.sweep import Feed
from pipeload.planning import planner
from pipeload.planning.footprint import least_bytes, session_bytes, whole_bytes
from pipeload.planning.needs import Needs
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.replanner import Replanner
from pipeload.storage.weights import GraphFile, Storage

__all__ = ["Outcome", "run"]

_PASS_BYTES = 200_000
_PROCESS_BYTES = 1_000_000
_AMPLE_BYTES = 10**12
_TRIES = 4
"""A fault of packing, or of a shard that was read ahead, is raised in the next call: so many may still fail."""
_LEAVES = frozenset({"trace", "memory", "buffers", "stamps", "shares"})
"""Locks of these modules are leaves: what they guard is no other's. They are steps only in runs with lines."""


class Injected(Exception):  # noqa: N818 - a caller's own
    """Raised by a caller's progress callback."""


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        failure: the promise that was broken, with its circumstances; None where all were kept.
        steps: of the schedule.
        log: thread and operation of each, if they were kept.
        ends: how calls ended -> how many.
        faults: place -> faults made.
    """

    failure: str | None
    steps: int
    log: list[tuple[str, str]]
    ends: Counter[str]
    faults: Counter[str]


def run(
    scenario: Scenario,
    seed: int,
    *,
    choice: Choice | None = None,
    keep_steps: bool = False,
    leaves: frozenset[str] = _LEAVES,
) -> Outcome:
    """Run a scenario under the schedule of a seed, or of another choice; the seam is installed.

    Args:
        scenario: see there.
        seed: of the schedule, the disk and the faults.
        choice: decides the schedule in the seed's place.
        keep_steps: keep the log.
        leaves: modules whose locks are no steps.
    """
    return _Run(scenario, seed, choice, keep_steps=keep_steps, leaves=leaves).outcome()


class _SimulatedStorage(Storage):
    """The engine's storage, but for the graphs: sessions of a simulation need none."""

    machine: Machine

    def graph(self, shard: Any) -> Any:
        return _Graph(self.machine)


class _Graph:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __enter__(self) -> GraphFile:
        self._machine.wait("graph")
        return GraphFile(DIRECTORY / "graph.onnx")

    def __exit__(self, *_: object) -> None:
        pass


class _Run:
    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        choice: Choice | None,
        *,
        keep_steps: bool,
        leaves: frozenset[str],
    ) -> None:
        self.scenario = scenario
        self.model = make_model(scenario.kind, scenario.shards)
        self.random = random.Random(f"world {seed}")
        self.faults = Faults(random.Random(f"faults {seed}"), scenario.rates)
        self.profile = _profile_of(self.model, scenario)
        process_bytes = planner.process_bytes(self.profile)
        self.machine = Machine(
            self.model.files,
            random.Random(f"machine {seed}"),
            self.faults,
            latency_s=scenario.latency_s,
            slow_after_s=scenario.slow_after_s,
            fresh=scenario.fresh,
            process_bytes=process_bytes,
            free_bytes=self.budget(scenario.level) if scenario.auto else _AMPLE_BYTES,
        )
        rng = random.Random(f"schedule {seed}")
        if choice is None:
            if scenario.policy == "any":
                choice = choices.Any(rng, scenario.p, scenario.hurry)
            else:
                choice = choices.Priorities(rng, scenario.hurry)
        self.choice = choice
        self.scheduler = Scheduler(
            choice,
            self.check,
            keep_steps=keep_steps,
            lines=_is_of_pipeline if scenario.lines else None,
            most_steps=600_000 if scenario.lines else 60_000,
        )
        self.quiet = lambda name: name in leaves and not scenario.lines
        self.pipeline: Pipeline | None = None
        self.plans: list[Any] = []
        self.closing = False
        self.squeezed = scenario.auto
        self.left: set[int] = set()
        self.callers: list[Caller | None] = [None] * len(scenario.callers)
        self.caller_threads: list[SimulatedThread] = []
        self.ends: Counter[str] = Counter()

    def outcome(self) -> Outcome:
        RUNNING.scheduler, RUNNING.quiet, RUNNING.may_start = self.scheduler, self.quiet, self.machine.may_start
        make_machine_current(self.machine)
        sessions = Sessions(self.machine, self.scenario.run_s)
        SimulatedSession.sessions = lambda: sessions
        self.scheduler.run(self.main)
        scheduler = self.scheduler
        return Outcome(scheduler.failure, scheduler.steps, scheduler.log or [], self.ends, self.faults.made)

    def budget(self, level: float) -> int:
        """Bytes of the process that leave this level of room for weights."""
        shards = self.model.manifest.shards
        least = least_bytes(shards, 1)
        most = 2 * sum(whole_bytes(shard) + session_bytes(shard, 1) for shard in shards) + least
        weights = least + level * (most - least)
        return planner.process_bytes(self.profile) + _PASS_BYTES + int(weights / 0.995) + 2

    # At every step

    def check(self) -> None:
        pipeline = self.pipeline
        if pipeline is None:
            return
        memory = pipeline._memory
        for kind, reservations in (("weights", memory.reservations), ("sessions", memory.sessions)):
            reserved, limit = reservations._reserved_bytes, reservations._limit_bytes
            if not 0 <= reserved <= limit:
                raise Failure(f"reserved for {kind}: {reserved} bytes, and the plan has {limit}")
        used = self.machine.memory.used
        if used > max(plan.weights_bytes + plan.packing_bytes for plan in self.plans):
            plan = self.plans[-1]
            raise Failure(
                f"buffers and sessions take {used} bytes, and the plan has {plan.weights_bytes} for weights and "
                f"{plan.packing_bytes} for packing; reserved: {memory.reserved_bytes}"
            )

    # The main thread

    def main(self) -> None:
        scenario, machine = self.scenario, self.machine
        pipeline = self.open()
        if pipeline is None:
            self.check_gone()
            return
        threads = [self.begin(lambda n=n: self.call_all(n), f"caller-{n}") for n in range(len(scenario.callers))]
        self.caller_threads = threads[:]
        threads += [
            self.begin(lambda act=act: self.act(act), f"act-{n}", act.step) for n, act in enumerate(scenario.acts)
        ]
        for thread in threads:
            if not thread.ended:
                self.scheduler.wait(f"join {thread.name}", thread, None)
        self.choice.settled(self.scheduler.steps)
        self.faults.on = False
        machine.free_bytes = _AMPLE_BYTES
        machine.memory.process_bytes = planner.process_bytes(self.profile)
        self.check_works(pipeline)
        self.closing = True
        pipeline.close()
        self.check_closed(pipeline)

    def open(self) -> Pipeline | None:
        scenario = self.scenario
        storage = _SimulatedStorage(DIRECTORY, self.model.manifest)
        storage.machine = self.machine
        kind = Replanner if scenario.learns else _Unlearning
        replanner = kind(
            self.model.manifest,
            self.profile,
            budget_bytes=None if scenario.auto else self.budget(scenario.level),
            free_bytes=self.free_bytes,
            loaders=scenario.loaders,
            threads=1,
        )
        self.faults.on = False
        plan = replanner.plan(Needs(pass_bytes=_PASS_BYTES))
        self.faults.on = True
        self.plans = [plan]
        try:
            pipeline = Pipeline(self.model.manifest, storage, plan, replanner, self.progress)
        except BaseException as error:
            self.check_error(error, "open")
            if not isinstance(error, LoadError):
                raise
            return None
        self.pipeline = pipeline
        memory, follow = pipeline._memory, pipeline._memory.follow

        def followed(plan: Any) -> None:
            # Until it returns, memory of the plan before may be in use.
            self.plans.append(plan)
            follow(plan)
            self.plans = [memory.plan]

        memory.follow = followed  # type: ignore[method-assign]
        return pipeline

    def begin(self, target: Callable[[], object], name: str, step: int = 0) -> SimulatedThread:
        thread = SimulatedThread(self.scheduler, target, name)
        thread.after_step = step
        thread.begin()
        return thread

    def free_bytes(self) -> int:
        self.faults.may_raise("free", lambda: OSError(24, "Too many open files"))
        return self.machine.free()

    def progress(self, progress: Any) -> None:
        self.faults.may_raise("progress", Injected)
        self.faults.may_raise("exit", lambda: SystemExit(3))
        if self.pipeline is not None and self.faults.occurs("close inside"):
            # As the garbage collector may, in an agent's own thread: another one does the joining.
            self.closing = True
            self.pipeline.close()

    # Callers

    def call_all(self, number: int) -> None:
        pipeline = self.pipeline
        assert pipeline is not None
        with Caller() as caller:
            self.callers[number] = caller
            for ask in self.scenario.callers[number]:
                if ask.after_s:
                    self.scheduler.sleep("caller waits", ask.after_s)
                self.ends[self.call(pipeline, ask, number)] += 1

    def call(self, pipeline: Pipeline, ask: Ask, number: int | None) -> str:
        """One call. Returns how it ended."""
        rng = self.random
        ids = np.array([[rng.randrange(16) for _ in range(ask.length)] for _ in range(ask.rows)], np.int64)
        needs = Needs(pass_bytes=_PASS_BYTES + ask.more_bytes)
        rows = _rows(ask, needs) if ask.joins else None
        try:
            feed = Feed(pieces=[{"ids": to_value(ids)}])
            found = to_array(pipeline.submit(feed, needs, rows=rows).result()["last"])
        except BaseException as error:
            if self.scheduler.failed:
                raise
            self.check_error(error, "call", number, may_exceed=bool(ask.more_bytes))
            return type(error).__name__
        expected = self.model.answer(ids)
        if found.shape != expected.shape or (found != expected).any():
            raise Failure(f"the answer to {ids.tolist()} is {found.tolist()}, and not {expected.tolist()}")
        return "answered"

    def check_error(
        self, error: BaseException, what: str, number: int | None = None, *, may_exceed: bool = False
    ) -> None:
        """Raise a Failure unless the error may end this call."""
        for link in chain(error):
            ours = isinstance(link, PipeloadError | CancelledError | Injected | KeyboardInterrupt)
            # A parser's own word on bytes that have flipped.
            ours = ours or (isinstance(link, ValueError | LookupError) and bool(self.faults.made["bit flip"]))
            if not ours and not any(link is made or type(link) is type(made) for made in self.faults.errors):
                raise Failure(f"{what} ended with {error!r}, and in its chain is {link!r}") from link
        if isinstance(error, PipeloadError):
            if isinstance(error, ClosedError):
                fine = self.closing or number in self.left or (self.closed_by_fault() if self.pipeline else False)
            elif isinstance(error, BudgetError):
                fine = self.squeezed or may_exceed
            elif isinstance(error, LoadError | ShardError | RunError):
                fine = bool(self.faults.made)
            else:
                fine = False
            if not fine:
                raise Failure(f"{what} ended with {error!r}, and nothing has brought that about") from error
        elif isinstance(error, KeyboardInterrupt):
            if number not in self.left:
                raise Failure(f"{what} was interrupted") from error
        elif not isinstance(error, Injected | SystemExit):
            raise Failure(f"{what} ended with a foreign error: {error!r}") from error

    def closed_by_fault(self) -> bool:
        assert self.pipeline is not None
        exchange = self.pipeline._exchange
        return exchange.closed and exchange.cause is not None and bool(self.faults.made)

    # Others

    def act(self, act: Act) -> None:
        pipeline, which = self.pipeline, int(act.which)
        assert pipeline is not None
        if act.what == "close":
            self.closing = True
            pipeline.close()
            self.check_closed(pipeline)
        elif act.what == "budget":
            self.set_budget(pipeline, act.which)
        elif act.what == "free":
            self.squeezed = True
            self.machine.free_bytes = self.budget(act.which)
        elif act.what == "host":
            self.squeezed = True
            self.machine.memory.process_bytes += which * 1000
        elif which < len(self.callers):
            caller, thread = self.callers[which], self.caller_threads[which]
            if act.what == "leave" and caller is not None:
                self.left.add(which)
                caller.leave()
            elif act.what == "interrupt" and "future" in str(thread.waits_for):
                self.left.add(which)
                thread.interrupted = True
                self.scheduler.wake(thread)

    def set_budget(self, pipeline: Pipeline, level: float) -> None:
        budget = None if level == -2 else self.budget(0.0) - 200_000 if level == -1 else self.budget(level)
        # Until it returns, and where it raises, the one before is in force; a pass of other needs may not fit.
        self.squeezed = True
        try:
            pipeline.set_budget(budget)
        except BaseException as error:
            if self.scheduler.failed:
                raise
            self.check_error(error, "set_budget")
            self.ends[f"set_budget: {type(error).__name__}"] += 1
        else:
            self.ends["set_budget"] += 1

    # At the end

    def check_works(self, pipeline: Pipeline) -> None:
        """The pipeline answers, or is closed for good."""
        ends = [self.call(pipeline, Ask(0.0, 1, 2), None)]
        while ends[-1] not in ("answered", "ClosedError") and len(ends) < _TRIES:
            ends.append(self.call(pipeline, Ask(0.0, 1, 2), None))
        if ends[-1] == "answered":
            return
        if not pipeline._exchange.closed or self.call(pipeline, Ask(0.0, 1, 2), None) != "ClosedError":
            raise Failure(f"the last calls ended with {ends}: the pipeline neither answers nor is it closed")

    def check_closed(self, pipeline: Pipeline) -> None:
        agents = [thread for thread in self.scheduler.threads if thread.name.startswith("pipeload-")]
        living = [one.name for one in agents if not one.ended and one.name != "pipeload-closer"]
        if living:
            raise Failure(f"after close, these threads live: {living}")
        if self.call(pipeline, Ask(0.0, 1, 1), None) != "ClosedError":
            raise Failure("a closed pipeline answers")
        memory = pipeline._memory
        if memory.reserved_bytes or memory.shared._uses or memory._pool.idle_bytes:
            raise Failure(
                f"after close, {memory.reserved_bytes} bytes are reserved, "
                f"{memory._pool.idle_bytes} bytes of buffers are idle, shared: {memory.shared._uses}"
            )
        self.check_gone()

    def check_gone(self) -> None:
        if self.machine.memory.used:
            raise Failure(f"{self.machine.memory.used} bytes of buffers and sessions are left")
        if self.machine.open_files:
            raise Failure(f"files are left open: {self.machine.open_files}")


class _Unlearning(Replanner):
    """Its plans depend on budgets, memory and needs alone."""

    def after_pass(self, *_: object) -> bool:
        return False


def _profile_of(model: Model, scenario: Scenario) -> Profile:
    run_s = max(scenario.run_s, 1e-6)
    packed_s = run_s / 2 if scenario.packs else run_s
    times = ShardTimes(session_s=run_s / 2, run_s=run_s, loading_run_s=run_s, pack_s=3 * run_s, packed_run_s=packed_s)
    bandwidth = 12_000 / max(scenario.latency_s, 1e-6)
    return Profile(
        process_bytes=_PROCESS_BYTES,
        cores=2,
        runtime_bytes=planner.LEAST_RUNTIME_BYTES,
        read_bytes_per_s={1: bandwidth, 2: 1.5 * bandwidth, 3: 1.6 * bandwidth},
        times={1: dict.fromkeys([shard.name for shard in model.manifest.shards], times)},
    )


def _rows(ask: Ask, needs: Needs) -> Rows:
    return Rows(
        count=ask.rows,
        length=ask.length,
        padding=Padding(fills=(("ids", 0),), left=False),
        joins=Joins(rows="batch", length="length", axes={"last": (1,)}),
        needs_of=lambda *_: (needs, None),
        output_bytes=8 * ask.rows * ask.length,
    )


def _is_of_pipeline(file: str) -> bool:
    return "/pipeload/pipeline/" in file and not file.endswith("session.py")
