"""The agents' loops end when the exchange is closed, and a failure in any of them reaches the caller."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.engine.harness import PATIENCE_S, Background, Gate
from tests.engine.pipeline.exchanges import give_back

from pipeload.errors import ClosedError
from pipeload.pipeline.agents import daemon_agent, inference_agent, loading_agent
from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.messages import LoadedShard, Task
from pipeload.pipeline.requests import Call
from pipeload.pipeline.reservations import Reservations

SHARDS = 5
FAILURES = [OSError("disk"), MemoryError(), SystemExit(3), KeyboardInterrupt(), GeneratorExit()]


def _nothing(*_: Any) -> None:
    pass


class _Crew:
    """Agents around fakes. Every shard is its index; a pass gives the list of the shards that ran."""

    def __init__(self, *, loaders: int = 2, resident: tuple[int, ...] = (), watch_s: float = PATIENCE_S) -> None:
        self.exchange = Exchange()
        self.loaded: list[int] = []
        self.freed: list[int] = []
        self.recovered = 0
        self.on_load: Callable[[Task], None] = _nothing
        self.on_free: Callable[[int], None] = _nothing
        self.on_run: Callable[[int], None] = _nothing
        self.on_recover: Callable[[], None] = _nothing
        self.on_settle: Callable[[], None] = _nothing
        self.on_watch: Callable[[], None] = _nothing
        self._budget = Reservations(len(resident) + loaders + 1)
        self._resident = tuple(index in resident for index in range(SHARDS))
        self._loaders = loaders
        self.exchange.start(self._resident, loaders)
        self.threads = [
            *(Background(loading_agent, self.exchange, self._load) for _ in range(loaders)),
            Background(inference_agent, self.exchange, self._recover, lambda: self.on_settle()),
            Background(daemon_agent, self.exchange, self._free, lambda: self.on_watch(), watch_s),
        ]

    def run_until_it_fails(self) -> None:
        """A failure while prefetching is met by the next call."""
        for _ in range(SHARDS):
            self.run()

    def submit(self) -> Call[Any]:
        request = Call(self._work)
        self.exchange.calls.submit(request)
        return request

    def run(self) -> list[int]:
        return self.submit().outcome.result(PATIENCE_S)

    def close(self) -> None:
        self.exchange.close()
        self._budget.close()
        for thread in self.threads:
            thread.end()

    def _load(self, task: Task) -> LoadedShard | None:
        if not self._budget.reserve(1, task.ticket, lambda: self.exchange.is_stale(task)):
            return None
        try:
            self.on_load(task)
        except BaseException:
            self._budget.release(1)
            raise
        self.loaded.append(task.index)
        return LoadedShard(index=task.index, session=None, buffer=None, reserved_bytes=1, pooled=True)

    def _work(self, request: Call[Any]) -> list[int]:
        if self.exchange.stopped:
            self.exchange.start(self._resident, self._loaders)
        ran = []
        for index in range(SHARDS):
            shard, resident = self.exchange.residents.borrow(index), True
            if shard is None:
                task, shard = self.exchange.take(index, request)
                resident = task.resident
            try:
                self.on_run(index)
            finally:
                give_back(self.exchange, index, shard, resident=resident)
            ran.append(shard.index)
        return ran

    def _free(self, shard: LoadedShard) -> None:
        self.on_free(shard.index)
        self.freed.append(shard.index)
        self._budget.release(1)

    def _recover(self) -> None:
        self.recovered += 1
        self.on_recover()
        self.exchange.reset(self._budget.wake)


def _run_for_ever(crew: _Crew) -> None:
    while True:
        crew.run()


@contextmanager
def _crew(**options: Any) -> Iterator[_Crew]:
    crew = _Crew(**options)
    try:
        yield crew
    finally:
        crew.close()


def _once(error: BaseException, at: int) -> Callable[[Any], None]:
    """Fails the first time that it is called for a shard."""
    armed = [True]

    def fail(item: Any) -> None:
        if armed and (item.index if isinstance(item, Task) else item) == at:
            armed.clear()
            raise error

    return fail


@pytest.mark.parametrize("loaders", [1, 2, 4])
@pytest.mark.parametrize("resident", [(), (1, 3), (0, 1, 2, 3, 4)])
def test_every_pass_runs_all_shards_in_order(loaders: int, resident: tuple[int, ...]) -> None:
    with _crew(loaders=loaders, resident=resident) as crew:
        for _ in range(20):
            assert crew.run() == list(range(SHARDS))
    for index in resident:
        assert crew.loaded.count(index) == 1
        assert index not in crew.freed


def test_prefetch_goes_on_into_the_next_pass_before_anybody_calls() -> None:
    reached = Gate(opened=True)
    with _crew(loaders=1) as crew:
        crew.on_load = lambda task: reached.stop_here() if task.ticket == SHARDS + 1 else None
        crew.run()
        reached.wait_reached()
        assert crew.loaded[SHARDS] == 0


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [0, 2, SHARDS - 1])
@pytest.mark.parametrize("where", ["on_load", "on_run"])
def test_a_failure_reaches_the_caller_and_the_next_call_works(error: BaseException, at: int, where: str) -> None:
    with _crew() as crew:
        setattr(crew, where, _once(error, at))
        with pytest.raises(type(error)) as caught:
            crew.run_until_it_fails()
        assert caught.value is error
        for _ in range(3):
            assert crew.run() == list(range(SHARDS))
        assert crew.recovered == 1


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failure_of_the_daemon_ends_all_calls_with_its_cause(error: BaseException) -> None:
    with _crew() as crew:
        crew.on_free = _once(error, 1)
        with pytest.raises(ClosedError) as caught:
            crew.run_until_it_fails()
        assert caught.value.__cause__ is error
        with pytest.raises(ClosedError) as caught:
            crew.run()
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failure_of_the_recovery_ends_all_calls_instead_of_hanging_them(error: BaseException) -> None:
    with _crew() as crew:
        crew.on_run = _once(OSError("first"), 1)
        crew.on_recover = lambda: _once(error, 0)(0)
        with pytest.raises(OSError, match="first"):
            crew.run()
        with pytest.raises(ClosedError) as caught:
            crew.run()
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("where", ["on_load", "on_run"])
def test_an_error_that_is_kept_keeps_nothing_else_alive(where: str) -> None:
    class Session:
        pass

    alive: list[weakref.ref[Session]] = []

    def fail(_: Any) -> None:
        session = Session()
        alive.append(weakref.ref(session))
        raise OSError("disk")

    with _crew() as crew:
        setattr(crew, where, fail)
        with pytest.raises(OSError, match="disk") as kept:
            crew.run_until_it_fails()
    gc.collect()
    assert kept.value is not None
    assert [reference() for reference in alive] == [None] * len(alive)


def test_loading_that_always_fails_is_tried_once_a_call() -> None:
    failures = []

    def fail(task: Task) -> None:
        failures.append(task)
        raise OSError("disk")

    with _crew(loaders=1) as crew:
        crew.run()
        crew.on_load = fail
        for _ in range(4):
            with pytest.raises(OSError, match="disk"):
                crew.run_until_it_fails()
        crew.on_load = _nothing
        assert crew.run() == list(range(SHARDS))
    assert 3 <= len(failures) <= 4


def test_calls_wait_for_each_other_in_order() -> None:
    gate = Gate()
    finished: list[int] = []
    with _crew() as crew:
        crew.on_run = lambda index: gate.stop_here() if index == 0 else None
        requests = []
        for number in range(4):
            request = crew.submit()
            request.outcome.add_done_callback(lambda _, number=number: finished.append(number))
            requests.append(request)
        gate.wait_reached()
        assert not any(request.outcome.done() for request in requests)
        gate.open()
        assert [request.outcome.result(PATIENCE_S) for request in requests] == [list(range(SHARDS))] * 4
    assert finished == [0, 1, 2, 3]


@pytest.mark.parametrize("where", ["on_load", "on_run"])
def test_closing_while_an_agent_works_ends_the_call(where: str) -> None:
    gate = Gate()
    with _crew() as crew:
        setattr(crew, where, lambda _: gate.stop_here())
        request = crew.submit()
        gate.wait_reached()
        crew.exchange.close()
        gate.open()
        with pytest.raises(ClosedError):
            request.outcome.result(PATIENCE_S)


def test_closing_while_everybody_waits_ends_the_threads() -> None:
    with _crew(loaders=3, resident=tuple(range(SHARDS))) as crew:
        crew.run()


def test_a_withdrawn_call_does_not_disturb_the_next() -> None:
    gate = Gate()
    with _crew() as crew:
        crew.on_run = lambda index: gate.stop_here() if index == 2 else None
        request = crew.submit()
        gate.wait_reached()
        crew.exchange.calls.forget(request)
        gate.open()
        with pytest.raises(ClosedError):
            request.outcome.result(PATIENCE_S)
        assert crew.run() == list(range(SHARDS))


def test_settling_comes_after_each_answer() -> None:
    answered: list[bool] = []
    with _crew() as crew:
        requests: list[Call[Any]] = []
        settled = Gate(opened=True)
        crew.on_settle = lambda: (answered.append(requests[-1].outcome.done()), settled.stop_here())
        for _ in range(3):
            gate = Gate()
            crew.on_run = lambda index, gate=gate: gate.stop_here() if index == 0 else None
            requests.append(crew.submit())
            gate.open()
            settled.wait_reached()
    assert answered == [True] * 3


def test_a_failed_call_is_not_settled() -> None:
    settled: list[bool] = []
    with _crew() as crew:
        crew.on_settle = lambda: settled.append(True)
        crew.on_run = _once(OSError("disk"), 2)
        with pytest.raises(OSError, match="disk"):
            crew.run()
    assert settled == []


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["on_settle", "on_watch"])
def test_a_failure_behind_the_calls_ends_them_with_its_cause(error: BaseException, where: str) -> None:
    # Nothing retires from a crew whose shards stay, so that its daemon watches at once.
    with _crew(watch_s=0.001, resident=tuple(range(SHARDS)) if where == "on_watch" else ()) as crew:
        setattr(crew, where, lambda: _once(error, 0)(0))
        # Not the call whose answer is there already.
        with pytest.raises(ClosedError) as caught:
            _run_for_ever(crew)
        assert caught.value.__cause__ is error


def test_the_daemon_watches_only_while_nothing_is_retired() -> None:
    watched = Gate(opened=True)
    with _crew(watch_s=0.001, resident=tuple(range(SHARDS))) as crew:
        crew.on_watch = watched.stop_here
        for _ in range(3):
            watched.wait_reached()
        assert crew.freed == []


def test_idle_agents_keep_no_request_and_no_result_alive() -> None:
    class Result:
        pass

    with _crew() as crew:
        request = Call(lambda _: Result())
        crew.exchange.calls.submit(request)
        alive = weakref.ref(request.outcome.result(PATIENCE_S))
        del request
        # Served after it: by then the Inference Agent has let the first one go.
        crew.run()
        gc.collect()
        assert alive() is None
