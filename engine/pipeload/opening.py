"""Opening a model: measure the process, make the first plan, start the agents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipeload.budget import Budget
from pipeload.decode import CAPACITY_STEP, Decoding
from pipeload.errors import BudgetError, LoadError
from pipeload.format import manifest as manifests
from pipeload.format.caches import past_symbols
from pipeload.format.manifest import Manifest
from pipeload.machine.cgroups import spare_threads
from pipeload.machine.heap import foreign_allocator
from pipeload.machine.memory import FreeMemory
from pipeload.measuring import profile_store, profiler
from pipeload.pipeline.open_pipelines import OPEN_PIPELINES
from pipeload.pipeline.pipeline import Pipeline
from pipeload.planning import needs
from pipeload.planning.drafting import PIECE_TOKENS, Contender, Drafting, weigh
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile
from pipeload.planning.rates import LOADERS
from pipeload.planning.replanner import Replanner
from pipeload.storage.stamps import stamps_of
from pipeload.storage.weights import Storage
from pipeload.tracing.trace import Progress

__all__ = [
    "Opened",
    "Options",
    "Weighed",
    "acceptance_of",
    "draft_bytes",
    "draft_contender",
    "first_needs",
    "open_pipeline",
    "weigh_draft",
]

_AGENTS = 3
"""The Inference Agent, the Daemon Agent, and the Loading Agent that packs (`Pipeline._spawn_loaders`)."""
_ASSUMED_ACCEPTANCE = 0.7
"""Of a draft whose choices were not compared with the source's."""
_CLOSING = 2
"""Sessions that are still being destroyed while others are made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of `load`, checked.

    Attributes:
        budget: the most memory that the process may use, and the other models that have it too.
        loaders, threads: see `load`.
        dims: sizes of the symbolic dimensions to plan for.
        verify, profile, progress: see `load`.
        process_bytes: memory of the process without models, where the caller knows it; None measures.
        brought_bytes: memory that opening the model has brought into the process before.
        fixed_bytes: the share of a draft; None for a model.
        stage_of: of a stage, the manifest of the whole model, whose files it has in common with other stages.
    """

    budget: Budget
    loaders: int | None
    threads: int | None
    dims: Mapping[str, int]
    verify: bool
    profile: Profile | None
    progress: Callable[[Progress], None] | None
    process_bytes: int | None = None
    brought_bytes: int = 0
    fixed_bytes: int | None = None
    stage_of: Manifest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A pipeline that has begun to load.

    Attributes:
        pipeline: the agents.
        replanner: makes their plans.
        profile_dims: sizes of the symbolic dimensions that the profile is for.
        keep: writes the profile that passes have improved to the user's cache; None where the caller gave the profile,
            and for a stage, whose passes tell nothing of the other shards.
    """

    pipeline: Pipeline
    replanner: Replanner
    profile_dims: Mapping[str, int]
    keep: Callable[[], None] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """How a model and its own draft are to be opened.

    Attributes:
        drafting: whether the draft pays.
        model: options of the model beside its draft.
        draft: options of the draft beside its model.
        beside_bytes: the draft's passes and caches that both have counted.
    """

    drafting: Drafting
    model: Options
    draft: Options
    beside_bytes: int


def open_pipeline(
    directory: Path,
    manifest: Manifest,
    decoding: Decoding,
    options: Options,
    bring_in: Callable[[], object],
    adopt: Callable[[Opened], object],
) -> None:
    """Measure the process, plan, and start the agents.

    Args:
        directory: the sharded model directory.
        manifest: its validated manifest.
        decoding: the model's caches.
        options: how to run it.
        bring_in: loads everything that the process keeps beside the pipeline, so that it is there when the process is
            measured.
        adopt: takes the pipeline, and sees to its end. Where the caller is interrupted at this very moment, the
            pipeline is closed.

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
    storage = Storage(directory, options.stage_of or manifest, verify=options.verify, stamps=stamps)
    profile_dims = profiler.profile_dims(manifest) if manifest.caches else dict(options.dims)
    kept = options.profile or profile_store.find(directory, profile_dims)
    with OPEN_PIPELINES.lock:
        process, brought_bytes = _measure(bring_in)
        brought_bytes += options.brought_bytes
        own_bytes = options.process_bytes
        if own_bytes is None:
            own_bytes = options.budget.process_bytes(process.process_bytes, brought_bytes)
        known = kept or process
        runtime_bytes = options.budget.runtime_bytes or known.runtime_bytes
        loaders, threads = _startable(options, len(manifest.shards), process.cores)
        share = options.budget.open_share(options.fixed_bytes, brought_bytes)
        pipeline: Pipeline | None = None
        try:
            replanner = Replanner(
                manifest,
                replace(
                    known,
                    process_bytes=own_bytes + brought_bytes,
                    cores=process.cores,
                    core_capacities=process.core_capacities,
                    runtime_bytes=runtime_bytes,
                ),
                budget_bytes=options.budget.budget_bytes,
                free_bytes=FreeMemory(),
                loaders=loaders,
                threads=threads,
                share=share,
            )
            needed = first_needs(manifest, decoding, options.dims)
            plan = options.budget.with_room(
                share, lambda: _first_plan(replanner, needed), lambda: replanner.extremes(needed)[1]
            )
            cache_bytes = decoding.cache_bytes if manifest.caches else None
            pipeline = Pipeline(manifest, storage, plan, replanner, options.progress, cache_bytes)
            OPEN_PIPELINES.add(pipeline)
            options.budget.add(pipeline)
            # Absolute, since the host may change its working directory.
            keep = partial(_keep_learned, directory.absolute(), profile_dims, replanner)
            adopt(
                Opened(
                    pipeline=pipeline,
                    replanner=replanner,
                    profile_dims=profile_dims,
                    keep=keep if options.profile is None and options.stage_of is None else None,
                )
            )
        except BaseException:
            share.leave()
            if pipeline is not None:
                # Its threads would keep it alive for ever.
                pipeline.close()
            raise


