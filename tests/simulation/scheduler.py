"""A scheduler that owns threads and time: exactly one thread runs, and a choice decides which one runs next.

```
thread A   run ... step("acquire changed") ----.                          .---> goes on
                                               v                          |
scheduler                              note the step, check the invariants, choose
                                               |
thread B   <-- goes on where it gave control --'
```

Threads are threads of the system, each with a lock of its own that it waits at; only the chosen one's lock is free.
Locks, conditions, threads and the clock of the code under test are those of `primitives`: every operation is a step,
after which another thread may run. Time is virtual: it goes on when no thread can run, or earlier where the choice
lets a wait end while others could run, as on a machine whose threads are slow.
"""

from __future__ import annotations

import _thread
import ctypes
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol

__all__ = ["Abort", "Choice", "Failure", "Scheduler", "SimulatedThread"]

_MOST_STEPS = 60_000
"""A run takes some thousand steps."""
_MOST_IDLE = 40
"""Waits that end one after another by their timeouts alone: nothing comes about any more."""
_LATE_IDLE = 2
"""After these, a thread that was to begin at a later step begins: the run has no more steps."""
_SPIN_S = 1.0
"""Processor time of the process without a step: a thread spins between two steps."""
_LOOK_S = 0.5


class Abort(BaseException):
    """Ends the threads of a run that has failed."""


class Failure(AssertionError):  # noqa: N818 - of a promise, not of the simulation
    """A run broke a promise."""


class Choice(Protocol):
    """Decides which thread runs next."""

    def next(self, runnable: Sequence[SimulatedThread], current: SimulatedThread | None) -> SimulatedThread:
        """One of the threads that can run. `current` has made a step, and is among them if it can go on."""

    def hurries(self) -> bool:
        """Whether a wait with a timeout ends now, although threads can run."""

    def settled(self, step: int) -> None:
        """Callers and others have ended before this step: what follows is only looked at."""


