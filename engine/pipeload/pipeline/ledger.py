"""The passes of a pipeline in figures."""

from __future__ import annotations

import time

from pipeload.tracing.stats import PassStats, Stats, pass_stats
from pipeload.tracing.trace import Span, Trace

__all__ = ["Ledger"]


class Ledger:
    """Counts passes, and keeps the figures of the first and the latest pass.

    Args:
        trace: the agents' spans.

    Attributes:
        passes: the number of finished passes.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self.passes = 0
        self._first_pass_s: float | None = None
        self._last: PassStats | None = None
        self._unsettled_s: float | None = None
        self._spans_before = 0

    def begin(self) -> float:
        """Note that a pass begins. Returns the time, in seconds of `time.perf_counter`."""
        self._unsettled_s = None
        self._spans_before = self._trace.count
        return time.perf_counter()

    def add(self, begin_s: float, end_s: float, bound_s: float | None, calls: int = 1) -> None:
        """Count the pass that has begun, and has ended. For the arguments see `PassStats`."""
        self._last = pass_stats(self._spans_since(begin_s), begin_s, end_s, bound_s, calls)
        self._unsettled_s = begin_s
        self._first_pass_s = self._first_pass_s or self._last.seconds
        self.passes += 1

    def take_unsettled(self) -> tuple[list[Span], float] | None:
        """The spans and the seconds of the latest pass, once; None if no pass has ended since the last call."""
        begin_s, self._unsettled_s = self._unsettled_s, None
        if begin_s is None or self._last is None:
            return None
        return self._spans_since(begin_s), self._last.seconds

    def _spans_since(self, begin_s: float) -> list[Span]:
        return self._trace.spans_since(begin_s, self._spans_before)

    def stats(
        self, *, read_bytes: int, peak_bytes: int, budget_bytes: int, peak_read_bytes_per_s: float | None
    ) -> Stats:
        """All figures, including those that only the pipeline knows."""
        return Stats(
            passes=self.passes,
            read_bytes=read_bytes,
            first_pass_s=self._first_pass_s,
            last_pass_s=self._last.seconds if self._last else None,
            peak_bytes=peak_bytes,
            budget_bytes=budget_bytes,
            peak_read_bytes_per_s=peak_read_bytes_per_s,
            last=self._last,
        )
