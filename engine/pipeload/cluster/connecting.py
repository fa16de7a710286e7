"""`pipeload.connect`, without an import of Dask before it is called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipeload.errors import ConfigError
from pipeload.foreign import foreign_errors

if TYPE_CHECKING:
    from pipeload.cluster.connection import Connection

__all__ = ["connect", "missing_package"]


def connect(address: str, certificates: str | os.PathLike[str] | None = None) -> Connection:
    """Connect to a cluster: machines that run one model together.

    Args:
        address: of `pipeload cluster start`, as `"tls://HOST:8786"`; on loopback also `"tcp://127.0.0.1:8786"`.
        certificates: the directory with ca.pem, client.pem and client-key.pem of `pipeload cluster init`; None for an
            address without TLS.

    Returns:
        The connection, a context manager; its `load` opens models.

    Raises:
        ConfigError: an argument is invalid, certificates are missing, or the package distributed is not installed.
        ClusterError: no cluster answers there.

    Example:
        >>> with pipeload.connect("tls://10.0.0.1:8786", "certificates") as cluster:
        ...     vectors = cluster.load("bert-large").embed(["a cat", "a dog"])
    """
    if not isinstance(address, str):
        raise ConfigError(f"address is {address!r:.80}; it must be a str, such as 'tls://HOST:8786'.")
    with foreign_errors(ConfigError, f"{certificates!r} is no path of a directory", "Pass a str or a path."):
        folder = None if certificates is None else Path(certificates)
    try:
        from pipeload.cluster.connection import Connection
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    return Connection(address, folder)


connect.__module__ = "pipeload"


def missing_package(error: ModuleNotFoundError) -> ConfigError:
    """The error for a package of a cluster that is not installed; raises the given one where it is pipeload's own."""
    if error.name is None or error.name.startswith("pipeload"):
        raise error
    return ConfigError(
        f"A cluster needs the package {error.name}: pip install '.[cluster]' in the folder of pipeload's source."
    )
