"""Where models are opened: in this process, from a directory, or on the nodes of a cluster.

The only module of the server that opens models.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import pipeload
from pipeload.errors import ClusterError
from pipeload.format import manifest as manifests

if TYPE_CHECKING:
    from pipeload.budget import Budget
    from pipeload.cluster.connection import Connection
    from pipeload.format.manifest import Manifest
    from pipeload.model import Model

__all__ = ["Directory", "Nodes", "OnNodes", "Source"]

_AGAIN_S = 5.0
"""After a try in vain, the next one is not made before this time."""


class Source(Protocol):
    """Where one model is.

    Attributes:
        manifest: its description.
        made: seconds since the epoch, of its manifest.
        here: it runs in this process.
    """

    manifest: Manifest
    made: int
    here: bool

    @property
    def lost(self) -> bool:
        """Whether an open model of it answers no more, and has to be opened again."""

    def load(self) -> Model:
        """Open it.

        Raises:
            PipeloadError: it cannot be opened.
        """


class Directory:
    """A sharded model directory.

    Args:
        directory: its path.
        budget: gives the one that all models share.

    Attributes:
        manifest, made, here: see `Source`.

    Raises:
        ManifestError: the directory holds no valid model.
    """

    here = True
    lost = False

    def __init__(self, directory: Path, budget: Callable[[], Budget]) -> None:
        self._directory, self._budget = directory, budget
        self.manifest = manifests.read(directory)
        self.made = int((directory / manifests.MANIFEST_NAME).stat().st_mtime)

    def load(self) -> Model:
        """Open it."""
        return pipeload.load(self._directory, self._budget())


class Nodes:
    """A cluster, connected to again once its scheduler was lost. Safe to use from several threads.

    Args:
        address: the scheduler's.
        certificates: see `pipeload.connect`.

    Raises:
        ConfigError: as `pipeload.connect`.
        ClusterError: likewise.
    """

    def __init__(self, address: str, certificates: Path | None) -> None:
        self._address, self._certificates = address, certificates
        self._connecting = threading.Lock()
        self._refusal, self._again_s = "", 0.0
        self._connection = pipeload.connect(address, certificates)

    def connection(self) -> Connection:
        """A connection to the scheduler that is there now.

        Raises:
            ClusterError: there is none.
        """
        with self._connecting:
            if self._connection.lost:
                if time.monotonic() < self._again_s:
                    # Calls that have waited for the last try would else wait one after another.
                    raise ClusterError(self._refusal)
                try:
                    found = pipeload.connect(self._address, self._certificates)
                except ClusterError as error:
                    self._refusal, self._again_s = str(error), time.monotonic() + _AGAIN_S
                    raise
                self._connection.close()
                self._connection = found
            return self._connection

    def models(self) -> list[str]:
        """Names of the models that the nodes have.

        Raises:
            ClusterError: they have none.
        """
        found = {name for node in self._connection.nodes() for name in node.offer.models}
        if not found:
            raise ClusterError(f"The cluster at {self._address} has no node. Start one with `pipeload node`.")
        return sorted(found)

    def close(self) -> None:
        """Close the models, and the connection."""
        self._connection.close()


class OnNodes:
    """A model of a cluster.

    Args:
        nodes: the cluster.
        name: the model's name there.

    Attributes:
        manifest, made, here: see `Source`.

    Raises:
        ClusterError: no node has it.
    """

    here = False

    def __init__(self, nodes: Nodes, name: str) -> None:
        self._nodes, self._name = nodes, name
        self._connection: Connection | None = None
        self.manifest = nodes.connection().manifest(name)
        self.made = int(time.time())

    @property
    def lost(self) -> bool:
        """See `Source`."""
        # Of the connection that has opened it: another model may have brought about a new one since.
        return self._connection is not None and self._connection.lost

    def load(self) -> Model:
        """Open it. It has all of a model that routes use; its plans are the nodes' own."""
        self._connection = connection = self._nodes.connection()
        return cast("Model", connection.load(self._name))
