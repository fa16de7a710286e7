"""`pipeload plan`: the predicted speed in a budget, before any load."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import pipeload.model  # noqa: F401 - every command that runs a model has it in memory, and so has to be measured
from pipeload.cli.options import Budget, Directory, Json, read_sizes
from pipeload.cli.progress import progress_bars
from pipeload.cli.report import print_json, print_table, table
from pipeload.cli.terminal import say
from pipeload.errors import BudgetError, ConfigError, ManifestError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest, Shard
from pipeload.machine.cores import spelled
from pipeload.machine.memory import auto_budget_bytes
from pipeload.machine.sizes import format_bytes, parse_budget
from pipeload.measuring import profile_store
from pipeload.measuring.profiler import measure, measure_model, profile_dims
from pipeload.opening import acceptance_of, draft_contender
from pipeload.planning import needs, planner
from pipeload.planning.drafting import Contender, Drafting, weigh
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile
from pipeload.planning.schedule import roofline
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.images import image_sizes
from pipeload.tasks.runner import FilesOnly
from pipeload.tasks.text.tokenizer import tokenizer_of

__all__ = ["plan"]

_OPENED_BYTES = 1 << 20
"""The objects of an open model, and the scatter between two processes: up to 0.6 MB were measured."""

_STEPS = 10
"""The number of rows of a sweep between the smallest budget and the one that keeps all weights."""


def plan(
    directory: Directory,
    budget: Budget = "auto",
    latency: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Find the smallest budget for steady passes of at most TIME, such as 300ms or 2s."
        ),
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Show what more and less memory would buy.")] = False,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--size", metavar="NAME=N", help="Size of a dimension of the inputs; once for each."),
    ] = None,
    loaders: Annotated[int | None, typer.Option(min=1, help="Number of Loading Agents; else the best.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a session; else the best.")] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A profile of `pipeload profile -o`; else the kept one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict how fast a model runs in a memory budget, and what stays in memory.

    Uses the profile that `pipeload profile` has kept for this machine, and measures one where there is none. For a
    decoder the predictions are for one token, after its prompt. A budget that cannot work is an error; what --latency
    and --sweep ask is answered first.

    Examples:
        pipeload plan models/exported/bert-large --budget 512MB

        pipeload plan models/exported/bert-large --sweep --latency 1s
    """
    target_s = None if latency is None else _seconds(latency)
    manifest = manifests.read(directory)
    given = image_sizes(ModelFiles(directory, manifest), manifest) | read_sizes(sizes)
    dims = profile_dims(manifest, given)
    found = _profile(directory, manifest, dims, profile)
    # A decoder's prompt needs more memory than the steps after it, whose time is predicted.
    prompt = needs.planning_dims(manifest, given)
    positions = 1 if manifest.caches else None
    wanted: dict[str, Any] = {
        "needs": Needs(
            pass_bytes=max(needs.pass_bytes(manifest, sizes, positions=positions) for sizes in (dims, prompt)),
            cache_bytes=max(needs.cache_bytes(manifest, sizes) for sizes in (dims, prompt)),
        ),
        "loaders": loaders,
        "threads": threads,
    }

    def make(budget_bytes: int) -> Plan:
        return planner.make_plan(manifest, found, budget_bytes=budget_bytes, **wanted)

    budget_bytes = parse_budget(budget) or auto_budget_bytes()
    chosen, refusal = None, None
    try:
        chosen = make(budget_bytes)
    except BudgetError as error:
        if target_s is None and not sweep:
            raise
        # The user needs the answers about other budgets now, so they come before the error.
        refusal = error
    smallest = planner.least_budget_bytes(manifest, found, wanted["needs"], threads=wanted["threads"])
    drafting = _drafting(directory, manifest, found, wanted, budget_bytes) if manifest.draft else None
    facts: dict[str, Any] = {
        "plan": _facts(manifest, found, chosen) if chosen else None,
        "smallest_budget_bytes": smallest,
        "latency_budget_bytes": None,
        "sweep": [],
        **({"draft": drafting} if drafting else {}),
    }
    if target_s is not None:
        meets = planner.budget_for_latency(manifest, found, target_s, **wanted)
        facts["latency_budget_bytes"] = meets.budget_bytes if meets else None
    if sweep:
        facts["sweep"] = [_facts(manifest, found, make(size)) for size in _sweep(manifest, make, smallest)]
    if as_json:
        print_json(facts)
    else:
        if chosen:
            print_table(f"{directory} in {format_bytes(budget_bytes)}", _shown(manifest, facts["plan"]))
        if drafting:
            say(str(drafting))
        say(f"smallest budget that works: {format_bytes(smallest)}")
        if target_s is not None:
            least = facts["latency_budget_bytes"]
            say(
                f"smallest budget for {latency}: {format_bytes(least)}"
                if least
                else f"no budget makes steady passes of {latency}: with all in memory they take "
                f"{_least(manifest, found)}"
            )
        if sweep:
            head = ("budget", "peak", "steady pass", "T*", "first pass", "read per pass", "stays in memory", "agents")
            say(f"\n{table([head, *(_row(fact) for fact in facts['sweep'])])}")
    if refusal:
        raise refusal


