"""The locks, conditions, threads, futures and clock that stand in for Python's while a simulation runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tests.simulation.scheduler import Scheduler, SimulatedThread

__all__ = ["RUNNING", "SimulatedFuture", "Threading", "Time"]


class _Running:
    """The run that goes on now: the code under test makes its locks without being told of it.

    Attributes:
        scheduler: of that run.
        quiet: locks made in these modules are no steps.
        may_start: called before a thread starts; may raise what the system would.
    """

    scheduler: Scheduler
    quiet: Callable[[str], bool]
    may_start: Callable[[], None]


RUNNING = _Running()


class _Lock:
    """A lock, which the thread that holds it may take again if it is `reentrant`."""

    def __init__(self, *, reentrant: bool = False, name: str = "lock") -> None:
        self._scheduler = RUNNING.scheduler
        self._reentrant = reentrant
        self._name = name
        self._quiet = RUNNING.quiet(name)
        self._owner: SimulatedThread | None = None
        self._depth = 0

    def free_for(self, thread: SimulatedThread) -> bool:
        return self._owner is None

    def acquire(self) -> bool:
        scheduler = self._scheduler
        thread = scheduler.current
        if self._owner is thread:
            if not self._reentrant:
                scheduler.fail(f"{thread.name} takes {self._name} again, which it holds")
            self._depth += 1
            return True
        if not self._quiet or self._owner is not None or scheduler.failed:
            thread.wants = self
            scheduler.step(f"acquire {self._name}")
            thread.wants = None
        assert self._owner is None
        self._owner, self._depth = thread, 1
        return True

    def release(self) -> None:
        if self._owner is not self._scheduler.current:
            if self._scheduler.failed:
                return
            raise RuntimeError("release of a lock that another thread holds")
        self._depth -= 1
        if not self._depth:
            self._owner = None

    def give_up(self) -> int:
        """Release it wholly, for a wait. Returns how often it was taken."""
        if self._owner is not self._scheduler.current:
            raise RuntimeError("a wait without the lock")
        depth, self._depth, self._owner = self._depth, 0, None
        return depth

    def take_back(self, depth: int) -> None:
        """After a wait."""
        thread = self._scheduler.current
        assert self._owner is None
        self._owner, self._depth = thread, depth

    def __enter__(self) -> _Lock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        owner = f", held by {self._owner.name}" if self._owner else ""
        return f"{self._name}{owner}"


class _Condition:
    def __init__(self, name: str = "condition") -> None:
        self._scheduler = RUNNING.scheduler
        self._lock = _Lock(reentrant=True, name=name)
        self._waiting: list[SimulatedThread] = []
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def wait(self, timeout: float | None = None) -> bool:
        scheduler, lock = self._scheduler, self._lock
        thread = scheduler.current
        depth = lock.give_up()
        self._waiting.append(thread)
        thread.wants = lock
        woken = scheduler.wait(f"wait {lock._name}", self, timeout)
        if thread in self._waiting:
            self._waiting.remove(thread)
        thread.wants = None
        lock.take_back(depth)
        if thread.interrupted:
            thread.interrupted = False
            raise KeyboardInterrupt
        return woken

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        # As Python's own.
        end_s = None
        result = predicate()
        while not result:
            left_s = None
            if timeout is not None:
                end_s = self._scheduler.now_s + timeout if end_s is None else end_s
                left_s = end_s - self._scheduler.now_s
                if left_s <= 0:
                    break
            self.wait(left_s)
            result = predicate()
        if result:
            self._scheduler.progress()
        return result

    def notify(self, count: int = 1) -> None:
        if self._lock._owner is not self._scheduler.current and not self._scheduler.failed:
            raise RuntimeError("a notification without the lock")
        for thread in self._waiting[:count]:
            self._scheduler.wake(thread)
        del self._waiting[:count]

    def notify_all(self) -> None:
        self.notify(len(self._waiting))

    def __enter__(self) -> _Condition:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __repr__(self) -> str:
        return f"a notification of {self._lock}"


class _Thread:
    def __init__(
        self,
        *,
        target: Callable[..., object],
        args: tuple[Any, ...] = (),
        name: str,
        daemon: bool = False,
    ) -> None:
        scheduler = RUNNING.scheduler
        self._scheduler = scheduler
        self.name = name
        self.ident: int | None = None
        self.simulated = SimulatedThread(scheduler, lambda: target(*args), name)
        self.simulated.handle = self  # type: ignore[attr-defined]

    def start(self) -> None:
        RUNNING.may_start()
        self.ident = id(self)
        self.simulated.begin()
        self._scheduler.step(f"start {self.name}")

    def join(self) -> None:
        if not self.simulated.ended:
            self._scheduler.wait(f"join {self.name}", self.simulated, None)


class Threading:
    """Stands in for the module `threading`: the names of it that the code under test uses, and no others."""

    Thread = _Thread
    TIMEOUT_MAX = threading.TIMEOUT_MAX

    def __init__(self, module: str) -> None:
        self._module = module.rsplit(".", 1)[-1]

    def Lock(self) -> _Lock:
        return _Lock(name=self._module)

    def Condition(self) -> _Condition:
        return _Condition(self._module)

    def current_thread(self) -> Any:
        thread = RUNNING.scheduler.current
        return getattr(thread, "handle", thread)


class Time:
    """Stands in for the module `time`."""

    def perf_counter(self) -> float:
        # Two looks at a clock see two times.
        RUNNING.scheduler.now_s += 1e-6
        return RUNNING.scheduler.now_s

    monotonic = perf_counter

    def time_ns(self) -> int:
        return int(self.perf_counter() * 1e9)


class SimulatedFuture(Future):  # type: ignore[type-arg]
    """Python's own future, over a condition of the simulation."""

    def __init__(self) -> None:
        super().__init__()
        self._condition = _Condition("future")  # type: ignore[assignment]