def weigh_draft(
    directory: Path, manifest: Manifest, draft: tuple[Path, Manifest], options: Options, bring_in: Callable[[], object]
) -> Weighed:
    """Measure the process, and plan a model alone and beside its own draft.

    Args:
        directory: the model's sharded directory.
        manifest: its validated manifest.
        draft: the same of its draft.
        options: how to run the model.
        bring_in: see `open_pipeline`.
    """
    with OPEN_PIPELINES.lock:
        process, brought_bytes = _measure(bring_in)
        process_bytes = process.process_bytes + OPEN_PIPELINES.to_come_bytes()
        own_bytes = options.budget.process_bytes(process.process_bytes, brought_bytes)
    known = options.profile or profile_store.find(directory, profiler.profile_dims(manifest)) or process
    profile = replace(known, process_bytes=process_bytes, cores=process.cores, core_capacities=process.core_capacities)
    guesser = draft_contender(*draft, profile)
    free_bytes = FreeMemory()()
    told = weigh(
        Contender(manifest=manifest, profile=profile, needs=first_needs(manifest, Decoding(manifest), options.dims)),
        guesser,
        budget_bytes=min(options.budget.budget_bytes or free_bytes, free_bytes),
        acceptance=acceptance_of(manifest),
        loaders=options.loaders,
        threads=options.threads,
    )
    return Weighed(
        drafting=told,
        model=replace(options, process_bytes=own_bytes, brought_bytes=brought_bytes),
        draft=replace(
            options,
            dims=_draft_dims(draft[1]),
            process_bytes=own_bytes,
            fixed_bytes=told.draft_bytes,
            profile=guesser.profile,
            progress=None,
        ),
        beside_bytes=guesser.needs.pass_bytes + guesser.needs.cache_bytes,
    )


def draft_bytes(manifest: Manifest, decoding: Decoding) -> int:
    """Memory of a draft beside its weights, when the texts that its open states expect have come."""
    longest, cache_bytes = decoding.expected()
    dims = _draft_dims(manifest) | dict.fromkeys(past_symbols(manifest), longest)
    return needs.pass_bytes(manifest, dims, positions=1) + cache_bytes


def draft_contender(directory: Path, manifest: Manifest, model: Profile) -> Contender:
    """A draft as plans see it: with its kept profile, or assumed times, and the machine and process of its model.

    Args:
        directory: the draft's sharded directory.
        manifest: its manifest.
        model: the profile of the model that it guesses for.
    """
    kept = profile_store.find(directory, profiler.profile_dims(manifest))
    own = kept or replace(model, times={}, dims={})
    # One process has one runtime.
    own = replace(
        own,
        process_bytes=model.process_bytes,
        cores=model.cores,
        core_capacities=model.core_capacities,
        runtime_bytes=model.runtime_bytes,
    )
    return Contender(
        manifest=manifest, profile=own, needs=first_needs(manifest, Decoding(manifest), _draft_dims(manifest))
    )


def _draft_dims(manifest: Manifest) -> dict[str, int]:
    return {symbol: min(size, PIECE_TOKENS) for symbol, size in needs.planning_dims(manifest).items()}


def acceptance_of(manifest: Manifest) -> float:
    """How often the draft's first choice is right, as far as the exporter has measured it."""
    told = manifest.draft.top1 if manifest.draft else None
    return _ASSUMED_ACCEPTANCE if told is None else told


def _measure(bring_in: Callable[[], object]) -> tuple[Profile, int]:
    """The process with all that it keeps beside the pipeline, and the bytes of that."""
    before_bytes = profiler.measure().process_bytes
    bring_in()
    process = profiler.measure()
    return process, max(0, process.process_bytes - before_bytes)


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


def _first_plan(replanner: Replanner, needed: Needs) -> Plan:
    if needed.cache_bytes:
        # The caller of a decoder will decode: room for the first caches now saves another plan, and reading, then.
        with suppress(BudgetError):
            return replanner.first_plan(needed)
    return replanner.first_plan(replace(needed, cache_bytes=0))


def first_needs(manifest: Manifest, decoding: Decoding, dims: Mapping[str, int]) -> Needs:
    """Memory beside weights that the first plan is made for: of a pass, and of a decoder's first caches."""
    pass_bytes = needs.pass_bytes(manifest, dims, positions=1 if manifest.caches else None)
    return Needs(
        pass_bytes=pass_bytes, cache_bytes=decoding.full_cache_bytes(1, CAPACITY_STEP) if manifest.caches else 0
    )


def _keep_learned(directory: Path, dims: Mapping[str, int], replanner: Replanner) -> None:
    if learned := replanner.learned:
        profile_store.keep(directory, replace(learned, dims=dict(dims)))