def _drafting(
    directory: Path, manifest: Manifest, found: Profile, wanted: dict[str, Any], budget_bytes: int
) -> Drafting:
    """Whether the model's own draft would guess tokens."""
    assert manifest.draft is not None
    folder = directory / manifest.draft.path
    try:
        draft = draft_contender(folder, manifests.read(folder), found)
    except ManifestError as error:
        return Drafting(used=False, reason=f"it cannot be opened. {error}")
    model = Contender(manifest=manifest, profile=found, needs=wanted["needs"])
    agents = {name: wanted[name] for name in ("loaders", "threads")}
    return weigh(model, draft, budget_bytes=budget_bytes, acceptance=acceptance_of(manifest), **agents)


def _profile(directory: Path, manifest: Manifest, dims: dict[str, int], file: Path | None) -> Profile:
    # Measured before this process runs a model: a process that opens this model has not run one either.
    process = _process(directory, manifest)
    found = profile_store.read(file) if file else profile_store.find(directory, dims)
    if found is None or not (file or found.measured):
        # A profile from short runs holds only the memory of the process.
        with progress_bars() as progress:
            found = measure_model(directory, manifest, dims=dims, progress=progress)
        profile_store.keep(directory, found)
    if not found.measured:
        raise ConfigError(f"{file} has no bandwidths or no times. Measure it again with `pipeload profile -o {file}`.")
    return replace(
        found,
        process_bytes=process.process_bytes,
        cores=process.cores,
        core_capacities=process.core_capacities,
    )


def _process(directory: Path, manifest: Manifest) -> Profile:
    """The process as a command has it after opening the model: with the tokenizer, which takes tens of megabytes.

    What a model consists of is imported with `pipeload.model`; its objects come on top.
    """
    model = FilesOnly(directory, manifest, ModelFiles(directory, manifest, verify=False))
    tokenizer = None
    with suppress(ConfigError):
        tokenizer = tokenizer_of(model)
    process = measure()
    del tokenizer
    return replace(process, process_bytes=process.process_bytes + _OPENED_BYTES)


def _facts(manifest: Manifest, profile: Profile, plan: Plan) -> dict[str, Any]:
    bound = roofline(manifest, profile, plan.resident_bytes)
    cores = spelled(profile.core_capacities, plan.threads)
    return {
        "budget_bytes": plan.budget_bytes,
        "peak_bytes": plan.peak_bytes,
        "steady_pass_s": plan.steady_pass_s,
        "steady_bound_s": bound.steady_s,
        "first_pass_s": plan.first_pass_s,
        "first_bound_s": bound.first_s,
        "streamed_bytes": plan.streamed_bytes,
        "resident_bytes": plan.resident_bytes,
        "resident": [shard.name for shard in manifest.shards if shard.name in plan.resident],
        "resident_shards": len(plan.resident),
        "partly_resident_shards": sum(begin < end for begin, end in plan.partly_resident.values()),
        "resident_16_bit_shards": sum(begin == end for begin, end in plan.partly_resident.values()),
        "shards": len(manifest.shards),
        "packed": plan.packed,
        "packed_streamed": plan.packed_streamed,
        "loaders": plan.loaders,
        "buffers": plan.buffers,
        "buffer_bytes": plan.buffer_bytes,
        "sessions": plan.buffers if plan.sessions is None else plan.sessions,
        "direct": plan.direct,
        "threads": plan.threads,
        **({"cores": cores} if cores else {}),
    }


