"""Clients that ask without a pause, each one request after another: an order on the command line, a report on stdout.

Every answer is held against the one that the order has.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import msgspec
import numpy as np

from benchmarks.serving.workload import PARTS, Asked, Kind, asked
from pipeload.bench.spec import from_json, to_json

__all__ = ["Order", "Seen", "Told"]

_CONNECT_S = 30.0
_TOLERANCE = 1e-3
"""Of a component of a vector of length 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The work of the clients.

    Attributes:
        address: of the server.
        part: see `PARTS`.
        clients: their number.
        seconds: as long as they begin requests.
        grace_s: after that, answers that have begun may end.
        seed: of what they ask.
        answers: question -> the greedy answer of the most tokens; empty for none.
        vectors: the vectors of all texts; empty for none.
    """

    address: str
    part: str
    clients: int
    seconds: float
    grace_s: float
    seed: int
    answers: dict[int, str] = field(default_factory=dict)
    vectors: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One request.

    Attributes:
        kind: of the request.
        first_s: until the first piece of the answer's text; None if none came.
        total_s: until the end, or until it was given up.
        items: tokens (pieces of a stream) or texts that came within `Order.seconds`.
        done: it ended within that time.
        fault: why there is no answer, or "unfinished"; None if there is one.
        right: the answer is the expected one.
    """

    kind: Kind
    first_s: float | None
    total_s: float
    items: int
    done: bool
    fault: str | None
    right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """The report."""

    seen: tuple[Seen, ...]


class _FaultError(Exception):
    """An answer that is none."""


class _Clients:
    def __init__(self, order: Order) -> None:
        self._order = order
        self._vectors = np.array(order.vectors, np.float32)
        self._end_s = 0.0
        self.seen: list[Seen] = []

    async def run(self) -> Told:
        order = self._order
        limits = httpx2.Limits(max_connections=order.clients, max_keepalive_connections=order.clients)
        timeout = httpx2.Timeout(None, connect=_CONNECT_S)
        async with httpx2.AsyncClient(base_url=order.address, limits=limits, timeout=timeout) as http:
            # A client takes a while to make, which is no load.
            self._end_s = time.perf_counter() + order.seconds
            tasks = [asyncio.ensure_future(self._one(http, number)) for number in range(order.clients)]
            _, late = await asyncio.wait(tasks, timeout=order.seconds + order.grace_s)
            for task in late:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
        return Told(seen=tuple(self.seen))

    async def _one(self, http: httpx2.AsyncClient, number: int) -> None:
        requests = asked(PARTS[self._order.part], 1000 * self._order.seed + number)
        while time.perf_counter() < self._end_s:
            await self._ask(http, next(requests))

    async def _ask(self, http: httpx2.AsyncClient, request: Asked) -> None:
        begin_s, first_s, items = time.perf_counter(), None, 0
        fault: str | None = "unfinished"
        text, right = "", False
        try:
            if request.kind == "chat":
                async for piece in _pieces(http, request):
                    now_s = time.perf_counter()
                    first_s = first_s or now_s - begin_s
                    items += now_s <= self._end_s
                    text += piece
                right = self._is_right(request, text)
            else:
                vectors = await _vectors(http, request)
                items = len(vectors) * (time.perf_counter() <= self._end_s)
                expected = self._vectors[list(request.indices)]
                right = vectors.shape == expected.shape and bool(np.abs(vectors - expected).max() < _TOLERANCE)
            fault = None
        except (_FaultError, httpx2.HTTPError, msgspec.MsgspecError, ValueError) as error:
            fault = str(error) if isinstance(error, _FaultError) else type(error).__name__
            # A server that has gone answers at once.
            await asyncio.sleep(0.2)
        finally:
            end_s = time.perf_counter()
            self.seen.append(
                Seen(
                    kind=request.kind,
                    first_s=first_s,
                    total_s=end_s - begin_s,
                    items=items,
                    done=fault is None and end_s <= self._end_s,
                    fault=fault,
                    right=right,
                )
            )

    def _is_right(self, request: Asked, text: str) -> bool:
        expected = self._order.answers[request.indices[0]]
        return bool(text) and expected.startswith(text)


async def _pieces(http: httpx2.AsyncClient, request: Asked) -> AsyncIterator[str]:
    async with http.stream("POST", request.path, json=request.body) as answer:
        if answer.status_code != 200:
            raise _FaultError(str(answer.status_code))
        ended = False
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ended = True
                continue
            event = msgspec.json.decode(line[6:])
            if "error" in event:
                raise _FaultError(f"error in the stream: {event['error'].get('code')}")
            for choice in event.get("choices", ()):
                if text := choice.get("delta", {}).get("content"):
                    yield text
        if not ended:
            raise _FaultError("stream without an end")


async def _vectors(http: httpx2.AsyncClient, request: Asked) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    answer = await http.post(request.path, json=request.body)
    if answer.status_code != 200:
        raise _FaultError(str(answer.status_code))
    return np.array([one["embedding"] for one in msgspec.json.decode(answer.content)["data"]], np.float32)


if __name__ == "__main__":
    told = asyncio.run(_Clients(from_json(Path(sys.argv[1]).read_bytes(), Order)).run())
    sys.stdout.buffer.write(to_json(told))
