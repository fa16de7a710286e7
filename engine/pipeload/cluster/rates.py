"""A model's speed on this node: the kept profile, or else a short measurement of its storage and first shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeload.budget import Budget
from pipeload.errors import BudgetError, RunError
from pipeload.format.manifest import Manifest
from pipeload.format.stages import cut_places, stage
from pipeload.machine.cores import core_capacities
from pipeload.machine.hardware import cores
from pipeload.measuring import profile_store
from pipeload.measuring.bandwidth import one_agent_bandwidth
from pipeload.measuring.example_inputs import example_inputs
from pipeload.measuring.lasting import LastingClock
from pipeload.measuring.profiler import profile_dims
from pipeload.model import load
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.rates import Rates
from pipeload.storage.weights import Storage

__all__ = ["first_shards", "speed_of"]

_RUNS = 3
_LEAST_S = 1e-6


def speed_of(directory: Path, manifest: Manifest, budget: Budget, process_bytes: int) -> Profile:
    """A profile with the speed of every shard.

    Args:
        directory: the sharded model directory, or one that has at least the files of `first_shards`.
        manifest: the model's.
        budget: of the process.
        process_bytes: see `Offer`.

    Raises:
        PipeloadError: a shard could not be read or run.
    """
    dims = profile_dims(manifest)
    kept = profile_store.find(directory, dims)
    if kept is not None and kept.measured:
        return replace(kept, process_bytes=process_bytes)
    assumed = Profile(process_bytes=process_bytes, cores=cores(), dims=dims, core_capacities=core_capacities())
    rates = Rates.of(manifest, assumed, None)
    (threads, times), *_ = rates.times.items()
    factor = _slowness(directory, manifest, budget, dims, {name: one.run_s for name, one in times.items()})
    # A node that fetches shards has a part of them.
    there = [shard for shard in manifest.shards if shard.weights and (directory / shard.weights.path).is_file()]
    read = one_agent_bandwidth(Storage(directory, manifest, verify=False), there)
    return replace(
        assumed,
        read_bytes_per_s={1: read} if read else dict(rates.read_bytes_per_s),
        times={
            threads: {
                name: ShardTimes(
                    session_s=one.session_s,
                    run_s=one.run_s * factor,
                    loading_run_s=one.loading_run_s * factor,
                    pack_s=one.pack_s,
                    packed_run_s=one.packed_run_s * factor,
                )
                for name, one in times.items()
            }
        },
    )


def first_shards(manifest: Manifest) -> Manifest:
    """The stage by which a model is measured: the shards up to the first block.

    From the model's own inputs on: lengths and places that shards hand on cannot be made up.
    """
    first = next((place for place, shard in enumerate(manifest.shards) if shard.role == "block"), 0)
    return stage(manifest, 0, next((place for place in cut_places(manifest) if place > first), len(manifest.shards)))


def _slowness(
    directory: Path, manifest: Manifest, budget: Budget, dims: dict[str, int], assumed_s: dict[str, float]
) -> float:
    """Measured seconds of the shards up to the first block over the assumed ones; 1.0 where they fail."""
    own = first_shards(manifest)
    arrays = example_inputs(own, dims)
    names = f"{own.shards[0].name}:{own.shards[-1].name}"
    found, clock = [], LastingClock()
    try:
        with load(directory, budget, shards=names) as model:
            for _ in range(_RUNS):
                begin = clock.now()
                model.run(arrays)
                last = model.stats.last
                run_s = last.agents["inference"].kinds.get("run", 0.0) if last else 0.0
                found.append(clock.since(begin, run_s))
    except (BudgetError, RunError):
        # Other models have the memory now, or the node is too small for this one: placing finds out. Or the model has
        # fewer positions than the sizes that speeds are measured at.
        return 1.0
    return max(min(found), _LEAST_S) / sum(assumed_s[shard.name] for shard in own.shards)
