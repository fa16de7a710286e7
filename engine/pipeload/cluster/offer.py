"""A node's offer: what it tells the scheduler when it comes, and everyone who asks there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pipeload.errors import ClusterError, ConfigError, ManifestError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME

__all__ = ["BUDGET", "FETCHED", "OFFER", "Offer", "models_in"]

OFFER = "pipeload"
"""Its key in what Dask tells of a worker."""
BUDGET = "pipeload-budget"
"""The key of the bytes that the node may use now."""
FETCHED = "pipeload-fetched"
"""The key of the names of models that the node has fetched files of, by sha256 of the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A node as it was when it started.

    Attributes:
        name: the node's.
        process: of this start of the node, so that one that comes back is another one.
        budget_bytes: the most memory that its process may use.
        process_bytes: memory of its process without models, and what it keeps for messages.
        cores: processors that it may use.
        trusted: may run a model's first and last shards, which see texts and answers.
        models: name -> sha256 of the manifest.
        fetched_bytes: the most disk for shards of other models, which it takes from other nodes; 0 where it takes none.
    """

    name: str
    process: str
    budget_bytes: int
    process_bytes: int
    cores: int
    trusted: bool
    models: dict[str, str]
    fetched_bytes: int

    def has(self, sha256: str) -> bool:
        """Whether it has all of the model with this manifest."""
        return sha256 in self.models.values()

    def told(self) -> dict[str, Any]:
        """The offer as plain values."""
        return dict(msgspec.to_builtins(self))

    @classmethod
    def heard(cls, told: Mapping[str, Any]) -> Offer:
        """The offer of plain values.

        Raises:
            ClusterError: they are none of this version.
        """
        try:
            return msgspec.convert(told, cls)
        except msgspec.ValidationError as error:
            raise ClusterError(
                f"A node's offer cannot be read: {error}. Run one version of pipeload on all machines of a cluster."
            ) from error


def models_in(directory: Path) -> dict[str, tuple[str, Path]]:
    """Name -> sha256 of the manifest and directory, of each sharded model directory in a directory.

    Raises:
        ConfigError: it is no directory.
        ManifestError: a manifest is damaged.
    """
    found: dict[str, tuple[str, Path]] = {}
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory. Name one that holds sharded model directories.")
    for path in sorted(directory.iterdir()):
        if (path / MANIFEST_NAME).is_file():
            data = manifests.content(path)
            try:
                manifests.parse(data, path / MANIFEST_NAME)
            except ManifestError as error:
                raise ManifestError(f"{error} Or remove {path}.") from error
            found[path.name] = (hashlib.sha256(data).hexdigest(), path)
    return found