class SimulatedThread:
    """A thread of the system that runs when the scheduler says so.

    Args:
        scheduler: the one that it belongs to.
        target: its work.
        name: in steps and failures.

    Attributes:
        wants: the lock that it must get to go on.
        waits_for: the condition, sleep or thread that it waits for; None where it can go on.
        deadline_s: when that wait ends by itself; None for never.
        timed_out: the last wait has ended so.
        ended: its work is over.
        interrupted: its next wait ends with KeyboardInterrupt.
        after_step: it does not run before the run has had this many steps, unless nothing else can.
    """

    def __init__(self, scheduler: Scheduler, target: Callable[[], object], name: str) -> None:
        self._scheduler = scheduler
        self._target = target
        self._baton = _thread.allocate_lock()
        self._baton.acquire()
        self.name = name
        self.number = 0
        self.wants: Any = None
        self.waits_for: Any = None
        self.deadline_s: float | None = None
        self.timed_out = False
        self.ended = False
        self.interrupted = False
        self.after_step = 0
        self.system_id = 0

    @property
    def can_run(self) -> bool:
        """Whether it may be chosen."""
        return (
            self.waits_for is None
            and not self.ended
            and self.after_step <= self._scheduler.steps
            and (self.wants is None or self.wants.free_for(self))
        )

    def begin(self) -> None:
        """Exist from now on; it runs when it is chosen."""
        self.number = len(self._scheduler.threads)
        self._scheduler.threads.append(self)
        _thread.start_new_thread(self._run, ())

    def pause(self) -> None:
        """Wait until it is chosen."""
        self._baton.acquire()

    def go(self) -> None:
        """Let it run. The caller pauses, or ends."""
        self._baton.release()

    def _run(self) -> None:
        self.system_id = _thread.get_ident()
        self.pause()
        scheduler = self._scheduler
        try:
            if not scheduler.failed:
                if scheduler.trace_lines is not None:
                    sys.settrace(scheduler.trace_lines)
                self._target()
        except Abort:
            pass
        except BaseException as error:  # noqa: BLE001 - it fails the run
            if not scheduler.failed:
                scheduler.failure = f"{self.name} ended with {error!r}\n{traceback.format_exc()}"
        finally:
            sys.settrace(None)
            scheduler.end(self)

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Scheduler:
    """Runs threads one at a time.

    Args:
        choice: decides.
        check: called at every step; raises `Failure` where an invariant is broken.
        keep_steps: keep the list of steps.
        most_steps: a run with more of them goes on for ever.
        lines: whether the lines of a file are steps too; None where only operations are.

    Attributes:
        threads: all threads so far.
        current: the one that runs.
        now_s: the virtual time.
        steps: the number of steps so far.
        log: thread and operation of each step, if they are kept.
        failure: the first broken promise, with its circumstances.
    """

    def __init__(
        self,
        choice: Choice,
        check: Callable[[], None],
        *,
        keep_steps: bool = False,
        most_steps: int = _MOST_STEPS,
        lines: Callable[[str], bool] | None = None,
    ) -> None:
        self._choice = choice
        self._check = check
        self._lines = lines
        self._most_steps = most_steps
        self._ended = _thread.allocate_lock()
        self._ended.acquire()
        self._idle = 0
        self._line_files: dict[str, bool] = {}
        self.threads: list[SimulatedThread] = []
        self.current: SimulatedThread
        self.now_s = 1000.0
        self.steps = 0
        self.log: list[tuple[str, str]] | None = [] if keep_steps else None
        self.failure: str | None = None
        self.trace_lines = self._trace if lines is not None else None

    @property
    def failed(self) -> bool:
        """Whether the run is being given up."""
        return self.failure is not None

    def run(self, main: Callable[[], object]) -> None:
        """Run `main` in the first thread, and return when all threads have ended."""
        first = SimulatedThread(self, main, "main")
        first.begin()
        self.current = first
        first.go()
        seen, since_s = -1, time.process_time()
        while not self._ended.acquire(timeout=_LOOK_S):
            if seen != self.steps:
                seen, since_s = self.steps, time.process_time()
            elif time.process_time() - since_s > _SPIN_S:
                self._end_spin()
                since_s = time.process_time()

    # Called by the thread that runs

    def step(self, operation: str) -> None:
        """Let another thread run, perhaps."""
        self._note(operation)
        self._switch()

    def wait(self, operation: str, waits_for: object, timeout_s: float | None) -> bool:
        """Wait until another thread calls `wake`, or the time is over. Returns whether it was woken."""
        self._note(operation)
        thread = self.current
        thread.waits_for, thread.timed_out = waits_for, False
        thread.deadline_s = None if timeout_s is None else self.now_s + max(timeout_s, 0.0)
        self._switch()
        return not thread.timed_out

    def wake(self, thread: SimulatedThread) -> None:
        """End the wait of a thread."""
        thread.waits_for = thread.deadline_s = None

    def sleep(self, operation: str, seconds: float) -> None:
        """Wait for some time."""
        if seconds:
            self.wait(operation, "time", seconds)
        else:
            self.step(operation)
        self._idle = 0

    def fail(self, message: str) -> None:
        """Give the run up, since a promise was broken."""
        if not self.failed:
            self.failure = message
        raise Abort

    def end(self, thread: SimulatedThread) -> None:
        """The thread's work is over."""
        thread.ended = True
        if not self.failed:
            for other in self.threads:
                if other.waits_for is thread:
                    self.wake(other)
            try:
                self._note("ends")
                chosen = self._choose(None)
            except Abort:
                chosen = None
            if chosen is not None:
                self.current = chosen
                chosen.go()
                return
        # The others end one after another.
        for other in self.threads:
            if not other.ended:
                self.current = other
                other.go()
                return
        self._ended.release()

    def _note(self, operation: str) -> None:
        if self.failed:
            raise Abort
        self.steps += 1
        if self.log is not None:
            self.log.append((self.current.name, operation))
        try:
            self._check()
        except Failure as failure:
            self.fail(f"{failure}\n{self._where()}")
        if self.steps > self._most_steps:
            self.fail(f"after {self._most_steps} steps the run goes on\n{self._where()}")

    def _switch(self) -> None:
        thread = self.current
        chosen = self._choose(thread)
        if chosen is not thread:
            assert chosen is not None
            self.current = chosen
            chosen.go()
            thread.pause()
            if self.failed:
                raise Abort

    def _choose(self, current: SimulatedThread | None) -> SimulatedThread | None:
        """The next thread; None when all have ended."""
        runnable = [thread for thread in self.threads if thread.can_run]
        timed = [thread for thread in self.threads if thread.deadline_s is not None]
        if not runnable and (self._idle > _LATE_IDLE or not timed):
            late = [thread for thread in self.threads if thread.after_step > self.steps and not thread.ended]
            if late:
                min(late, key=lambda thread: thread.after_step).after_step = 0
                return self._choose(current)
        if timed and (not runnable or self._choice.hurries()):
            self._end_wait(min(timed, key=lambda thread: (thread.deadline_s, thread.number)))
            if not runnable:
                self._idle += 1
                if self._idle > _MOST_IDLE:
                    self.fail(f"nothing comes about any more, callers wait for ever\n{self._where()}")
            return self._choose(current)
        if not runnable:
            if any(not thread.ended for thread in self.threads):
                self.fail(f"deadlock: every thread waits\n{self._where()}")
            return None
        return self._choice.next(runnable, current if current is not None and current.can_run else None)

    def progress(self) -> None:
        """Something came about: a thread may wait for more."""
        self._idle = 0

    def _end_wait(self, thread: SimulatedThread) -> None:
        assert thread.deadline_s is not None
        self.now_s = max(self.now_s, thread.deadline_s)
        self.wake(thread)
        thread.timed_out = True

    def _where(self) -> str:
        """What each thread waits for, and where."""
        frames = sys._current_frames()
        lines = [f"  time {self.now_s - 1000:.6f} s, step {self.steps}, running: {self.current.name}"]
        for thread in self.threads:
            if not thread.ended:
                state = "can go on" if thread.wants is None else f"wants {thread.wants}"
                state = state if thread.waits_for is None else f"waits for {thread.waits_for}"
                until = "" if thread.deadline_s is None else f" until {thread.deadline_s - 1000:.6f} s"
                lines.append(f"  {thread.name} {state}{until}, in {_place(frames.get(thread.system_id))}")
        return "\n".join(lines)

    def _end_spin(self) -> None:
        """A thread does not come to its next step: end it from outside."""
        thread = self.current
        if not self.failed:
            self.failure = f"{thread.name} spins for ever between two steps\n{self._where()}"
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.system_id), ctypes.py_object(Abort))

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        """For `sys.settrace`: the lines of chosen files are steps."""
        name = frame.f_code.co_filename
        wanted = self._line_files.get(name)
        if wanted is None:
            assert self._lines is not None
            wanted = self._line_files[name] = self._lines(name)
        if not wanted:
            return None
        if event == "line" and not self.failed:
            self.step(f"line {name.rsplit('/', 1)[-1]}:{frame.f_lineno}")
        return self._trace


def _place(frame: FrameType | None) -> str:
    """The innermost lines of the code under test."""
    found: list[str] = []
    while frame is not None and len(found) < 3:
        code = frame.f_code
        if "/pipeload/" in code.co_filename:
            found.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(found) or "the simulation"
