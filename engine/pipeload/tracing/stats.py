"""The trace in figures: totals, and the latest pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeload.tracing.trace import AgentTimes, Span, agent_times, busy_s

__all__ = ["PassStats", "Stats", "pass_stats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassStats:
    """One pass.

    Attributes:
        seconds: from its first shard to its last one.
        read_bytes: bytes of weights read during the pass.
        read_s: seconds in which at least one Loading Agent read.
        bound_s: T*, the shortest time that such a pass could take: the first one cold, later ones with these resident
            shards. None without a measured profile, and for passes that still load shards which will stay.
        agents: how each agent spent the pass.
        calls: number of calls that it served.
    """

    seconds: float
    read_bytes: int
    read_s: float
    bound_s: float | None
    agents: Mapping[str, AgentTimes]
    calls: int = 1

    @property
    def read_bytes_per_s(self) -> float:
        """Bandwidth while at least one Loading Agent read."""
        return self.read_bytes / self.read_s if self.read_s else 0.0

    @property
    def efficiency(self) -> float | None:
        """T* / measured."""
        return self.bound_s / self.seconds if self.bound_s is not None and self.seconds else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The pipeline's work so far.

    Attributes:
        passes: number of finished passes.
        read_bytes: bytes of weights read in all.
        first_pass_s, last_pass_s: seconds that the first and the latest pass took; None before.
        peak_bytes: the most memory that the process has occupied since it began.
        budget_bytes: the most memory that the process may occupy.
        peak_read_bytes_per_s: the best bandwidth that the profile knows; None without one.
        last: the latest pass; None before.
    """

    __module__ = "pipeload"

    passes: int = 0
    read_bytes: int = 0
    first_pass_s: float | None = None
    last_pass_s: float | None = None
    peak_bytes: int = 0
    budget_bytes: int = 0
    peak_read_bytes_per_s: float | None = None
    last: PassStats | None = field(default=None)


def pass_stats(spans: Sequence[Span], begin_s: float, end_s: float, bound_s: float | None, calls: int = 1) -> PassStats:
    """The figures of one pass.

    Args:
        spans: the agents' spans.
        begin_s: its begin, by `time.perf_counter`.
        end_s: its end.
        bound_s: T* of such a pass, if it is known.
        calls: number of calls that it served.
    """
    nbytes, reads = 0.0, []
    for span in spans:
        if span.kind == "read" and begin_s < span.end_s and span.begin_s < end_s:
            # A read that began before the pass counts by its share.
            inside = replace(span, begin_s=max(span.begin_s, begin_s), end_s=min(span.end_s, end_s))
            nbytes += span.nbytes * (inside.end_s - inside.begin_s) / max(span.end_s - span.begin_s, 1e-9)
            reads.append(inside)
    return PassStats(
        seconds=end_s - begin_s,
        read_bytes=round(nbytes),
        read_s=busy_s(reads),
        bound_s=bound_s,
        agents=agent_times(spans, begin_s, end_s),
        calls=calls,
    )
