"""Sessions that compute whole numbers: their memory is counted, and they notice shards out of order."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence

from tests.simulation.machine import Machine
from tests.simulation.models import turned, weight_of
from tests.simulation.primitives import RUNNING

from pipeload.errors import ClosedError, LoadError, RunError
from pipeload.format.manifest import Shard
from pipeload.pipeline.session import Stopper, Value, to_array, to_value
from pipeload.planning.footprint import second_copy_bytes, session_bytes
from pipeload.storage.buffers import Part, tensor_in

__all__ = ["SimulatedSession", "Sessions"]


class Sessions:
    """What all sessions of a run have in common.

    Args:
        machine: counts their memory, and lets them fail.
        seconds: that a run takes; making a session takes half of it, packing three times.
    """

    def __init__(self, machine: Machine, seconds: float) -> None:
        self.machine = machine
        self.seconds = seconds
        self._last: weakref.WeakKeyDictionary[Stopper, int] = weakref.WeakKeyDictionary()

    def check_order(self, stopper: Stopper, index: int) -> None:
        """The shards run for each feed in order, each once."""
        before = self._last.get(stopper, -1)
        if index != before + 1:
            RUNNING.scheduler.fail(f"for one call, shard {index} runs after shard {before}")
        self._last[stopper] = index


class SimulatedSession:
    """Stands in for `ShardSession`."""

    sessions: Callable[[], Sessions]

    def __init__(
        self,
        shard: Shard,
        graph: object,
        parts: Sequence[Part],
        threads: int,
        *,
        packed: bool = False,
        copied: bool = False,
        arena: bool = False,
        cores: Collection[int] = (),
    ) -> None:
        self._sessions = SimulatedSession.sessions()
        self._shard = shard
        self._memory = self._sessions.machine.memory
        self.nbytes = 0
        offset = shard.weights.offset if shard.weights else 0
        tensors = [tensor_in(parts, spec, offset) for spec in shard.tensors]
        copy = sum(array.nbytes for array in tensors) if packed and not shard.packed else 0
        own, passing = session_bytes(shard, threads) + copy, second_copy_bytes(shard) if packed else 0
        self._take(own + passing)
        RUNNING.scheduler.sleep(f"session {shard.name}", self._sessions.seconds * (3 if packed else 0.5))
        faults = self._sessions.machine.faults
        faults.may_raise("session", lambda: LoadError(f"onnxruntime refused shard '{shard.name}'"))
        faults.may_raise("session memory", MemoryError)
        self._tensors = [array.copy() for array in tensors] if copied else tensors
        self._take(-passing)

    def run(
        self, inputs: Mapping[str, Value], stopper: Stopper, in_place: Mapping[str, Value] | None = None
    ) -> Sequence[Value]:
        sessions, shard = self._sessions, self._shard
        sessions.check_order(stopper, int(shard.name[1:]))
        RUNNING.scheduler.sleep(f"run {shard.name}", sessions.seconds)
        if stopper.stopped:
            raise ClosedError(f"The call was ended while shard '{shard.name}' ran.")
        sessions.machine.faults.may_raise("run", lambda: RunError(f"Shard '{shard.name}' failed"))
        sessions.machine.faults.may_raise("run memory", MemoryError)
        hidden = to_array(inputs[shard.inputs[0]])
        hidden = hidden[..., 0] if hidden.ndim == 3 else hidden
        return [to_value(turned(hidden, weight_of(self._tensors)))]

    def _take(self, nbytes: int) -> None:
        self._memory.take(nbytes)
        self.nbytes += nbytes

    def __del__(self) -> None:
        self._memory.give(self.nbytes)
