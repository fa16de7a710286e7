"""Updates the profile from the trace of a pass. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeload.format.manifest import Manifest
from pipeload.planning import planner
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.rates import ASSUMED_READ_BYTES_PER_S, LOADERS
from pipeload.tracing.trace import Span, busy_s

__all__ = ["learn"]

_LEAST_READ_BYTES = 16 << 20

_BUSY_SHARE = 0.7
"""A pass that reads less, or for a smaller fraction of its time, tells nothing about the bandwidth."""


def learn(manifest: Manifest, profile: Profile, plan: Plan, spans: Sequence[Span]) -> Profile:
    """The profile, updated from a pass: bandwidth, and times of sessions and runs. Pure.

    Args:
        manifest: the model.
        profile: the profile before the pass.
        plan: the plan of the pass.
        spans: the agents' spans during the pass.
    """
    # A throttled disk makes up for what it rested while an agent widened: only together do they tell what it sustains.
    reads = [span for span in spans if span.kind in ("read", "widen")]
    read_bytes, reading_s = sum(span.nbytes for span in reads), busy_s(reads)
    known = profile.read_bytes_per_s if plan.direct else profile.cached_read_bytes_per_s
    inference = [span for span in spans if span.agent == "inference"]
    pass_s = max(s.end_s for s in inference) - min(s.begin_s for s in inference) if inference else 0.0
    # A disk that rests between reads can be faster, for a while, than one under constant load.
    if not known or (read_bytes >= _LEAST_READ_BYTES and reading_s > pass_s * _BUSY_SHARE):
        # A pass may widen what stays in 16 bits, and read nothing.
        seen = read_bytes / reading_s if read_bytes and reading_s else ASSUMED_READ_BYTES_PER_S
        if known:
            # A change of the storage that one number of Loading Agents shows holds for the other numbers too.
            before = known.get(plan.loaders) or max(known.values())
            known = {number: bandwidth * seen / before for number, bandwidth in known.items()}
        else:
            known = dict.fromkeys((*LOADERS, plan.loaders), seen)
    seconds: dict[str, dict[str, float]] = {}
    for span in spans:
        if span.kind in ("run", "widen", "session", "pack"):
            seconds.setdefault(span.shard, {})[span.kind] = span.end_s - span.begin_s
    old = planner.times_of(manifest, profile, plan.threads)
    measured = {threads: dict(times) for threads, times in profile.times.items()}
    measured[plan.threads] = dict(old)
    for shard in manifest.shards:
        found, was = seconds.get(shard.name, {}), old[shard.name]
        packed = plan.packed and shard.name in plan.resident and plan.steady_pass_s is not None
        ran_s = was.packed_run_s if packed or shard.packed else was.loading_run_s
        ratio = found["run"] / ran_s if "run" in found and ran_s else 1.0
        # A machine that computes more slowly than it did does so with any number of threads.
        for times in measured.values():
            times[shard.name] = _slower(times[shard.name], ratio)
        measured[plan.threads][shard.name] = replace(
            measured[plan.threads][shard.name],
            session_s=found["session"] + found.get("widen", 0.0) if "session" in found else was.session_s,
            pack_s=found["pack"] + found.get("widen", 0.0) if "pack" in found and not packed else was.pack_s,
        )
    if plan.direct:
        return replace(profile, read_bytes_per_s=known, times=measured)
    return replace(profile, cached_read_bytes_per_s=known, times=measured)


def _slower(times: ShardTimes, ratio: float) -> ShardTimes:
    """Times of a shard when every run takes `ratio` times as long."""
    return replace(
        times,
        run_s=times.run_s * ratio,
        loading_run_s=times.loading_run_s * ratio,
        packed_run_s=times.packed_run_s * ratio,
    )
