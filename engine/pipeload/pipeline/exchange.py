"""Where the agents meet: tasks, messages and signals under one lock.

```
 callers --submit--> [requests] --next_request--> Inference Agent
                                                      |  take (waits for `ready`)
 Loading Agents <--next_task-- [schedule]             v
        |                                          run shard
        '----deliver: Loaded | Failed ("ready")-->    |  give_back ("free")
                                                      v
 Loading Agents <--"stop" / "resume"-- Daemon Agent <-'
```

Shards are drawn in plan order, round and round: after the last shard of a pass comes the first of the next. A shard
that is planned to be resident is drawn once and then left out. Every draw has a ticket; inference consumes tickets in
order. `reset` starts a new *epoch*: whatever was drawn or loaded before it is thrown away.

Resident shards live here. They may be packed while passes run: one at a time, a Loading Agent makes the packed copy and
swaps it in while the shard does not run.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from pipeload.errors import ClosedError
from pipeload.pipeline.messages import Failed, Loaded, LoadedShard, Task
from pipeload.pipeline.requests import Request
from pipeload.storage.buffers import Part

__all__ = ["Exchange"]


class Exchange:
    """The state that the agents share. Every wait ends when it is closed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed = False
        self._cause: BaseException | None = None
        self._requests: deque[Request] = deque()
        self._current: list[Request] = []
        self._expected, self._patience_s = 1, 0.0
        self._resident: tuple[bool, ...] = ()
        self._loaders = 0
        self._held: set[int] = set()
        self._loading: set[int] = set()
        self._place = 0
        self._next_ticket = 0
        self._expected_ticket = 0
        self._epoch = 0
        self._stopped = True
        self._short = False
        self._failed = False
        self._broken = False
        self._outstanding = 0
        self._ready: dict[int, Loaded | Failed] = {}
        self._retired: deque[LoadedShard] = deque()
        self._pass_number = 1
        self._residents: dict[int, LoadedShard] = {}
        self._kept: dict[int, Sequence[Part]] = {}
        self._running: int | None = None
        self._to_pack: deque[int] = deque()
        self._packing = False
        self._packing_error: BaseException | None = None

    # Callers

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ClosedError when closed."""
        with self._changed:
            if self._closed:
                raise ClosedError("The model is closed. Load it again.") from self._cause
            self._requests.append(request)
            self._changed.notify_all()

    def withdraw(self, request: Request) -> None:
        """The caller no longer waits: forget the request, or end it if it runs."""
        with self._changed:
            if request in self._requests:
                self._requests.remove(request)
            request.stopper.stop()
            self._changed.notify_all()

    # Loading Agents

    def next_task(self) -> Task | None:
        """The next shard to load, waiting while stopped or while nothing is to load; None when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._may_pack() or self._may_draw())
            if self._closed:
                return None
            packs = self._may_pack()
            self._outstanding += 1
            if packs:
                self._packing = True
                index = self._to_pack.popleft()
                return Task(ticket=-1, index=index, resident=True, epoch=self._epoch, packing=True)
            self._skip_held()
            task = Task(
                ticket=self._next_ticket,
                index=self._place,
                resident=self._resident[self._place],
                epoch=self._epoch,
                pass_number=self._pass_number,
            )
            if task.resident:
                self._held.add(task.index)
            self._loading.add(task.index)
            self._advance()
            self._next_ticket += 1
            return task

    def is_stale(self, task: Task) -> bool:
        """Nobody wants this shard any more."""
        return self._closed or task.epoch != self._epoch

    def deliver(self, task: Task, message: Loaded | Failed | None) -> None:
        """Signal `ready` for a task (None: it was cancelled). A shard of an old epoch goes to the Daemon at once."""
        with self._changed:
            self._outstanding -= 1
            self._loading.discard(task.index)
            if isinstance(message, Failed) and message.task.packing:
                self._packing_error = message.error
            elif message is not None and not self.is_stale(message.task):
                self._ready[message.task.ticket] = message
                self._failed = self._failed or isinstance(message, Failed)
            elif isinstance(message, Loaded):
                self._retired.append(message.shard)
            self._changed.notify_all()

    def resident(self, index: int) -> LoadedShard:
        """A resident shard, to be packed."""
        with self._changed:
            return self._residents[index]

    def swap(self, task: Task, packed: LoadedShard) -> bool:
        """Put the packed shard in the place of the loaded one, while that does not run, and retire the other one.

        Returns:
            False when the task had become stale: then it is the packed one that was retired.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.is_stale(task) or self._running != task.index)
            old, wanted = packed, not self.is_stale(task)
            if wanted:
                old = self._residents[task.index]
                packed.reserved_bytes, old.reserved_bytes = old.reserved_bytes, 0
                self._residents[task.index] = packed
            self._retired.append(old)
            self._changed.notify_all()
            return wanted

    def packed(self) -> None:
        """The task of packing is over, however it ended: another one may begin."""
        with self._changed:
            self._packing = False
            self._changed.notify_all()

    # Inference Agent

    def next_request(self) -> Request | None:
        """The next call to serve; None when closed."""
        with self._changed:
            self._current = []
            self._broken = False
            while not self._closed:
                self._changed.wait_for(lambda: self._closed or self._requests)
                # Those who were served together come back one by one.
                self._changed.wait_for(lambda: self._closed or len(self._requests) >= self._expected, self._patience_s)
                self._expected, self._patience_s = 1, 0.0
                # Meanwhile all may have been withdrawn.
                if self._requests and not self._closed:
                    self._current = [self._requests.popleft()]
                    return self._current[0]
            return None

    def join(self) -> list[Request]:
        """The calls behind the one that is being served that run a pass too: they are then served with it."""
        with self._changed:
            joined = []
            while self._requests and self._requests[0].served is not None:
                joined.append(self._requests.popleft())
            self._current += joined
            return joined

    def part(self, joined: Sequence[Request]) -> None:
        """Put calls that were to join back to the front of the queue."""
        with self._changed:
            self._current = [request for request in self._current if request not in joined]
            self._requests.extendleft(reversed(joined))

    def expect(self, count: int, patience_s: float) -> None:
        """Before the next call is served, wait so long for as many calls to come, beside those that wait already."""
        with self._changed:
            self._expected, self._patience_s = count + len(self._requests), patience_s

    def take(self, index: int, *requests: Request) -> tuple[Task, LoadedShard]:
        """Wait until the shard is ready, which must be the next one in ticket order.

        Raises:
            ClosedError: the exchange was closed, or all of the requests were withdrawn.
            BaseException: whatever made the load fail.
        """

        def stopped() -> bool:
            return all(request.stopper.stopped for request in requests)

        with self._changed:
            ticket = self._expected_ticket
            self._changed.wait_for(lambda: self._closed or stopped() or ticket in self._ready)
            if self._closed:
                raise ClosedError("The model was closed during the call.") from self._cause
            if stopped():
                raise ClosedError("The call was ended.")
            message = self._ready[ticket]
            self._broken = True
            if isinstance(message, Failed):
                raise message.error
            assert message.task.index == index, "loaders and inference walk the same order"
            del self._ready[ticket]
            self._expected_ticket += 1
            return message.task, message.shard

    def borrow_resident(self, index: int) -> LoadedShard | None:
        """The resident shard, which must be given back; None when it is not in memory.

        Raises:
            BaseException: what made packing a resident shard fail.
        """
        with self._changed:
            if self._packing_error is not None:
                error, self._packing_error = self._packing_error, None
                raise error
            shard = self._residents.get(index)
            self._running = index if shard else None
            return shard

    def give_back(self, index: int, shard: LoadedShard, *, resident: bool) -> None:
        """The shard ran: it stays where it is, becomes resident, or is retired (signal `free`)."""
        with self._changed:
            self._running = None
            if resident:
                self._residents.setdefault(index, shard)
            else:
                self._retired.append(shard)
            self._changed.notify_all()

    # Daemon Agent

    def next_retired(self, patience_s: float | None = None) -> LoadedShard | None:
        """The next shard to destroy; None when closed and nothing is left, or when nothing came for so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._retired, patience_s)
            return self._retired.popleft() if self._retired else None

    def signal_memory(self, *, short: bool) -> None:
        """Signal `stop` or `resume` to the Loading Agents."""
        with self._changed:
            self._short = short
            self._changed.notify_all()

    # Control

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def cause(self) -> BaseException | None:
        """What made an agent close it, if one did."""
        return self._cause

    @property
    def stopped(self) -> bool:
        """Whether the Loading Agents wait for a `start`."""
        return self._stopped

    @property
    def broken(self) -> bool:
        """Whether the next sweep cannot begin with what is loaded: the call that is being served took a shard of it,
        or a load has failed.
        """
        with self._changed:
            return self._broken or self._failed

    @property
    def residents(self) -> dict[int, LoadedShard]:
        """The resident shards that are in memory now."""
        with self._changed:
            return dict(self._residents)

    @property
    def idle(self) -> bool:
        """Whether no call runs or waits."""
        with self._changed:
            return not self._current and not self._requests

    def keep(self, index: int, parts: Sequence[Part]) -> None:
        """Parts of a streamed shard that stay in memory from now on."""
        with self._changed:
            self._kept[index] = parts

    @property
    def kept(self) -> dict[int, Sequence[Part]]:
        """Shard -> the parts of it that stay in memory; their memory is reserved apart from the shards'."""
        with self._changed:
            return dict(self._kept)

    def forget(self, index: int) -> Sequence[Part]:
        """Parts that stay no longer: the caller closes and releases them; only between `reset` and `start`."""
        with self._changed:
            return self._kept.pop(index)

    def drop(self, index: int) -> None:
        """Retire a resident shard; only between `reset` and `start`."""
        with self._changed:
            self._retired.append(self._residents.pop(index))
            self._changed.notify_all()

    @property
    def packing(self) -> bool:
        """Whether resident shards are being packed or wait for it."""
        with self._changed:
            return self._packing or bool(self._to_pack)

    def pack(self, indices: Iterable[int]) -> None:
        """Let the Loading Agents pack these resident shards, one after another."""
        with self._changed:
            self._to_pack = deque(indices)
            self._changed.notify_all()

    def start(self, resident: Sequence[bool], loaders: int, pass_number: int = 1) -> None:
        """Let the Loading Agents begin at the first shard of a pass.

        Args:
            resident: for each shard, whether it stays in memory after it ran.
            loaders: how many of them may load at the same time; one more may pack.
            pass_number: of the pass that they begin with.
        """
        with self._changed:
            assert not self._outstanding, "reset before start"
            self._resident = tuple(resident)
            self._loaders = loaders
            self._held = set(self._residents)
            self._place = 0
            self._pass_number = pass_number
            self._stopped = False
            self._changed.notify_all()

    def reset(self, wake: Callable[[], None]) -> None:
        """Stop the Loading Agents, wait until none works, and hand all that is ready to the Daemon.

        Args:
            wake: makes Loading Agents that wait for budget look whether they are stale.
        """
        with self._changed:
            self._stopped = True
            self._epoch += 1
            self._to_pack.clear()
            self._changed.notify_all()
        wake()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._outstanding)
            self._retired.extend(m.shard for m in self._ready.values() if isinstance(m, Loaded))
            self._ready.clear()
            self._failed = False
            self._expected_ticket = self._next_ticket
            self._changed.notify_all()

    def wait_freed(self, freed: Callable[[], bool]) -> None:
        """Wait until the Daemon has freed what was retired."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (not self._retired and freed()))

    def notify(self) -> None:
        """Make every wait look at its condition again."""
        with self._changed:
            self._changed.notify_all()

    def close(self, cause: BaseException | None = None) -> None:
        """End every wait; queued and running requests end with ClosedError, because of `cause` if there is one."""
        with self._changed:
            self._closed = True
            self._cause = self._cause or cause
            waiting, self._requests = list(self._requests), deque()
            for request in self._current:
                request.stopper.stop()
            self._changed.notify_all()
        for request in waiting:
            error = ClosedError("The model was closed before the call began.")
            error.__cause__ = cause
            request.result.set_exception(error)

    def _skip_held(self) -> None:
        while self._place in self._held:
            self._advance()

    def _advance(self) -> None:
        self._place = (self._place + 1) % len(self._resident)
        self._pass_number += self._place == 0

    def _may_pack(self) -> bool:
        return bool(self._to_pack) and not self._packing and not self._stopped

    def _may_draw(self) -> bool:
        # With nothing loaded ahead inference would wait for ever, so one shard may come even when memory is short.
        ahead = self._outstanding or self._ready
        # After a failure inference starts anew: until then the agents would only fail again and again.
        held_back = self._stopped or self._failed or (self._short and ahead)
        busy = self._outstanding - self._packing >= self._loaders
        if held_back or busy or len(self._held) >= len(self._resident):
            return False
        # A shard that is still being loaded for the pass before is not begun for the next one.
        self._skip_held()
        return self._place not in self._loading
