"""A range of shards on a node: a Dask actor, which calls the actor of the next stage with what it has made."""

from __future__ import annotations

import asyncio
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from math import log2
from typing import Any, TypeVar

import numpy as np
from distributed import Status, get_worker

from pipeload.cluster.links import PIECE_BYTES
from pipeload.cluster.messages import DisconnectedError, Job, NodeLostError, Place, Text, TextLostError, call
from pipeload.cluster.offer import OFFER
from pipeload.decode import DecodeState
from pipeload.errors import ClosedError, ClusterError, PipeloadError
from pipeload.foreign import let_go
from pipeload.format.caches import growth, past_symbols
from pipeload.format.manifest import symbols
from pipeload.inputs import Arrays
from pipeload.machine.cores import spelled
from pipeload.model import Model, load
from pipeload.pipeline.callers import Caller
from pipeload.planning import planner

__all__ = ["Stage"]

_CALLERS = 16
"""Calls that run or wait in the stage's model at once: those that wait share its next sweep."""
_ANSWERS = 256
"""Answers whose caller has not come for them; and as many calls whose caller has left."""
_LEAST_S = 1e-6
_SIZES = 4
"""Messages count as of one size in this many steps from a size to twice as many bytes."""

_Made = TypeVar("_Made")


@dataclass(slots=True, kw_only=True)
class _Slot:
    """The caches of one batch of growing texts here.

    Attributes:
        route: of the ring that they belong to.
        state: the model's.
        step: number of the latest step that has begun.
        busy: a piece runs.
        failed: a piece has; the caches are of no use any more.
        caller: of its pieces, who leaves when the caches are closed.
        copying: fills the caches from those of other stages; None where they were computed here.
        changed: notified when one of these has changed.
    """

    route: str
    state: DecodeState
    step: int = -1
    busy: bool = False
    failed: bool = False
    caller: Caller = field(default_factory=Caller)
    copying: asyncio.Future[None] | None = None
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def has_turn(self, job: Job) -> bool:
        """Whether a piece may run: pieces of a step run one after another, and steps do."""
        if self.failed:
            return True
        if self.busy:
            return False
        return self.step < job.step if job.first else (self.step, self.state.length) == (job.step, job.past)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """Where the arrays of a ring's calls go.

    Attributes:
        following: the next stage; None for the last one.
        passes: names of the arrays that leave this one.
    """

    following: Place | None
    passes: frozenset[str]


