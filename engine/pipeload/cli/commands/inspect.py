"""`pipeload inspect`: the contents of a sharded model directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeload.cli.options import Directory, Json
from pipeload.cli.report import accuracy_report, differences, parity_report, print_json, print_table, summary, table
from pipeload.cli.terminal import say
from pipeload.format.manifest import Manifest, Shard, TensorSpec, first_places, read
from pipeload.machine.sizes import format_bytes

__all__ = ["inspect"]

_NAME_CHARACTERS = 26


def inspect(directory: Directory, as_json: Json = False) -> None:
    """Say what is in a sharded model directory, from its manifest alone.

    Examples:
        pipeload inspect models/exported/minilm

        pipeload inspect models/exported/minilm --json | jq .largest_shard_bytes
    """
    manifest = read(directory)
    if as_json:
        print_json(_facts(directory, manifest))
        return
    print_table(str(directory), summary(manifest) | {"exporter": manifest.exporter, "format": manifest.format})
    say("\ninputs")
    say(table(_tensors(manifest, manifest.inputs)))
    say("\noutputs")
    say(table(_tensors(manifest, manifest.outputs)))
    say("\nshards")
    rows = [("name", "role", "weights", "structure", "takes", "makes", "tables")]
    say(table([*rows, *(_row(shard, first) for shard, first in _firsts(manifest))]))
    if manifest.head:
        say(f"\nhead: '{manifest.head.output}' in {len(manifest.head.shards)} slices of the vocabulary")
    say("\ncompared with the unsplit model when it was exported")
    say(differences(manifest.verification))
    if manifest.small_weights:
        say("\nwith weights of few bits, beside the source in float32")
        say(accuracy_report(manifest.small_weights))
    say("\nstreamed by the engine and compared with the source")
    say(parity_report(manifest.parity))


def _facts(directory: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "directory": str(directory),
        **summary(manifest),
        "exporter": manifest.exporter,
        "format": manifest.format,
        "inputs": manifest.inputs,
        "outputs": manifest.outputs,
        "caches": manifest.caches,
        "head": manifest.head,
        "shards_in_order": [
            {
                "name": shard.name,
                "role": shard.role,
                "bytes": shard.nbytes,
                "weights_of": first.name,
                "structure": shard.structure,
                "inputs": shard.inputs,
                "outputs": shard.outputs,
                "tables": [lookup.table for lookup in shard.lookups],
            }
            for shard, first in _firsts(manifest)
        ],
        "verification": manifest.verification,
        "parity": manifest.parity,
        "small_weights": manifest.small_weights,
    }


def _firsts(manifest: Manifest) -> Iterator[tuple[Shard, Shard]]:
    """Each shard, and the first one with the same weights."""
    for shard, first in zip(manifest.shards, first_places(manifest.shards), strict=True):
        yield shard, manifest.shards[first]


def _tensors(manifest: Manifest, specs: tuple[TensorSpec, ...]) -> Iterator[tuple[str, str]]:
    """A row for each tensor; the many caches share one row for each type and shape."""
    caches = manifest.cache_inputs | manifest.cache_outputs
    for spec in specs:
        if spec.name not in caches:
            yield spec.name, f"{spec.dtype}{_shape(spec)}"
    alike: dict[str, list[str]] = {}
    for spec in specs:
        if spec.name in caches:
            alike.setdefault(f"{spec.dtype}{_shape(spec)}", []).append(spec.name)
    for kind, names in alike.items():
        yield f"{names[0]} ... ({len(names)} caches)", kind


def _shape(spec: TensorSpec) -> str:
    return f"[{', '.join(map(str, spec.shape))}]"


def _row(shard: Shard, first: Shard) -> tuple[str, ...]:
    tables = ", ".join(f"{lookup.table.name} {list(lookup.table.shape)}" for lookup in shard.lookups)
    return (
        shard.name,
        shard.role,
        format_bytes(shard.nbytes) if first is shard else f"those of {first.name}",
        shard.structure,
        _names(shard.inputs),
        _names(shard.outputs),
        tables,
    )


def _names(names: tuple[str, ...]) -> str:
    """The first name, cut to its end since ONNX names are long paths, and the number of names that follow."""
    if not names:
        return ""
    first = names[0] if len(names[0]) <= _NAME_CHARACTERS else f"...{names[0][3 - _NAME_CHARACTERS :]}"
    return first + (f" +{len(names) - 1}" if len(names) > 1 else "")
