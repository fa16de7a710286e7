"""Jobs that run at the same time, each in a thread of its own."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["THREADS_REMEDY", "Result", "start", "together"]

Result = TypeVar("Result")

THREADS_REMEDY = (
    "Raise the limit of processes and threads (ulimit -u, or pids.max of the cgroup), or end other programs."
)

_STACK_BYTES, _MOST_STACK_BYTES = 8 << 20, 64 << 20
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0)
_BEGIN_BYTES = 4 << 20
"""What the interpreter allocates in a new thread before that has begun: arenas of 1 MiB, and the heap's growth."""


def start(thread: threading.Thread) -> None:
    """Start a thread, or raise where the process has no address space for one.

    A thread that finds no memory before it has begun ends without a sign, and `Thread.start` waits for that sign for
    ever (CPython's issue 140746).

    Raises:
        MemoryError: there is no room for its stack and its beginning (`ulimit -v`).
        RuntimeError: the system starts no more threads.
    """
    stack = threading.stack_size() or resource.getrlimit(resource.RLIMIT_STACK)[0]
    stack = min(stack, _MOST_STACK_BYTES) if stack > 0 else _STACK_BYTES
    try:
        # Nothing is touched: it takes no memory.
        mmap.mmap(-1, stack + _BEGIN_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE).close()
    except (OSError, MemoryError, ValueError) as error:
        lack = os.strerror(errno.ENOMEM)
        raise MemoryError(f"{lack}: the process has no address space left for its stack (ulimit -v)") from error
    thread.start()


def together(jobs: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run jobs at the same time, each in a thread of its own. Returns their results, in order.

    All begin when all threads are there, so jobs may wait for one another; none begins when a thread cannot be
    started. All have ended when this returns or raises, unless it is interrupted twice.

    Raises:
        BaseException: the exception of the first job that failed.
    """
    begin = threading.Event()
    futures: list[Future[Result]] = [Future() for _ in jobs]

    def work(job: Callable[[], Result], future: Future[Result]) -> None:
        begin.wait()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                future.set_exception(error)

    threads = [
        threading.Thread(target=work, args=pair, name=f"pipeload-loader-{i}", daemon=True)
        for i, pair in enumerate(zip(jobs, futures, strict=True))
    ]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            start(thread)
            started.append(thread)
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    finally:
        begin.set()
        try:
            for thread in started:
                thread.join()
        except BaseException:
            for thread in started:
                thread.join()
            raise
    return [future.result() for future in futures]
