"""The order that a program gets, the times of its tokens, and its report. Standard library only: see the package."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeload.bench.cgroup import read_bytes

__all__ = ["Order", "Step", "decode", "read_order", "tell"]

Step = Callable[[list[int]], tuple[int, float]]
"""New token ids -> the likeliest next one, and its log-probability. It remembers the ids before."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The work of a contender.

    Attributes:
        model: its own form of the weights.
        prompt: token ids to begin with.
        tokens: number to generate; 0 only opens the model.
        threads: that compute.
        resident_bytes: weights to keep in memory, for an engine that has to be told.
        copied: those weights are copied out of their memory-mapped files.
        again: give the prompt once more, behind the answer, and time it.
        as_stored: use weights as they lie in their files, and do not lay them out for the processor in other memory.
        servers: addresses of other processes of the engine, which compute parts of the model.
        served: the model's last layers, by their numbers, that each of them gets; its head counts as a layer, the last
            one. Empty leaves all layers to them, in parts that the engine chooses.
    """

    model: str
    prompt: list[int]
    tokens: int
    threads: int
    resident_bytes: int = 0
    copied: bool = False
    again: bool = False
    as_stored: bool = False
    servers: list[str] = field(default_factory=list)
    served: list[int] = field(default_factory=list)


class _Laps:
    """Seconds and bytes from the disk of each token, since this was made."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.read_bytes: list[int] = []
        self._read_bytes = read_bytes()
        self._time_s = time.perf_counter()

    def lap(self) -> None:
        """A token is there."""
        time_s, read = time.perf_counter(), read_bytes()
        self.seconds.append(time_s - self._time_s)
        self.read_bytes.append(read - self._read_bytes)
        self._time_s, self._read_bytes = time_s, read


def read_order() -> Order:
    """The order on the command line."""
    return Order(**json.loads(sys.argv[1]))


def tell(facts: dict[str, Any]) -> None:
    """The answer: the last line on standard output."""
    print(json.dumps(facts), flush=True)


def decode(order: Order, open_model: Callable[[], Step], library: str) -> dict[str, Any]:
    """Open a model and continue the prompt greedily, and return the report. Opening counts for the first token."""
    laps = _Laps()
    step = open_model()
    token_ids: list[int] = []
    logprobs: list[float] = []
    new = order.prompt
    for _ in range(order.tokens):
        token, logprob = step(new)
        laps.lap()
        token_ids.append(token)
        logprobs.append(logprob)
        new = [token]
    again_s = None
    if order.again:
        begin_s = time.perf_counter()
        step(new + order.prompt[1:])
        again_s = time.perf_counter() - begin_s
    return {
        "library": library,
        "again_s": again_s,
        "token_ids": token_ids,
        "logprobs": logprobs,
        "seconds": laps.seconds,
        "read_bytes": laps.read_bytes,
    }
