"""How fast messages go from one node to another, measured over the connections that activations take."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

__all__ = ["PIECE_BYTES", "Link", "measured"]

PIECE_BYTES = 1 << 20
"""Caches go from node to node in pieces of about this size."""

_SMALL, _LARGE = 10, 3
"""Messages without data, and with them. The fastest of each counts: others waited for other work."""
_BYTES = 1_000_000
_ENOUGH_S = 0.5
"""After this time no other large message is sent: a slow link is measured well by one."""
_LEAST_SHARE = 0.1
"""Of a large message's time, which its data take at least: below that the clock measures chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The way from one node to another; the way back is taken to be as fast.

    Attributes:
        latency_s: seconds until a message without data is there, the software's part included.
        bytes_per_s: of data.
    """

    latency_s: float
    bytes_per_s: float

    def seconds(self, nbytes: float) -> float:
        """The time until a message is there."""
        return self.latency_s + nbytes / self.bytes_per_s


async def measured(other: Any) -> Link:
    """The link to another node.

    Args:
        other: Dask's connections to it.
    """
    there_and_back = min([await _seconds(other, b"") for _ in range(_SMALL)])
    data, begin_s = os.urandom(_BYTES), time.perf_counter()
    found: list[float] = []
    while len(found) < _LARGE and (not found or time.perf_counter() - begin_s < _ENOUGH_S):
        found.append(await _seconds(other, data))
    large = min(found)
    return Link(latency_s=there_and_back / 2, bytes_per_s=_BYTES / max(large - there_and_back, _LEAST_SHARE * large))


async def _seconds(other: Any, data: bytes) -> float:
    begin_s = time.perf_counter()
    await other.pipeload_take(data=data)
    return time.perf_counter() - begin_s
