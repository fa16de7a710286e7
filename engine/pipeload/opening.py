"""Opening a model: measure the process, make the first plan, start the agents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipeload.decode import CAPACITY_STEP, Decoding
from pipeload.errors import BudgetError, LoadError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest
from pipeload.machine.cgroups import spare_threads
from pipeload.machine.heap import foreign_allocator
from pipeload.machine.memory import FreeMemory
from pipeload.measuring import profile_store, profiler
from pipeload.pipeline.open_pipelines import OPEN_PIPELINES
from pipeload.pipeline.pipeline import Pipeline
from pipeload.planning import needs
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile
from pipeload.planning.rates import LOADERS
from pipeload.planning.replanner import Replanner
from pipeload.storage.stamps import stamps_of
from pipeload.storage.weights import Storage
from pipeload.tracing.trace import Progress

__all__ = ["Opened", "Options", "open_pipeline"]

_AGENTS = 3
"""The Inference Agent, the Daemon Agent, and the Loading Agent that packs (`Pipeline._spawn_loaders`)."""
_CLOSING = 2
"""Sessions that are still being destroyed while others are made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of `load`, checked.

    Attributes:
        budget_bytes: the most memory that the process may use; None takes the free memory.
        loaders, threads: see `load`.
        dims: sizes of the symbolic dimensions to plan for.
        verify, profile, progress: see `load`.
    """

    budget_bytes: int | None
    loaders: int | None
    threads: int | None
    dims: Mapping[str, int]
    verify: bool
    profile: Profile | None
    progress: Callable[[Progress], None] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A pipeline that has begun to load.

    Attributes:
        pipeline: the agents.
        replanner: makes their plans.
        profile_dims: sizes of the symbolic dimensions that the profile is for.
        keep: writes the profile that passes have improved to the user's cache; None where the caller gave the profile.
    """

    pipeline: Pipeline
    replanner: Replanner
    profile_dims: Mapping[str, int]
    keep: Callable[[], None] | None


def open_pipeline(
    directory: Path, manifest: Manifest, decoding: Decoding, options: Options, bring_in: Callable[[], object]
) -> Opened:
    """Measure the process, plan, and start the agents.

    Args:
        directory: the sharded model directory.
        manifest: its validated manifest.
        decoding: the model's caches.
        options: how to run it.
        bring_in: loads everything that the process keeps beside the pipeline, so that it is there when the process is
            measured.

    Raises:
        BudgetError: the budget cannot work.
        LoadError: the system starts no more threads, or no budget can be kept with the process's memory allocator.
    """
    if allocator := foreign_allocator():
        raise LoadError(
            f"{allocator} stands in for the memory allocator of the C library: it keeps memory that is freed, so that "
            "no budget can be kept. Start the program without it (LD_PRELOAD)."
        )
    stamps = stamps_of(directory, manifests.content(directory)) if options.verify else None
    storage = Storage(directory, manifest, verify=options.verify, stamps=stamps)
    profile_dims = profiler.profile_dims(manifest) if manifest.caches else dict(options.dims)
    kept = options.profile or profile_store.find(directory, profile_dims)
    with OPEN_PIPELINES.lock:
        bring_in()
        process = profiler.measure()
        # Other models of the process may not have read anything yet of the weights that they will keep.
        process_bytes = process.process_bytes + OPEN_PIPELINES.to_come_bytes()
        loaders, threads = _startable(options, len(manifest.shards), process.cores)
        replanner = Replanner(
            manifest,
            replace(kept or process, process_bytes=process_bytes, cores=process.cores),
            budget_bytes=options.budget_bytes,
            free_bytes=FreeMemory(),
            loaders=loaders,
            threads=threads,
        )
        plan = _first_plan(manifest, replanner, decoding, options.dims)
        pipeline = Pipeline(manifest, storage, plan, replanner, options.progress)
        OPEN_PIPELINES.add(pipeline)
    # Absolute, since the host may change its working directory.
    keep = partial(_keep_learned, directory.absolute(), profile_dims, replanner)
    return Opened(
        pipeline=pipeline,
        replanner=replanner,
        profile_dims=profile_dims,
        keep=keep if options.profile is None else None,
    )


def _startable(options: Options, shards: int, cores: int) -> tuple[int | None, int | None]:
    """Loading Agents and intra-op threads: None, or fewer where the cgroup allows too few for what plans choose.

    Every session has a pool of threads of its own, beside the thread that runs it. onnxruntime waits for ever for a
    pool of which some threads were started, and others were not.

    Raises:
        LoadError: the caller wants more threads than the cgroup allows.
    """
    spare = spare_threads()
    loaders = options.loaders or (1 if spare < _AGENTS + max(LOADERS) else None)
    agents, sessions = _AGENTS + (loaders or max(LOADERS)), shards + _CLOSING
    if options.threads is None:
        most = 1 + (spare - agents) / sessions
        return loaders, None if most >= cores else max(1, int(most))
    if options.threads > 1 and (needed := agents + sessions * (options.threads - 1)) > spare:
        raise LoadError(
            f"With threads={options.threads} this model takes {needed} threads, and the cgroup allows {spare} more "
            "(pids.max). Load it with threads=1, or raise that limit."
        )
    return loaders, options.threads


def _first_plan(manifest: Manifest, replanner: Replanner, decoding: Decoding, dims: Mapping[str, int]) -> Plan:
    pass_bytes = needs.pass_bytes(manifest, dims, positions=1 if manifest.caches else None)
    needed = Needs(pass_bytes=pass_bytes)
    if manifest.caches:
        # The caller of a decoder will decode: room for the first caches now saves another plan, and reading, then.
        with suppress(BudgetError):
            return replanner.first_plan(replace(needed, cache_bytes=decoding.full_cache_bytes(1, CAPACITY_STEP)))
    return replanner.first_plan(needed)


def _keep_learned(directory: Path, dims: Mapping[str, int], replanner: Replanner) -> None:
    if learned := replanner.learned:
        profile_store.keep(directory, replace(learned, dims=dict(dims)))
