"""The machine in a picture: memory of the process under its budget, shards, and the agents' lanes of the latest sweep.

Only what is in memory already is read, so that a page may ask each second. Of the trace, no more spans are looked at
than two sweeps of eighty layers have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeload.machine.memory import peak_rss_bytes, rss_bytes
from pipeload.machine.sizes import parse_budget
from pipeload.serve.bodies.machine import (
    Lane,
    LaneSpan,
    Machine,
    MachineModel,
    ModelMemory,
    PlacementChange,
    ShardState,
    StageOnNode,
    Sweep,
)
from pipeload.serve.models import Served
from pipeload.tracing.chrome import passes
from pipeload.tracing.trace import Span, Trace, agent_times

if TYPE_CHECKING:
    from pipeload.format.manifest import Manifest, Shard
    from pipeload.planning.placement import Placement
    from pipeload.planning.planner import Plan
    from pipeload.serve.routes.desk import Desk
    from pipeload.tracing.stats import Stats

__all__ = ["machine_of"]

_NEWEST = 1000
"""Spans of the trace that are looked at: 0.2 MB while an answer is made."""
_MOST_SPANS = 400
"""Spans of an answer, in all lanes of a model."""
_CHANGES = 10
"""The latest changes of a model's placement that an answer has."""


def machine_of(desk: Desk) -> Machine:
    """The process and its models, now."""
    found = [_model(served, desk.metrics.tokens_per_s.get(served.name)) for served in desk.models.served.values()]
    plans = [model.plan for served in desk.models.served.values() if (model := served.here) is not None]
    budget_bytes = parse_budget(desk.settings.budget)
    if budget_bytes is None:
        budget_bytes = max((plan.budget_bytes for plan in plans), default=None)
    now = rss_bytes()
    return Machine(
        budget_bytes=budget_bytes,
        rss_bytes=now,
        peak_rss_bytes=max(now, peak_rss_bytes()),
        process_bytes=_process_bytes(plans) if plans else now,
        calls=len(desk.admission.places),
        most_calls=desk.settings.max_waiting,
        models=found,
    )


def _process_bytes(plans: Sequence[Plan]) -> int:
    """Memory beside what these plans grant. The plan that was made last counts that of the others as the process's."""
    granted = sum(plan.peak_bytes - plan.process_bytes for plan in plans)
    return max(0, max(plan.peak_bytes for plan in plans) - granted)


def _model(served: Served, tokens_per_s: float | None) -> MachineModel:
    manifest, model = served.manifest, served.model
    made = MachineModel(
        name=served.name,
        task=manifest.task,
        state="closed" if model is None else "open",
        weight_bytes=manifest.weight_bytes,
        sweeps=served.sweeps,
        read_bytes=served.read_bytes,
        tokens_per_s=tokens_per_s,
    )
    if model is not None:
        stats = model.stats
        made.sweeps += stats.passes
        made.read_bytes += stats.read_bytes
    if (here := served.here) is not None:
        plan, stats = here.plan, here.stats
        made.best_read_bytes_per_s = stats.peak_read_bytes_per_s
        made.memory, made.shards = _memory(plan), _shards(manifest, plan)
        made.sweep = _sweep(stats, here.trace)
    if (there := served.there) is not None:
        made.replacements = there.replacements
        made.stages = _stages(manifest, there.placement)
        made.reconfigurations = [
            PlacementChange(
                at_s=change.at.timestamp(),
                before=_stages(manifest, change.before),
                after=None if change.after is None else _stages(manifest, change.after),
                why=change.why,
                waited_s=change.waited_s,
            )
            for change in there.reconfigurations[-_CHANGES:]
        ]
    return made


def _stages(manifest: Manifest, placement: Placement) -> list[StageOnNode]:
    names = [shard.name for shard in manifest.shards]
    return [StageOnNode(node=one.node, first=names[one.begin], last=names[one.end - 1]) for one in placement.segments]


def _memory(plan: Plan) -> ModelMemory:
    buffers = plan.buffers * plan.buffer_bytes
    return ModelMemory(
        resident_bytes=max(0, plan.weights_bytes - buffers),
        buffer_bytes=buffers,
        cache_bytes=plan.cache_bytes,
        activation_bytes=plan.pass_bytes,
        packing_bytes=plan.packing_bytes,
        streamed_bytes=plan.streamed_bytes,
        kept_bytes=plan.resident_bytes,
    )


def _shards(manifest: Manifest, plan: Plan) -> list[ShardState]:
    return [_shard(shard, plan) for shard in manifest.shards]


def _shard(shard: Shard, plan: Plan) -> ShardState:
    if shard.name in plan.resident:
        return ShardState(name=shard.name, state="resident", nbytes=shard.nbytes, streamed_bytes=0)
    if (part := plan.partly_resident.get(shard.name)) is not None:
        begin, end = part
        return ShardState(name=shard.name, state="partly", nbytes=shard.nbytes, streamed_bytes=end - begin)
    return ShardState(name=shard.name, state="streamed", nbytes=shard.nbytes, streamed_bytes=shard.nbytes)


def _sweep(stats: Stats, trace: Trace) -> Sweep | None:
    last = stats.last
    if last is None:
        return None
    lanes, left_out = _lanes(trace.spans_since(0.0, trace.count - _NEWEST), stats.passes)
    return Sweep(
        number=stats.passes,
        seconds=last.seconds,
        callers=last.calls,
        read_bytes=last.read_bytes,
        read_bytes_per_s=last.read_bytes_per_s,
        bound_s=last.bound_s,
        efficiency=last.efficiency,
        lanes=lanes,
        left_out=left_out,
    )


def _lanes(spans: Sequence[Span], number: int) -> tuple[list[Lane], int]:
    """The lanes of the sweep of this number, and how many spans they leave out."""
    sweep = next((one for one in passes(spans) if one.number == number), None)
    if sweep is None:
        return [], 0
    inside = [span for span in spans if span.begin_s < sweep.end_s and span.end_s > sweep.begin_s]
    shown = sorted(inside, key=lambda span: span.begin_s - span.end_s)[:_MOST_SPANS]
    shown.sort(key=lambda span: span.begin_s)
    lanes = [
        Lane(
            agent=agent,
            busy_s=times.busy_s,
            spans=[
                LaneSpan(
                    kind=span.kind,
                    shard=span.shard,
                    begin_s=max(0.0, span.begin_s - sweep.begin_s),
                    end_s=min(sweep.end_s, span.end_s) - sweep.begin_s,
                )
                for span in shown
                if span.agent == agent
            ],
        )
        for agent, times in agent_times(inside, sweep.begin_s, sweep.end_s).items()
    ]
    return lanes, len(inside) - len(shown)
