"""Who has the memory of one budget: each of its models a fixed share, but for the holder, which has the rest.

```
budget  ------------------------------
        | the holder: all the rest   |
        |----------------------------|
        | a fixed share              |
        |----------------------------|
        | a fixed share              |
        |----------------------------|
        | process, runtime           |
0       ------------------------------
```

A share that becomes smaller is smaller for its own plans first, and for the others once its memory was given back; one
that becomes larger the other way round. So the shares never sum up to more than the budget.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

__all__ = ["Share", "Shares"]


class Share:
    """What one model may use of a budget, beside the process.

    Args:
        shares: those of all models of the budget.
        usable_bytes: see below.
        brought_bytes: memory that stays in the process because the model was opened, such as its tokenizer.
        fixed: the share is never asked for memory, and never holds the rest: that of a draft.

    Attributes:
        usable_bytes: for passes, caches and weights, as its own plans see it; None of the holder.
        counted_bytes: the same as the other models' plans see it.
        occupied: tells the bytes that its weights occupy now.
        last_pass: the number of its latest pass among those of all models; opening counts as one.
        asked_pass: the number of its latest pass when it was last asked for memory.
        give_up: closes the model, and returns whether it was open; None where it is no luxury.
        give_back: closes caches that are kept for later, until they had as many bytes as it is called with; None where
            none are kept.
    """

    def __init__(self, shares: Shares, usable_bytes: int | None, brought_bytes: int, *, fixed: bool) -> None:
        self._shares = shares
        self.usable_bytes = usable_bytes
        self.counted_bytes = usable_bytes or 0
        self.brought_bytes = brought_bytes
        self.fixed = fixed
        self.occupied: Callable[[], int] = _nothing
        self.give_up: Callable[[str], bool] | None = None
        self.give_back: Callable[[int], object] | None = None
        self.last_pass = self.asked_pass = 0

    @property
    def alone(self) -> bool:
        """Whether no other model has the budget."""
        return not self._shares.others(self)

    @property
    def standing(self) -> tuple[int | None, int]:
        """What the share is made of: it stays the same until memory is moved."""
        return self.usable_bytes, sum(one.counted_bytes for one in self._shares.others(self))

    def beside_bytes(self, room_bytes: int) -> int:
        """Memory that is left to the other models.

        Args:
            room_bytes: what the process may use beside itself.
        """
        if self.usable_bytes is not None:
            return max(0, room_bytes - self.usable_bytes)
        return sum(one.counted_bytes + one.brought_bytes for one in self._shares.others(self))

    def idle_bytes(self, beside_bytes: int) -> int:
        """The part of this memory that the other models do not occupy now, or occupy for passes and caches."""
        occupied = sum(one.occupied() + one.brought_bytes for one in self._shares.others(self))
        return max(0, beside_bytes - occupied)

    def pass_begins(self) -> None:
        """Number the pass that begins."""
        self.last_pass = self._shares.next_pass()

    @contextmanager
    def becoming(self, usable_bytes: int, heir: Share | None = None) -> Iterator[None]:
        """Make do with a smaller share; it stays if the body gives back what has no place in it.

        Args:
            usable_bytes: the new share.
            heir: holds the rest from then on, where this share holds it now.
        """
        before = self.usable_bytes
        self.usable_bytes = usable_bytes if before is None else min(before, usable_bytes)
        try:
            yield
        except BaseException:
            self.usable_bytes = None if self._shares.holder is self else before
            raise
        self._shares.settle(self, heir)

    def leave(self) -> None:
        """Let the others have the share: the model is closed. May be called again."""
        self._shares.leave(self)


class Shares:
    """All shares of a budget. May be used from any thread.

    Attributes:
        opened: shares of the open models, drafts included.
        holder: the share that has the rest; None while no model is open.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = count(1)
        self.opened: tuple[Share, ...] = ()
        self.holder: Share | None = None

    def add(self, fixed_bytes: int | None = None, brought_bytes: int = 0) -> Share:
        """A new share.

        Args:
            fixed_bytes: of a draft; None for a model, which holds the rest, or has nothing where another one holds it.
            brought_bytes: see `Share`.
        """
        with self._lock:
            fixed = fixed_bytes is not None
            holds = not fixed and self.holder is None
            share = Share(self, None if holds else fixed_bytes or 0, brought_bytes, fixed=fixed)
            self.opened = (*self.opened, share)
            if holds:
                self.holder = share
        share.pass_begins()
        return share

    def others(self, share: Share) -> tuple[Share, ...]:
        """All shares but this one."""
        return tuple(one for one in self.opened if one is not share)

    def next_pass(self) -> int:
        """The number of a pass that begins now."""
        return next(self._numbers)

    def settle(self, share: Share, heir: Share | None) -> None:
        """Count a share as it is now, whose memory was given back; see `Share.becoming`."""
        with self._lock:
            if share is self.holder and heir in self.opened:
                self._hold(heir)
            elif share is self.holder:
                # The heir was closed meanwhile.
                share.usable_bytes = None
            share.counted_bytes = share.usable_bytes or 0

    def leave(self, share: Share) -> None:
        """Let the others have a share; the model that was called last holds the rest where this one did."""
        share.occupied = _nothing
        with self._lock:
            self.opened = self.others(share)
            for one in self.opened:
                one.asked_pass = 0
            if share is self.holder:
                models = [one for one in self.opened if not one.fixed]
                self._hold(max(models, key=lambda one: one.last_pass, default=None))

    def _hold(self, share: Share | None) -> None:
        self.holder = share
        if share is not None:
            share.usable_bytes, share.counted_bytes = None, 0


def _nothing() -> int:
    return 0
