"""`pipeload profile`: how fast is this model on this machine?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from pipeload.cli.options import Directory, Json, in_folder, read_sizes
from pipeload.cli.progress import progress_bars
from pipeload.cli.report import print_json, table
from pipeload.cli.terminal import say
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest, Shard
from pipeload.machine.cores import spelled
from pipeload.machine.sizes import format_bytes
from pipeload.measuring import profile_store
from pipeload.measuring.profiler import measure_model, profile_dims
from pipeload.notify import Notify
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.images import image_sizes

__all__ = ["profile"]

_TIMES = {
    "session": "session_s",
    "run": "run_s",
    "while reading": "loading_run_s",
    "pack": "pack_s",
    "packed run": "packed_run_s",
}


def profile(
    directory: Directory,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", callback=in_folder, help="Write it here as well.")
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--size", metavar="NAME=N", help="Size of a dimension of the inputs; once for each."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Run shards with N threads; else with every core, one less, and the big ones."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how fast this machine reads and runs a model's shards.

    Takes some seconds, in which nothing else should run. The result is kept in the user's cache, where loading the
    model finds it.

    Examples:
        pipeload profile models/exported/bert-large

        pipeload profile models/exported/minilm --size sequence_length=32 -o minilm.json
    """
    manifest = manifests.read(directory)
    dims = profile_dims(manifest, image_sizes(ModelFiles(directory, manifest), manifest) | read_sizes(sizes))
    with progress_bars() as progress:
        found = measure_model(
            directory, manifest, dims=dims, threads=None if threads is None else [threads], progress=progress
        )
        if manifest.draft and not sizes:
            # Plans weigh the model's own draft by its times.
            own = directory / manifest.draft.path
            profile_store.keep(own, _measured(own, threads, progress))
    kept = profile_store.keep(directory, found)
    if output:
        profile_store.write(found, output, profile_store.identify(directory, dims))
    if as_json:
        print_json({"directory": str(directory), "kept": str(kept) if kept else None, "profile": found})
        return
    say(f"{directory}  " + " ".join(f"{name}={size}" for name, size in found.dims.items()))
    _print_reading(found)
    for number, times in found.times.items():
        cores = spelled(found.core_capacities, number)
        say(f"\nshards with {number} {'thread' if number == 1 else 'threads'}{', ' if cores else ''}{cores}, ms")
        say(table(_rows(manifest, times, max(found.read_bytes_per_s.values(), default=0.0))))
    say("\nmemory that is not weights")
    facts = {"process": found.process_bytes, "onnxruntime": found.runtime_bytes, "one pass": found.activation_bytes}
    if manifest.caches:
        facts["cache of a token"] = found.cache_bytes_per_token
    say(table((name, format_bytes(nbytes)) for name, nbytes in facts.items()))
    say(f"\nkept in {kept}" if kept else "\nnot kept: the user's cache cannot be written")


def _measured(directory: Path, threads: int | None, progress: Notify) -> Profile:
    manifest = manifests.read(directory)
    chosen = None if threads is None else [threads]
    return measure_model(directory, manifest, dims=profile_dims(manifest), threads=chosen, progress=progress)


def _print_reading(found: Profile) -> None:
    if not found.read_bytes_per_s:
        return
    say("\nreading, GB/s")
    rows = [("agents", "past the page cache", "through it")]
    for agents, direct in found.read_bytes_per_s.items():
        rows.append((str(agents), f"{direct / 1e9:.2f}", f"{found.cached_read_bytes_per_s[agents] / 1e9:.2f}"))
    say(table(rows))
    sizes = ", ".join(
        f"{nbytes >> 20} MiB {bandwidth / 1e9:.2f}" for nbytes, bandwidth in found.read_bytes_per_s_by_request.items()
    )
    say(f"  one agent by the size of its reads: {sizes}")


def _rows(manifest: Manifest, times: Mapping[str, ShardTimes], bandwidth: float) -> Iterator[tuple[str, ...]]:
    """A line for each structure, with the means of its shards, and one line for the sums."""
    yield "shards", "number", "bytes of each", "read", *_TIMES
    alike: dict[str, list[Shard]] = {}
    for shard in manifest.shards:
        alike.setdefault(shard.structure, []).append(shard)
    for shards in alike.values():
        yield _row(_span(shards), shards, times, bandwidth, len(shards))
    yield _row("all", list(manifest.shards), times, bandwidth, 1)


def _row(
    name: str, shards: list[Shard], times: Mapping[str, ShardTimes], bandwidth: float, parts: int
) -> tuple[str, ...]:
    nbytes = sum(shard.nbytes for shard in shards) / parts
    seconds = [nbytes / bandwidth if bandwidth else 0.0]
    seconds += [sum(getattr(times[shard.name], key) for shard in shards) / parts for key in _TIMES.values()]
    return name, str(len(shards)), format_bytes(nbytes), *(f"{1000 * each:.2f}" for each in seconds)


def _span(shards: list[Shard]) -> str:
    return shards[0].name if len(shards) == 1 else f"{shards[0].name} .. {shards[-1].name}"
