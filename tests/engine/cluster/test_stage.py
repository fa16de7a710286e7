"""A node that its user stops is lost for the calls that it has, which are tried on others."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Status

import pipeload
from pipeload.cluster.messages import NodeLostError, Place
from pipeload.cluster.stage import Stage
from pipeload.pipeline.callers import Caller

CLOSED = RuntimeError("ConnectionPool is closed")


def _stage(status: Status, threads: ThreadPoolExecutor | None = None, failure: Exception = CLOSED) -> Any:
    """A stage as far as it passes calls on and computes; Dask makes whole ones."""

    async def actor_execute(**_: object) -> None:
        raise failure

    made: Any = object.__new__(Stage)
    made._worker = SimpleNamespace(
        address="tcp://own", status=status, rpc=lambda _: SimpleNamespace(actor_execute=actor_execute)
    )
    made._node = SimpleNamespace(offer=SimpleNamespace(name="own"))
    following = Place(node="next", address="tcp://next", key="stage")
    made._ways = {"way": SimpleNamespace(following=following, passes=frozenset())}
    made._threads, made._calls, made._facts = threads, [], {"calls": 0}
    return made


@pytest.mark.parametrize(
    ("status", "failure", "lost"),
    [
        (Status.closing, CLOSED, "own"),
        (Status.closing, OSError("its connections end first"), "own"),
        (Status.running, CLOSED, "own"),
        (Status.running, OSError("cut off"), "next"),
    ],
)
def test_a_node_that_ends_tells_that_it_is_lost_and_not_the_next_one(
    status: Status, failure: Exception, lost: str
) -> None:
    with pytest.raises(NodeLostError, match=f"node {lost}") as told:
        asyncio.run(_stage(status, failure=failure)._pass_on("run", "way", "1", {}))
    assert told.value.address == f"tcp://{lost}"


@pytest.mark.parametrize(("status", "kind"), [(Status.closing, NodeLostError), (Status.running, pipeload.ClosedError)])
def test_a_model_that_ends_with_its_node_is_lost_with_it(status: Status, kind: type[Exception]) -> None:
    def closed() -> None:
        raise pipeload.ClosedError("The model is closed.")

    with ThreadPoolExecutor(1) as threads, pytest.raises(pipeload.PipeloadError) as told:
        asyncio.run(_stage(status, threads)._in_thread(closed, None, Caller()))
    assert type(told.value) is kind
