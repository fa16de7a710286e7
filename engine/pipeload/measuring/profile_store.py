"""Profiles as files, and a store of them in the user's cache.

A profile belongs to the machine, the storage device, the versions of the software, the model and the sizes of its
inputs that it was measured with: its `Identity`. The store keeps one file for each, and `find` returns a profile only
where all of that is the same.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pipeload.errors import ConfigError, PipeloadError
from pipeload.format import manifest as manifests
from pipeload.machine.cgroups import cpu_quota, read_limits
from pipeload.machine.cores import core_capacities
from pipeload.machine.files import read_file, read_stream, replace_file, write_whole
from pipeload.machine.hardware import cores, cpu_name, device_of, memory_bytes
from pipeload.machine.memory import rss_bytes
from pipeload.machine.user_cache import user_cache
from pipeload.planning.profile import Profile

__all__ = ["Identity", "find", "identify", "keep", "read", "write"]

_FORMAT = 1
_MOST_BYTES = 4 << 20

_SOFTWARE = ("numpy", "onnxruntime", "pipeload")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The machine, software and model that a profile was measured with.

    Attributes:
        architecture, cpu, cores, memory_bytes: the machine, and the part of it that the process may use.
        device: the storage device of the model directory, `major:minor`.
        read_limits: cgroup rules that throttle reading.
        software: package -> version.
        model: sha256 of the model's manifest.
        dims: sizes of the symbolic dimensions.
        core_capacities: see `Profile`.
        cpu_quota: processors, where a cgroup allows less than `cores`, which are whole; None where it does not.
    """

    architecture: str
    cpu: str
    cores: int
    memory_bytes: int
    device: str
    read_limits: str
    software: dict[str, str]
    model: str
    dims: dict[str, int]
    core_capacities: dict[int, int] = field(default_factory=dict)
    cpu_quota: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    format: int
    profile: dict[str, Any]
    identity: Identity | None = None


def identify(directory: Path, dims: Mapping[str, int]) -> Identity:
    """The identity of a profile of the model in `directory` that is measured here and now.

    Raises:
        ManifestError: the directory's manifest cannot be read.
    """
    quota, whole = cpu_quota(), cores()
    return Identity(
        architecture=platform.machine(),
        cpu=cpu_name(),
        cores=whole,
        memory_bytes=memory_bytes(),
        device=device_of(directory),
        read_limits=read_limits(),
        software={name: _version(name) for name in _SOFTWARE},
        model=hashlib.sha256(manifests.content(directory)).hexdigest(),
        dims=dict(sorted(dims.items())),
        core_capacities=core_capacities(),
        cpu_quota=quota if quota < whole else None,
    )


def write(profile: Profile, path: Path, identity: Identity | None = None) -> None:
    """Write a profile as indented JSON, all of it or nothing.

    Raises:
        OSError: the file cannot be written; an older one is still there.
    """
    write_whole(path, _encode(profile, identity))


def read(path: Path) -> Profile:
    """The profile in a file that `write` made, with the memory that this process occupies now.

    Raises:
        ConfigError: the file cannot be read, or holds no profile.
    """
    return _read(path, read_stream)[0]


def find(directory: Path, dims: Mapping[str, int]) -> Profile | None:
    """The kept profile of the model in `directory` at these sizes, measured as things are now; None without one.

    A file that is damaged, or was copied there from elsewhere, counts as none.
    """
    with suppress(PipeloadError):
        identity = identify(directory, dims)
        path = _place(identity)
        if path is not None:
            profile, kept = _read(path, read_file)
            return profile if kept == identity else None
    return None


def keep(directory: Path, profile: Profile) -> Path | None:
    """Put a profile of the model in `directory` into the store. Returns its file, None where none can be written."""
    with suppress(OSError, PipeloadError):
        identity = identify(directory, profile.dims)
        path = _place(identity)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, _encode(profile, identity))
        return path
    return None


def _encode(profile: Profile, identity: Identity | None) -> bytes:
    fields = _told(profile)
    del fields["process_bytes"]
    content = {"format": _FORMAT, "profile": fields, "identity": None if identity is None else _told(identity)}
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"


def _told(facts: Profile | Identity) -> dict[str, Any]:
    """Their fields; without capacities where no core is little, and without a quota where there is none, as files were
    before they had them.
    """
    fields: dict[str, Any] = msgspec.to_builtins(facts, str_keys=True)
    return {name: value for name, value in fields.items() if value or name not in ("core_capacities", "cpu_quota")}


def _read(path: Path, read_bytes: Callable[..., bytes]) -> tuple[Profile, Identity | None]:
    remedy = "Measure it again with `pipeload profile`."
    try:
        content = msgspec.json.decode(read_bytes(path, most_bytes=_MOST_BYTES), type=_File)
        if content.format != _FORMAT:
            raise ConfigError(f"{path} has format {content.format}; this pipeload reads format {_FORMAT}. {remedy}")
        fields = {**content.profile, "process_bytes": rss_bytes()}
        profile = msgspec.convert(fields, Profile, str_keys=True)
    except OSError as error:
        raise ConfigError(f"The profile {path} cannot be read: {error.strerror or error}. {remedy}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no profile, or a damaged one: {error}. {remedy}") from error
    if fault := _fault(profile):
        raise ConfigError(f"{path} is no profile, or a damaged one: {fault}. {remedy}")
    return profile, content.identity


def _fault(profile: Profile) -> str | None:
    """The first figure that no measurement can have given."""
    bandwidths = (profile.read_bytes_per_s, profile.cached_read_bytes_per_s, profile.read_bytes_per_s_by_request)
    for key, value in (item for found in bandwidths for item in found.items()):
        if key < 1 or value <= 0:
            return f"reads by {key} have {value} bytes/s"
    for threads, shards in profile.times.items():
        for name, times in shards.items():
            if threads < 1 or min(msgspec.to_builtins(times).values()) < 0:
                return f"shard '{name}' with {threads} threads has {times}"
    if any(core < 0 or capacity < 1 for core, capacity in profile.core_capacities.items()):
        return f"cores have the capacities {profile.core_capacities}"
    counts = (profile.runtime_bytes, profile.activation_bytes, profile.cache_bytes_per_token, *profile.dims.values())
    if profile.cores < 1 or min(counts) < 0:
        return "it has a negative number of bytes, or no cores"
    return None


def _place(identity: Identity) -> Path | None:
    digest = hashlib.sha256(msgspec.json.encode(_told(identity), order="sorted")).hexdigest()
    folder = user_cache("profiles")
    return folder / f"{digest[:16]}.json" if folder else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
