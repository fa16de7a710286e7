"""The contract between exporter and engine: `pipeload.json`, format 1.

The exporter builds a `Manifest` and calls `write`; the engine calls `read`, which refuses whatever
`write` would refuse. Every path is relative to the model directory and stays inside it.

A model is a list of shards in running order. Tensors that travel between shards are *edges*; an edge has one
name in the whole model, which is also the name of the input or output in the shard's own graph.

`records` defines the records, `dims` their symbolic dimensions, `faults` their inconsistencies; this module has
everything that the rest of pipeload uses of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec

from pipeload.errors import ManifestError
from pipeload.format.dims import bind_dims, evaluate_dim, match_dims, symbols
from pipeload.format.dtypes import dtype_bytes
from pipeload.format.faults import faults
from pipeload.format.records import (
    FORMAT_VERSION,
    LENGTH_AXIS,
    PAGE_BYTES,
    Accuracy,
    ByteTerm,
    Cache,
    Draft,
    FileRecord,
    Head,
    Lookup,
    Manifest,
    OutputError,
    Parity,
    Role,
    RopeChange,
    Shard,
    ShardError,
    SmallWeights,
    Structure,
    TensorSpec,
    Vectors,
    Verification,
    WeightSpec,
    WeightsRange,
    first_places,
)
from pipeload.machine.files import read_file

__all__ = [
    "FORMAT_VERSION",
    "LENGTH_AXIS",
    "MANIFEST_NAME",
    "MOST_BYTES",
    "PAGE_BYTES",
    "Accuracy",
    "ByteTerm",
    "Cache",
    "Draft",
    "FileRecord",
    "Head",
    "Lookup",
    "Manifest",
    "OutputError",
    "Parity",
    "Role",
    "RopeChange",
    "Shard",
    "ShardError",
    "SmallWeights",
    "Structure",
    "TensorSpec",
    "Vectors",
    "Verification",
    "WeightSpec",
    "WeightsRange",
    "bind_dims",
    "content",
    "dtype_bytes",
    "evaluate_dim",
    "first_places",
    "match_dims",
    "parse",
    "read",
    "symbols",
    "write",
]

MANIFEST_NAME = "pipeload.json"
MOST_BYTES = 16 << 20
"""A manifest of a hundred layers has about 500 kB, and one of 16 MiB takes some seconds to check."""
_MOST_FAULTS, _FAULT_CHARACTERS = 20, 400
"""A message lists at most this many faults, each with at most this many characters."""


def read(directory: Path) -> Manifest:
    """The validated manifest of a sharded model directory.

    Raises:
        ManifestError: there is none, it is no JSON of this format, its version is unknown, or it is inconsistent.
    """
    return parse(content(directory), directory / MANIFEST_NAME)


def content(directory: Path) -> bytes:
    """The bytes of the manifest of a sharded model directory.

    Raises:
        ManifestError: there is none, or it cannot be read.
    """
    path = directory / MANIFEST_NAME
    try:
        return read_file(path, most_bytes=MOST_BYTES)
    except NotADirectoryError as error:
        raise ManifestError(
            f"{directory} is no directory. Pass the directory that `pipeload export` made, which holds {MANIFEST_NAME}."
        ) from error
    except FileNotFoundError as error:
        raise ManifestError(
            f"{path} does not exist, so {directory} is not a sharded model directory. "
            f"Make one with {_export_command(directory)}."
        ) from error
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}. Copy or export the model again.") from error


def _export_command(directory: Path) -> str:
    """The command that makes a directory of what the caller named instead of one."""
    # NAME or OWNER/NAME may be a model of the hub; a checkpoint is a folder with a config.
    if (directory / "config.json").is_file():
        return f"`pipeload export {directory} {directory.name}-pipeload`"
    if not directory.exists() and not directory.is_absolute() and len(directory.parts) == 2:
        return f"`pipeload export {directory} {directory.name}` if that is a model of the hub"
    return "`pipeload export SOURCE TARGET`"


def parse(data: bytes, path: Path) -> Manifest:
    """The validated manifest that the bytes of a `pipeload.json` hold.

    Args:
        data: the bytes that `content` returned.
        path: the file that they come from; only for messages.

    Raises:
        ManifestError: it is no JSON of this format, its version is unknown, or it is inconsistent.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).format
        if version != FORMAT_VERSION:
            raise ManifestError(
                f"{path} has format {version}; this pipeload reads format {FORMAT_VERSION}. "
                "Upgrade pipeload, or export the model again with this one."
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"{path} is damaged: {error}. Export the model again.") from error
    _check(manifest)
    return manifest


def write(manifest: Manifest, directory: Path) -> Path:
    """Validate the manifest and write it into the directory as indented JSON. Returns the file's path."""
    _check(manifest)
    path = directory / MANIFEST_NAME
    path.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    return path


@dataclass(frozen=True)
class _Version:
    format: int


def _check(manifest: Manifest) -> None:
    """Raise one ManifestError that lists every fault of the manifest, or return."""
    if found := list(islice(faults(manifest), _MOST_FAULTS + 1)):
        count = f"more than {_MOST_FAULTS}" if len(found) > _MOST_FAULTS else str(len(found))
        shown = "; ".join(_shortened(fault) for fault in found[:_MOST_FAULTS])
        raise ManifestError(
            f"{MANIFEST_NAME} has {count} fault{'s' * (len(found) > 1)}: {shown}. Export the model again."
        )


def _shortened(fault: str) -> str:
    """A fault, without its middle where it is very long."""
    if len(fault) <= _FAULT_CHARACTERS:
        return fault
    return f"{fault[: _FAULT_CHARACTERS // 2]} ... {fault[-_FAULT_CHARACTERS // 2 :]}"
