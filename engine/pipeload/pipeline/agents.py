"""Loading, Inference and Daemon Agents: plain loops. `pipeline.py` runs them in threads.

Each loop ends when the exchange is closed. A Loading Agent's failure travels as `Failed` to the Inference Agent, and
the Inference Agent's to the caller; both go on. A failure of the Daemon closes the exchange, since no other agent frees
memory; callers get it as the cause of their ClosedError. A failed recovery does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeload.errors import ClosedError
from pipeload.foreign import chain, let_go
from pipeload.pipeline.exchange import Exchange
from pipeload.pipeline.messages import Failed, Loaded, LoadedShard, Task
from pipeload.pipeline.requests import Call

__all__ = ["answer", "daemon_agent", "inference_agent", "loading_agent"]


def loading_agent(exchange: Exchange, load: Callable[[Task], LoadedShard | None]) -> None:
    """Load shard after shard, in plan order.

    Args:
        exchange: gives tasks and takes messages.
        load: reserves budget, reads, makes the session; returns None when the task became stale meanwhile.
    """
    while (task := exchange.next_task()) is not None:
        message: Loaded | Failed | None = None
        try:
            shard = load(task)
            if shard is not None:
                message = Loaded(task=task, shard=shard)
            del shard
        except BaseException as error:  # SystemExit in a worker must reach the caller too
            let_go(error)
            message = Failed(task=task, error=error)
        exchange.deliver(task, message)
        del message


def inference_agent(exchange: Exchange, recover: Callable[[], None], settle: Callable[[], None]) -> None:
    """Serve one call after the other.

    Args:
        exchange: gives calls.
        recover: brings the pipeline back to the beginning of a pass, after a failed pass that had taken shards.
        settle: called after each call that succeeded, once its caller has the answer.
    """
    while (call := exchange.next_call()) is not None:
        try:
            result = call.work(call)
        except BaseException as error:
            try:
                # A call that was refused before it took a shard leaves the prefetched shards to the next call.
                if exchange.broken:
                    recover()
            except BaseException as failure:  # the set of loaded shards is now unknown
                exchange.close(failure)
            finally:
                answer(exchange, call, error)
                del error
        else:
            answer(exchange, call, result)
            # The pipeline must not keep a result alive while it settles; only the caller may.
            call, result = None, None
            try:
                settle()
            except BaseException as failure:
                let_go(failure)
                exchange.close(failure)
        del call


def daemon_agent(
    exchange: Exchange, free: Callable[[LoadedShard], None], watch: Callable[[], None], watch_s: float
) -> None:
    """Destroy shards that ran, give their memory back, and watch the budget.

    Args:
        exchange: gives retired shards.
        free: destroys one retired shard.
        watch: called when no shard was retired for `watch_s` seconds.
        watch_s: the interval, in seconds.
    """
    try:
        while (shard := exchange.next_retired(watch_s)) is not None or not exchange.closed:
            if shard is None:
                watch()
                continue
            free(shard)
            del shard
            exchange.notify()
    except BaseException as error:
        exchange.close(error)


def answer(exchange: Exchange, call: Call[Any], outcome: object) -> None:
    """Give a call's caller the result, or the error that ended it. A caller that has left gets nothing."""
    waits = call.outcome.set_running_or_notify_cancel()
    if not isinstance(outcome, BaseException):
        if waits:
            call.outcome.set_result(outcome)
        return
    if isinstance(outcome, ClosedError) and exchange.cause is not None:
        for link in chain(exchange.cause):
            # This very error started the recovery that failed: its chain must not lead back here.
            if link.__context__ is outcome:
                link.__context__ = None
        outcome.__cause__ = exchange.cause
    let_go(outcome)
    if waits:
        call.outcome.set_exception(outcome)
