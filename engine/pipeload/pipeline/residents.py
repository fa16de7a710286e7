"""Memory kept between sweeps: resident shards, kept parts of streamed shards, and the packing of resident ones.

Resident shards may be packed while sweeps run, one at a time: a Loading Agent makes the packed copy and swaps it in
while the shard does not run.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from pipeload.pipeline.messages import LoadedShard
from pipeload.storage.buffers import Part

__all__ = ["Residents"]


class Residents:
    """The shards and parts that stay in memory.

    Args:
        changed: the exchange's condition, under whose lock they lie too.
        retire: hands a shard to the Daemon; called under the lock.
    """

    def __init__(self, changed: threading.Condition, retire: Callable[[LoadedShard], None]) -> None:
        self._changed = changed
        self._retire = retire
        self._shards: dict[int, LoadedShard] = {}
        self._parts: dict[int, Sequence[Part]] = {}
        self._running: int | None = None
        self._awaited: int | None = None
        self._to_pack: deque[int] = deque()
        self._busy = False
        self._error: BaseException | None = None

    # Shards

    @property
    def shards(self) -> dict[int, LoadedShard]:
        """Place in the model -> the resident shard, for all resident shards in memory now."""
        with self._changed:
            return dict(self._shards)

    def borrow(self, index: int) -> LoadedShard | None:
        """The resident shard, which the caller must give back; None when it is not in memory.

        Raises:
            BaseException: the error of a failed packing of a resident shard.
        """
        with self._changed:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            shard = self._shards.get(index)
            self._running = index if shard else None
            return shard

    def give_back(self, index: int, shard: LoadedShard) -> None:
        """Give back a shard that ran; it stays."""
        with self._changed:
            self._running = None
            self._shards.setdefault(index, shard)
            # No other agent waits for it, and waking them all after each shard takes longer than a small shard runs.
            if self._awaited == index:
                self._changed.notify_all()

    def drop(self, index: int) -> None:
        """Retire a resident shard; only while the Loading Agents are stopped."""
        with self._changed:
            self._retire(self._shards.pop(index))
            self._changed.notify_all()

    # Parts

    @property
    def parts(self) -> dict[int, Sequence[Part]]:
        """Place in the model -> the parts of that shard that stay; their memory is reserved apart from the shards'."""
        with self._changed:
            return dict(self._parts)

    def keep(self, index: int, parts: Sequence[Part]) -> None:
        """Keep these parts of a streamed shard in memory from now on."""
        with self._changed:
            self._parts[index] = parts

    def forget(self, index: int) -> Sequence[Part]:
        """Stop keeping parts; the caller closes and releases them. Only while the Loading Agents are stopped."""
        with self._changed:
            return self._parts.pop(index)

    # Packing

    @property
    def packing(self) -> bool:
        """Whether a resident shard is being packed or waits for packing."""
        with self._changed:
            return self._busy or bool(self._to_pack)

    @property
    def busy(self) -> bool:
        """Whether a Loading Agent packs a shard now."""
        return self._busy

    def pack(self, indices: Iterable[int]) -> None:
        """Let the Loading Agents pack these resident shards, one after another."""
        with self._changed:
            self._to_pack = deque(indices)
            self._changed.notify_all()

    @property
    def may_pack(self) -> bool:
        """Whether a Loading Agent may begin to pack a shard; the caller holds the lock."""
        return bool(self._to_pack) and not self._busy

    def begin_packing(self) -> int:
        """The shard that the caller is to pack, until it calls `end_packing`; the caller holds the lock."""
        self._busy = True
        return self._to_pack.popleft()

    def end_packing(self, error: BaseException | None = None) -> None:
        """The packing succeeded or failed: the next may begin. The next `borrow` raises the error."""
        with self._changed:
            self._busy = False
            self._error = error or self._error
            self._changed.notify_all()

    def swap(self, index: int, packed: LoadedShard, stale: Callable[[], bool]) -> bool:
        """Replace the loaded shard by its packed copy while it does not run, and retire the shard that is replaced.

        Returns:
            False when the packing had become stale: then the packed copy was retired instead.
        """
        with self._changed:
            self._awaited = index
            self._changed.wait_for(lambda: stale() or self._running != index)
            self._awaited = None
            old, wanted = packed, not stale()
            if wanted:
                old = self._shards[index]
                packed.reserved_bytes, old.reserved_bytes = old.reserved_bytes, 0
                self._shards[index] = packed
            self._retire(old)
            self._changed.notify_all()
            return wanted