def _shown(manifest: Manifest, facts: dict[str, Any]) -> dict[str, str]:
    count, resident = facts["shards"], facts["resident"]
    names = f": {_names(manifest, resident)}" if resident else ""
    buffers = f"{facts['buffers']} of {format_bytes(facts['buffer_bytes'])}" if facts["buffers"] else "none"
    if facts["sessions"] < facts["buffers"]:
        buffers += f", {facts['sessions']} with a session"
    stored = facts["resident_16_bit_shards"]
    return {
        "steady pass": f"{_time(facts['steady_pass_s'])}, T* {_time(facts['steady_bound_s'])}",
        "cold first pass": f"{_time(facts['first_pass_s'])}, T* {_time(facts['first_bound_s'])}",
        "peak": format_bytes(facts["peak_bytes"]),
        "read in each pass": _weights(facts, "streamed"),
        "stays in memory": _weights(facts, "resident"),
        "resident": f"{len(resident)} of {count} shards{names}",
        **({"resident in 16 bits": f"{stored} of {count}, widened for each pass"} if stored else {}),
        "partly resident": f"{facts['partly_resident_shards']} of {count}",
        "Loading Agents": f"{facts['loaders']}, {'past' if facts['direct'] else 'through'} the page cache",
        "buffers": buffers,
        "threads": str(facts["threads"]),
        **({"cores": facts["cores"]} if "cores" in facts else {}),
    }


def _names(manifest: Manifest, chosen: Collection[str]) -> str:
    """Shards in their order, neighbours as a range: `prologue, block.000-003 007, epilogue`."""
    places: dict[str, list[str]] = {}
    for (stem, own), run in groupby(manifest.shards, lambda shard: (_split(shard)[0], shard.name in chosen)):
        if own:
            numbers = [_split(shard)[1] for shard in run]
            places.setdefault(stem, []).append("-".join(dict.fromkeys((numbers[0], numbers[-1]))))
    return ", ".join(f"{stem}.{' '.join(numbers)}".rstrip(".") for stem, numbers in places.items())


def _split(shard: Shard) -> tuple[str, str]:
    """("block", "003") of "block.003"; the number is empty if the name has none."""
    stem, _, number = shard.name.partition(".")
    return stem, number


def _weights(facts: dict[str, Any], kind: Literal["resident", "streamed"]) -> str:
    """The bytes of weights, and whether they are laid out for the CPU once they are in memory."""
    packed = {"resident": ", packed" * facts["packed"], "streamed": ", then packed" * facts["packed_streamed"]}
    return f"{format_bytes(facts[f'{kind}_bytes'])}{packed[kind]}"


def _row(facts: dict[str, Any]) -> tuple[str, ...]:
    return (
        format_bytes(facts["budget_bytes"]),
        format_bytes(facts["peak_bytes"]),
        _time(facts["steady_pass_s"]),
        _time(facts["steady_bound_s"]),
        _time(facts["first_pass_s"]),
        _weights(facts, "streamed"),
        _weights(facts, "resident"),
        f"{facts['loaders']} + {facts['buffers']} x {format_bytes(facts['buffer_bytes'])}",
    )


def _sweep(manifest: Manifest, make: Any, smallest: int) -> list[int]:
    """Budgets from the smallest to one that keeps all weights packed in memory."""
    largest = smallest + manifest.weight_bytes
    while make(largest).streamed_bytes:
        largest += manifest.weight_bytes // _STEPS + 1
    return [smallest + (largest - smallest) * step // _STEPS for step in range(_STEPS + 1)]


def _least(manifest: Manifest, profile: Profile) -> str:
    return _time(roofline(manifest, profile, manifest.weight_bytes).steady_s)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*", text)
    if not match or not float(match[1]):
        raise typer.BadParameter(f"'{text}' is no time. Write it as 300ms or 1.5s.")
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
