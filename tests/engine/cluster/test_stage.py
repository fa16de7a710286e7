"""A node that its user stops is lost for the calls that it has, which are tried on others."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from distributed import Status

import pipeload
from pipeload.cluster import stage as stages
from pipeload.cluster.messages import NodeLostError, Place
from pipeload.cluster.pace import Series
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


@pytest.mark.parametrize("sizes", [(1, 2), range(1000, 1100)], ids=["two", "growing"])
@pytest.mark.parametrize("there_s", [0.0, 5.0])
def test_a_stage_tells_how_long_its_arrays_are_on_the_way(
    monkeypatch: pytest.MonkeyPatch, there_s: float, sizes: Sequence[int]
) -> None:
    """Whatever the stages behind take, and arrays of other sizes; also where they grow with each token."""
    growing = cycle(sizes)
    made, now_s, way_s = _stage(Status.running), 0.0, 0.01

    async def actor_execute(args: list[Any], **_: object) -> dict[str, Any]:
        nonlocal now_s
        (arrays,) = (each.data for each in args if isinstance(each.data, dict))
        now_s += way_s * arrays["edge"].nbytes + there_s
        return {"status": "OK", "result": there_s}

    monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter=lambda: now_s))
    made._worker.rpc = lambda _: SimpleNamespace(actor_execute=actor_execute)
    made._ways["way"].passes = frozenset({"edge"})
    made._node.sends = defaultdict(Series)

    def factor(passes: int) -> float:
        for _ in range(passes):
            array = np.zeros(next(growing), np.float32)
            asyncio.run(made._pass_on("run", "way", "1", {"edge": array, "other": array}))
        told: dict[str, float] = made._facts["links"]
        assert told.keys() == {"tcp://next"}
        return told["tcp://next"]

    assert factor(20) == pytest.approx(1.0, rel=0.1)
    way_s = 0.08
    assert factor(20) == pytest.approx(8.0, rel=0.1)
    way_s = 0.01
    assert factor(20) == pytest.approx(1.0, rel=0.1)


def test_a_stage_without_a_next_one_sends_nothing() -> None:
    made = _stage(Status.running)
    made._ways["way"] = SimpleNamespace(following=None, passes=frozenset())
    made._answers = {}
    asyncio.run(made._pass_on("run", "way", "", {}))
    assert "links" not in made._facts
