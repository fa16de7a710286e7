"""Whether a node has become slower with a model: the times of its passes against the best ones of passes like them.

A profile says how fast a node is; texts of other lengths, and neighbours that share its memory, take other times than
those of the profile. So passes are compared with earlier ones of the same sizes on the same node, and the factor
between them is what placement multiplies the profile's times by. It is 1 on a node that is as fast as it ever was.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from math import inf
from statistics import median

from pipeload.tracing.stats import PassStats

__all__ = ["Pace", "Series"]

_WINDOW = 5
"""A time is the median of this many passes: once may be chance."""
_KINDS = 64
_LEAST_READ_BYTES = 1 << 20
"""Less is read too quickly to tell anything about the storage."""


@dataclass(slots=True)
class _Kind:
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    best: float = inf


class Series:
    """Times of one node for one kind of work."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._ratios: deque[float] = deque(maxlen=_WINDOW)

    @property
    def slowness(self) -> float:
        """The time that work takes now over the best time that such work ever took here; at least 1."""
        return max(1.0, median(self._ratios)) if len(self._ratios) == _WINDOW else 1.0

    def note(self, kind: Hashable, seconds: float) -> None:
        """Take the time of a piece of work.

        Args:
            kind: equal for pieces that take the same time on a node that is as fast as before.
            seconds: may be per unit of the work, if it always is.
        """
        own = self._kinds.pop(kind, None) or _Kind()
        self._kinds[kind] = own
        if len(self._kinds) > _KINDS:
            self._kinds.popitem(last=False)
        own.latest.append(seconds)
        if len(own.latest) < _WINDOW:
            return
        now = median(own.latest)
        # A kind that is seen for the first time on a node that is slow now would have been faster before.
        own.best = min(own.best, now if own.best < inf else now / self.slowness)
        if own.best > 0:
            self._ratios.append(seconds / own.best)


class Pace:
    """A model's passes on a node, whatever its stage there. Safe to use from several threads.

    Attributes:
        run_s, read_s: seconds of computing and of reading of the latest pass, as one call sees it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._run, self._read = Series(), Series()
        self.run_s = self.read_s = 0.0

    def note(self, kind: Hashable, last: PassStats, expected_s: float) -> None:
        """Take a pass.

        Args:
            kind: the sizes of its inputs, and how the stage runs.
            last: its figures.
            expected_s: seconds of computing that the profile has for these shards, so that stages of other ranges
                compare.
        """
        inference = last.agents.get("inference")
        run_s = inference.kinds.get("run", 0.0) / last.calls if inference else 0.0
        with self._lock:
            self.run_s, self.read_s = run_s, last.read_s
            if run_s > 0 and expected_s > 0:
                self._run.note((kind, last.calls), run_s / expected_s)
            if last.read_bytes >= _LEAST_READ_BYTES and last.read_s > 0:
                self._read.note(None, last.read_s / last.read_bytes)

    @property
    def slowness(self) -> tuple[float, float]:
        """How much longer computing and reading take than they did at their best; see `Series.slowness`."""
        with self._lock:
            return self._run.slowness, self._read.slowness
