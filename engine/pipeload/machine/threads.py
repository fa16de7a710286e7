"""Jobs that run at the same time, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["THREADS_REMEDY", "Result", "together"]

Result = TypeVar("Result")

THREADS_REMEDY = (
    "Raise the limit of processes and threads (ulimit -u, or pids.max of the cgroup), or end other programs."
)


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
            thread.start()
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