class Stage:
    """A stage of a model on this node.

    It may belong to several rings at a time: while a model moves, stages that stay where they are belong to the ring
    before and to the one after. Each has a route, which calls name.

    Args:
        sha256: of the model's manifest.
        name: the model's, for `pipeload cluster status`.
        shards: its first and last shard, as `pipeload.load` takes them.

    Raises:
        PipeloadError: as `pipeload.load`; ShardError also where the node has no such model.
    """

    def __init__(self, sha256: str, name: str, shards: str) -> None:
        self._worker = get_worker()
        self._node = self._worker.extensions[OFFER]
        directory, _ = self._node.model(sha256)
        self._model: Model = load(
            directory, self._node.budget, shards=shards, draft=None, profile=self._node.known_speed(sha256)
        )
        self._takes = [spec.name for spec in self._model.inputs]
        self._caches = self._model.manifest.cache_inputs
        past = past_symbols(self._model.manifest)
        # A mask over all tokens grows with each of them.
        self._grown = {spec.name for spec in self._model.inputs if any(past & set(symbols(dim)) for dim in spec.shape)}
        self._made = [spec.name for spec in self._model.outputs]
        self._threads = ThreadPoolExecutor(_CALLERS, "pipeload-stage")
        self._slots: dict[str, _Slot] = {}
        self._callers: dict[str, Caller] = {}
        self._answers: OrderedDict[str, asyncio.Future[Any]] = OrderedDict()
        # Calls whose caller has left: a pass of one may come later, and keeps no answer.
        self._left: OrderedDict[str, None] = OrderedDict()
        self._ways: dict[str, _Way] = {}
        self._id = uuid.uuid4().hex
        self._pace = self._node.paces[sha256]
        times = planner.times_of(self._model.manifest, self._model.profile, self._model.plan.threads)
        self._expected_s = sum(one.run_s for one in times.values())
        self._timed_passes = 0
        self._calls: list[Hashable] = []
        self._facts: dict[str, Any] = {
            "model": name,
            "sha256": sha256,
            "shards": shards,
            "calls": 0,
            "waiting": 0,
            "run_s": 0.0,
            "read_s": 0.0,
            # Not measured yet.
            "slowness": None,
            "links": {},
            **self._cores(),
        }
        self._node.stages[self._id] = self._facts
        # A client that has gone closes nothing: then Dask drops the stage, and its model ends with it.
        weakref.finalize(self, self._node.stages.pop, self._id, None)

    async def follow(self, route: str, place: Place | None, passes: Sequence[str]) -> None:
        """Belong to a ring.

        Args:
            route: the ring's.
            place: its next stage; None for the last one.
            passes: names of the arrays that leave this one.
        """
        self._ways[route] = _Way(following=place, passes=frozenset(passes))

    async def part(self, route: str) -> None:
        """Belong to a ring no more, and give the memory of its caches back. May be called again."""
        self._ways.pop(route, None)
        for state in [state for state, slot in self._slots.items() if slot.route == route]:
            await self.end_state(state)

    async def run(self, route: str, number: str, arrays: Arrays) -> float:
        """One pass; it returns when the last stage has the answer, with the seconds since the call came here.

        Args:
            route: of the ring.
            number: of the call, for `answer`.
            arrays: graph inputs and edges that this stage and later ones take.
        """
        came_s = time.perf_counter()
        self._way(route)
        given = {name: array for name, array in arrays.items() if name in self._takes or name in self._caches}
        with self._caller(number) as caller:
            made = await self._in_thread(lambda: self._model.run(_usable(given)), _sizes(given), caller)
        await self._pass_on("run", route, number, arrays | made)
        return time.perf_counter() - came_s

    async def step(self, route: str, number: str, arrays: Arrays, job: Job) -> float:
        """One piece of a step; it returns as `run` does.

        Args:
            route: of the ring.
            number: of the call, for `answer`; only the last piece has one.
            arrays: as for `run`, without caches.
            job: see there.
        """
        came_s = time.perf_counter()
        given = {name: arrays[name] for name in self._takes}
        is_last = self._way(route).following is None
        async with self._turn(route, job) as slot:
            # Computing depends on the cached tokens too, though little.
            kind = _sizes({name: given[name] for name in given if name not in self._grown}), job.past.bit_length()
            made = await self._in_thread(
                lambda: self._step(slot.state, _usable(given), job, is_last), kind, slot.caller
            )
        await self._pass_on("step", route, number, made if is_last else arrays | made, job)
        return time.perf_counter() - came_s

    async def answer(self, number: str) -> Any:
        """The answer of a call, once it is there; of the last stage."""
        if number in self._left:
            raise _caller_left()
        try:
            return await self._answer(number)
        finally:
            self._answers.pop(number, None)

    async def forget(self, number: str) -> None:
        """There will be no answer of this call, or its caller has left: a pass of it ends at its next shard."""
        self._left[number] = None
        while len(self._left) > _ANSWERS:
            self._left.popitem(last=False)
        if (answer := self._answers.pop(number, None)) is not None:
            answer.cancel()
        if (caller := self._callers.get(number)) is not None:
            caller.leave()

    async def cached(self, state: str, name: str, begin: int, end: int) -> Arrays:
        """Tokens of a text's cache from `begin` to before `end`, by the name of the graph input.

        Raises:
            TextLostError: they are not there.
        """
        slot = self._slots.get(state)
        if slot is None or slot.busy or slot.failed or slot.state.closed or slot.state.length < end:
            raise TextLostError("The caches of a text are not there. Call again.")
        return {name: slot.state.cached(name, begin, end)}

    async def take(self, route: str, text: Text, sources: Sequence[tuple[Place, Sequence[str]]]) -> None:
        """Have the caches of a text from now on, for calls of a ring.

        Args:
            route: the ring's.
            text: see there.
            sources: the stages that have them, and names of graph inputs.

        Raises:
            BudgetError: there is no room for them.
            PipeloadError: as `call`.
        """
        self._way(route)
        if (known := self._slots.get(text.state)) is not None:
            # It has been in the ring before too.
            known.route = route
            return
        slot = self._slots[text.state] = _Slot(route=route, state=self._model.new_state(), busy=True)
        slot.copying = asyncio.ensure_future(self._copy(slot, text, sources))
        try:
            await asyncio.shield(slot.copying)
        except BaseException:
            await self.end_state(text.state)
            if slot.copying.cancelled():
                raise TextLostError("The caches of a text were closed while they were copied. Call again.") from None
            raise
        async with slot.changed:
            slot.busy = False
            slot.changed.notify_all()

    async def end_state(self, state: str) -> None:
        """Give the memory of a state's caches back. May be called again."""
        if (slot := self._slots.pop(state, None)) is not None:
            slot.caller.leave()
            await self._fail(slot)
            if slot.copying is not None:
                # Memory that is being written is in use.
                slot.copying.cancel()
                await asyncio.gather(slot.copying, return_exceptions=True)
            slot.state.close()

    async def close(self) -> None:
        """End running calls, close the model, and join its threads. May be called again."""
        self._node.stages.pop(self._id, None)
        for state in [*self._slots]:
            await self.end_state(state)
        for number in [*self._answers]:
            await self.forget(number)
        await asyncio.to_thread(self._model.close)
        await asyncio.to_thread(self._threads.shutdown)

    async def _copy(self, slot: _Slot, text: Text, sources: Sequence[tuple[Place, Sequence[str]]]) -> None:
        slot.state.expect(text.expected)
        held = await self._in_thread(lambda: self._model.hold(slot.state, text.dims, text.length), "hold", slot.caller)
        axis, _ = growth(self._model.manifest)
        for place, name in ((place, name) for place, names in sources for name in names):
            array = held[name].swapaxes(0, axis)
            size = max(1, PIECE_BYTES // max(1, array[:1].nbytes))
            for begin in range(0, text.length, size):
                end = min(begin + size, text.length)
                made = await call(self._worker.rpc, place, "cached", text.state, name, begin, end)
                array[begin:end] = made[name].swapaxes(0, axis)

    def _step(self, state: DecodeState, given: Arrays, job: Job, is_last: bool) -> Any:
        if state.length > job.past:
            state.truncate(job.past)
        if job.expected != state.expected:
            state.expect(job.expected)
        if is_last and job.top:
            return {"": self._model.step_top(given, state, job.top, positions=job.positions)}
        if is_last:
            return {"": np.ascontiguousarray(self._model.step(given, state, positions=job.positions))}
        return self._model.step_outputs(given, state)

    @asynccontextmanager
    async def _turn(self, route: str, job: Job) -> AsyncIterator[_Slot]:
        slot = self._slot(route, job)
        async with slot.changed:
            await slot.changed.wait_for(lambda: slot.has_turn(job))
            if slot.failed or slot.state.closed or slot.state.length < job.past:
                slot.failed = True
                raise TextLostError("The caches of a text are lost, since an earlier part of it failed. Call again.")
            slot.step, slot.busy = job.step, True
        try:
            yield slot
        except BaseException:
            await self._fail(slot)
            raise
        async with slot.changed:
            slot.busy = False
            slot.changed.notify_all()

    @contextmanager
    def _caller(self, number: str) -> Iterator[Caller]:
        """The caller of a pass that runs.

        Raises:
            ClosedError: it has left before.
        """
        if number in self._left:
            raise _caller_left()
        caller = self._callers[number] = Caller()
        try:
            yield caller
        finally:
            del self._callers[number]

    def _slot(self, route: str, job: Job) -> _Slot:
        if job.state not in self._slots:
            # Of a step of several pieces, another one than the first may arrive first.
            self._slots[job.state] = _Slot(route=route, state=self._model.new_state())
        return self._slots[job.state]

    @staticmethod
    async def _fail(slot: _Slot) -> None:
        async with slot.changed:
            slot.failed, slot.busy = True, False
            slot.changed.notify_all()

    async def _pass_on(self, method: str, route: str, number: str, arrays: Arrays, *job: Job) -> None:
        way = self._way(route)
        if way.following is None:
            answer = arrays[""] if job else {name: arrays[name] for name in arrays if name in way.passes}
            if number and number not in self._left and not (waiting := self._answer(number)).done():
                waiting.set_result(answer)
            return
        leaving = {name: array for name, array in arrays.items() if name in way.passes}
        left_s = time.perf_counter()
        try:
            there_s = await call(self._worker.rpc, way.following, method, route, number, leaving, *job)
        except ClusterError as error:
            # Where this node ends, its connections do: the next node is not lost.
            if self._ends or isinstance(error, DisconnectedError):
                raise self._ending() from None
            raise
        # The rest of the time was on the way: there with the arrays, and back without.
        sent_bytes, sent_s = sum(array.nbytes for array in leaving.values()), time.perf_counter() - left_s - there_s
        # A mask grows with each token.
        kind = round(_SIZES * log2(1 + sent_bytes))
        self._node.sends[way.following.address].note(kind, max(sent_s, _LEAST_S))
        followings = [each.following.address for each in self._ways.values() if each.following]
        self._facts["links"] = {address: self._node.sends[address].slowness for address in followings}

    def _way(self, route: str) -> _Way:
        if route not in self._ways:
            # Of a call whose caller has left.
            raise ClosedError("The model has left these stages. Call again.")
        return self._ways[route]

    def _answer(self, number: str) -> asyncio.Future[Any]:
        """What the call's answer will be in; whichever of its caller and the pass is first makes it."""
        if number not in self._answers:
            self._answers[number] = asyncio.get_running_loop().create_future()
            while len(self._answers) > _ANSWERS:
                self._answers.popitem(last=False)[1].cancel()
        return self._answers[number]

    @property
    def _ends(self) -> bool:
        """Whether this node has been told to end."""
        return self._worker.status not in (Status.running, Status.paused)

    def _ending(self) -> NodeLostError:
        """The error for a call that this node has when its user stops it: the call is tried on others."""
        address = self._worker.address
        return NodeLostError(
            f"The node {self._node.offer.name} at {address} was lost during the call: it ends.", address
        )

    async def _in_thread(self, run: Callable[[], _Made], kind: Hashable, caller: Caller) -> _Made:
        """Run a call in a thread.

        Args:
            run: the call.
            kind: equal for calls of the same sizes.
            caller: of the call.
        """

        def within() -> _Made:
            with caller:
                return run()

        self._calls.append(kind)
        self._facts["calls"] += 1
        self._facts["waiting"] = len(self._calls)
        try:
            made = await asyncio.get_running_loop().run_in_executor(self._threads, within)
            self._time(kind)
            return made
        except PipeloadError as error:
            if self._ends:
                # Its model was closed.
                raise self._ending() from None
            # It travels without its cause, which may be of a library that the caller has not.
            let_go(error)
            error.__cause__ = error.__context__ = None
            raise error.with_traceback(None) from None
        except RuntimeError as error:  # the threads are shut down
            if self._ends:
                raise self._ending() from None
            raise ClosedError("The stage is closed. Load the model again.") from error
        finally:
            self._calls.remove(kind)
            self._facts["waiting"] = len(self._calls)

    def _time(self, kind: Hashable) -> None:
        """Take the times of the latest pass, unless calls of several sizes run, any of which it may have been."""
        stats = self._model.stats
        if stats.last is None or stats.passes == self._timed_passes or any(other != kind for other in self._calls):
            return
        self._timed_passes = stats.passes
        plan = self._model.plan
        self._pace.note((kind, plan.threads, plan.packed, plan.streamed_bytes > 0), stats.last, self._expected_s)
        self._facts |= {
            "run_s": self._pace.run_s,
            "read_s": self._pace.read_s,
            "slowness": self._pace.slowness,
            **self._cores(),
        }

    def _cores(self) -> dict[str, str]:
        """Which cores compute and which read, where one is little."""
        cores = spelled(self._model.profile.core_capacities, self._model.plan.threads)
        return {"cores": cores} if cores else {}


def _caller_left() -> ClosedError:
    return ClosedError("The call was ended, since its caller has left.")


def _sizes(arrays: Arrays) -> Hashable:
    return tuple(sorted((name, array.shape) for name, array in arrays.items()))


def _usable(arrays: Arrays) -> Arrays:
    """Arrays as kernels take them: one that came behind others in a message may begin anywhere."""
    return {name: np.require(array, requirements=("C", "A")) for name, array in arrays.items()}
