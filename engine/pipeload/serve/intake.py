"""Memory for the bodies of requests: of all of them together, from their first byte to the end of their answers.

```
free of weights, always        LIMITS.bodies_bytes, part of what the budget keeps beside models
taken from weights, on demand  up to a part of the budget, while open models keep what they need to run
beyond that                    503 with Retry-After
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeload.errors import BudgetError
from pipeload.machine.sizes import format_bytes
from pipeload.serve.errors import ApiError
from pipeload.serve.settings import LIMITS

if TYPE_CHECKING:
    from pipeload.budget import Budget
    from pipeload.planning.shares import Share

__all__ = ["Held", "Intake"]

_PART = 4
"""Of the budget, one part of this many is the most that bodies take from weights."""
_UNKNOWN_BYTES = 64 << 20
"""The same where the budget follows free memory."""


class Intake:
    """What all requests hold.

    Args:
        budget: gives the one that all models share.
        executor: waits for weights to give way.

    Attributes:
        free_bytes: that no request has of those that are always free of weights.
        taken_bytes: that requests have in the place of weights.
    """

    def __init__(self, budget: Callable[[], Budget], executor: Executor) -> None:
        self._budget, self._executor = budget, executor
        self.free_bytes = LIMITS.bodies_bytes
        self.taken_bytes = 0

    @contextmanager
    def request(self) -> Iterator[Held]:
        """What one request holds; it is given back at the end."""
        held = Held(self)
        try:
            yield held
        finally:
            held.give_back()

    async def share(self, nbytes: int) -> Share:
        """Memory in the place of weights.

        Raises:
            ApiError: there is none now.
        """
        budget = self._budget()
        most = _UNKNOWN_BYTES if budget.budget_bytes is None else budget.budget_bytes // _PART
        if self.taken_bytes + nbytes > most:
            raise _refusal(
                f"Requests that are being read have {format_bytes(self.taken_bytes)} of {format_bytes(most)}."
            )
        # At once: others may ask while this one waits.
        self.taken_bytes += nbytes
        made = asyncio.get_running_loop().run_in_executor(self._executor, budget.fixed, nbytes)
        try:
            return await asyncio.shield(made)
        except asyncio.CancelledError:
            made.add_done_callback(_leave)
            self.taken_bytes -= nbytes
            raise
        except BudgetError as error:
            self.taken_bytes -= nbytes
            raise _refusal(f"The models need their memory. {error}") from error


class Held:
    """What one request holds.

    Args:
        intake: where it is counted.

    Attributes:
        nbytes: that it may take.
    """

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._shares: list[tuple[Share, int]] = []
        self._free_bytes = 0
        self.nbytes = 0

    async def grow(self, nbytes: int) -> None:
        """Let it take this many bytes in all.

        Raises:
            ApiError: there is no memory for them now.
        """
        more = nbytes - self.nbytes
        if more <= 0:
            return
        if more <= self._intake.free_bytes:
            self._intake.free_bytes -= more
            self._free_bytes += more
        else:
            self._shares.append((await self._intake.share(more), more))
        self.nbytes = nbytes

    def give_back(self) -> None:
        """Hold nothing any more."""
        self._intake.free_bytes += self._free_bytes
        for share, nbytes in self._shares:
            share.leave()
            self._intake.taken_bytes -= nbytes
        self._shares.clear()
        self.nbytes = self._free_bytes = 0


def _refusal(why: str) -> ApiError:
    return ApiError(
        503,
        f"There is no memory for this request now. {why} Try again later, or send less at once.",
        code="no_memory_for_request",
        retry_after_s=1,
    )


def _leave(made: asyncio.Future[Share]) -> None:
    if not made.cancelled() and made.exception() is None:
        made.result().leave()
