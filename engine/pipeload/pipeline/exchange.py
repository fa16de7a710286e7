"""Where the agents meet: tasks, messages and signals under one lock.

```
 callers --submit--> [calls] -------next----> Inference Agent
                                                      |  take (waits for `ready`)
 Loading Agents <--next_task-- [schedule]             v
        |                                          run shard
        '----deliver: Loaded | Failed ("ready")-->    |  give_back ("free")
                                                      v
 Loading Agents <--"stop" / "resume"-- Daemon Agent <-'
```

Shards are drawn in plan order, round and round: after the last shard of a pass comes the first of the next. A shard
that is planned to be resident is drawn once and then left out. Resident shards with the same weights are loaded one
after another: the first reads them, and the others find them in memory. Every draw has a ticket; inference consumes
tickets in order. `reset` starts a new *epoch*: shards that were drawn or loaded before it are thrown away.

Calls (`requests`) and resident shards (`residents`) lie under the same lock, in objects of their own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from pipeload.errors import ClosedError
from pipeload.pipeline.messages import Failed, Loaded, LoadedShard, Task
from pipeload.pipeline.requests import Call, Calls
from pipeload.pipeline.residents import Residents

__all__ = ["Exchange"]


class Exchange:
    """The state that the agents share. Every wait ends when it is closed.

    Attributes:
        calls: the waiting calls, and the calls being served.
        residents: the shards and parts that stay in memory between sweeps.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed = False
        self._cause: BaseException | None = None
        self._retired: deque[LoadedShard] = deque()
        self.calls = Calls(self._changed)
        self.residents = Residents(self._changed, self._retired.append)
        self._resident: tuple[bool, ...] = ()
        self._weights: Sequence[int] = ()
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
        self._pass_number = 1

    # Loading Agents

    def next_task(self) -> Task | None:
        """The next shard to load, waiting while stopped or while no shard is due; None when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._may_pack() or self._may_draw())
            if self._closed:
                return None
            packs = self._may_pack()
            self._outstanding += 1
            if packs:
                index = self.residents.begin_packing()
                return Task(ticket=-1, index=index, resident=True, epoch=self._epoch, packing=True)
            task = Task(
                ticket=self._next_ticket,
                index=self._place,
                resident=self._resident[self._place],
                epoch=self._epoch,
                pass_number=self._pass_number,
            )
            if task.resident:
                self._held.add(task.index)
            self._loading.add(self._weights[task.index])
            self._advance()
            self._next_ticket += 1
            return task

    def is_stale(self, task: Task) -> bool:
        """Whether this shard is no longer needed."""
        return self._closed or task.epoch != self._epoch

    def deliver(self, task: Task, message: Loaded | Failed | None) -> None:
        """Signal `ready` for a task (None: it was cancelled). A shard of an old epoch goes to the Daemon at once."""
        with self._changed:
            self._outstanding -= 1
            if task.packing:
                self.residents.end_packing(message.error if isinstance(message, Failed) else None)
            else:
                self._loading.discard(self._weights[task.index])
                if message is not None and not self.is_stale(message.task):
                    self._ready[message.task.ticket] = message
                    self._failed = self._failed or isinstance(message, Failed)
                elif isinstance(message, Loaded):
                    self._retired.append(message.shard)
            self._changed.notify_all()

    # Inference Agent

    def next_call(self) -> Call[Any] | None:
        """The next call to serve; None when closed."""
        call = self.calls.next()
        self._broken = False
        return call

    def take(self, index: int, *calls: Call[Any]) -> tuple[Task, LoadedShard]:
        """Wait until the shard is ready. It must be the next one in ticket order.

        Raises:
            ClosedError: the exchange was closed, or all of the calls were withdrawn.
            BaseException: the error of the failed load.
        """

        def stopped() -> bool:
            return all(call.feed.stopper.stopped for call in calls)

        with self._changed:
            ticket = self._expected_ticket
            self._changed.wait_for(lambda: self._closed or stopped() or ticket in self._ready)
            if self._closed:
                raise self._ended()
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

    def retire(self, shard: LoadedShard) -> None:
        """Hand a shard that ran to the Daemon (signal `free`)."""
        with self._changed:
            self._retired.append(shard)
            self._changed.notify_all()

    # Daemon Agent

    def next_retired(self, patience_s: float | None = None) -> LoadedShard | None:
        """The next shard to destroy; None when closed and empty, or when none came within `patience_s`."""
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
        """The error that made an agent close the exchange, if any."""
        return self._cause

    @property
    def stopped(self) -> bool:
        """Whether the Loading Agents wait for a `start`."""
        return self._stopped

    @property
    def broken(self) -> bool:
        """Whether the next sweep cannot use the loaded shards: the call being served took one of them, or a load has
        failed.
        """
        with self._changed:
            return self._broken or self._failed

    def start(
        self, resident: Sequence[bool], loaders: int, pass_number: int = 1, weights: Sequence[int] | None = None
    ) -> None:
        """Let the Loading Agents begin at the first shard of a pass.

        Args:
            resident: for each shard, whether it stays in memory after it ran.
            loaders: the number of agents that may load at the same time; one more may pack.
            pass_number: the number of the pass that they begin with.
            weights: for each shard, a number that it has in common with those that are to share its memory; None when
                no shard shares any.

        Raises:
            ClosedError: the exchange was closed; then `reset` has waited for no agent.
        """
        with self._changed:
            if self._closed:
                raise self._ended()
            assert not self._outstanding, "reset before start"
            self._resident = tuple(resident)
            self._weights = range(len(resident)) if weights is None else weights
            self._loaders = loaders
            self._held = set(self.residents.shards)
            self._place = 0
            self._pass_number = pass_number
            self._stopped = False
            self._changed.notify_all()

    def reset(self, wake: Callable[[], None]) -> None:
        """Stop the Loading Agents, wait until none works, and hand all ready shards to the Daemon.

        Args:
            wake: makes Loading Agents that wait for budget check whether their tasks are stale.
        """
        with self._changed:
            self._stopped = True
            self._epoch += 1
            self.residents.pack(())
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
        """Wait until the Daemon has freed the retired shards."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (not self._retired and freed()))

    def notify(self) -> None:
        """Make every wait check its condition again."""
        with self._changed:
            self._changed.notify_all()

    def close(self, cause: BaseException | None = None) -> None:
        """End every wait; waiting and running calls end with ClosedError, raised from `cause` if there is one."""
        with self._changed:
            self._closed = True
            self._cause = self._cause or cause
            self._changed.notify_all()
        self.calls.close(cause)

    def _ended(self) -> ClosedError:
        """The error for a call that was running when the exchange was closed."""
        error = ClosedError("The model was closed during the call.")
        error.__cause__ = self._cause
        return error

    def _skip_held(self) -> None:
        while self._place in self._held:
            self._advance()

    def _advance(self) -> None:
        self._place = (self._place + 1) % len(self._resident)
        self._pass_number += self._place == 0

    def _may_pack(self) -> bool:
        return self.residents.may_pack and not self._stopped

    def _may_draw(self) -> bool:
        # Without a prefetched shard inference would wait for ever, so one shard may come even when memory is short.
        ahead = self._outstanding or self._ready
        # After a failure inference starts anew: until then the agents would only fail again and again.
        held_back = self._stopped or self._failed or (self._short and ahead)
        busy = self._outstanding - self.residents.busy >= self._loaders
        if held_back or busy or len(self._held) >= len(self._resident):
            return False
        # A shard that is still loading for one pass is not begun for the next, nor one whose weights another one reads.
        self._skip_held()
        return self._weights[self._place] not in self._loading
