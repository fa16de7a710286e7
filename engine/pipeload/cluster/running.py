"""A process of the cluster: a loop that runs until a signal ends it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable

__all__ = ["until_stopped"]


def until_stopped(run: Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]) -> None:
    """Run a coroutine function, whose argument waits for SIGINT or SIGTERM."""

    async def main() -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
        await run(stopped.wait)

    asyncio.run(main())
