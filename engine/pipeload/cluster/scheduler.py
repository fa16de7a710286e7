"""The process that knows the nodes: Dask's scheduler, without its web pages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from distributed import Scheduler

from pipeload.cluster import settings
from pipeload.cluster.certificates import security_of
from pipeload.cluster.running import until_stopped
from pipeload.errors import ClusterError
from pipeload.foreign import foreign_errors

__all__ = ["start"]


def start(host: str, port: int, certificates: Path | None, tell: Callable[[str], object]) -> None:
    """Run a cluster's scheduler until SIGINT or SIGTERM.

    Args:
        host: to listen on.
        port: 0 takes a free one.
        certificates: the directory of `make_certificates`; None listens without TLS, on loopback only.
        tell: called with the address once it is there.

    Raises:
        ConfigError: other machines would reach it without TLS, or certificates are missing.
        ClusterError: it cannot listen there.
    """
    protocol = "tcp" if certificates is None else "tls"
    shown = f"[{host}]" if ":" in host else host
    security = security_of(f"{protocol}://{shown}:{port}", certificates, "scheduler")
    settings.use()

    async def run(stopped: Callable[[], Awaitable[object]]) -> None:
        with foreign_errors(ClusterError, f"No scheduler can listen on {shown}:{port}", "Name another host or port."):
            scheduler = await Scheduler(
                host=host,
                port=port,
                protocol=f"{protocol}://",
                security=security,
                dashboard=False,
                # Listens, as Dask cannot be told otherwise, but has no page.
                dashboard_address="127.0.0.1:0",
            )
        try:
            tell(scheduler.address)
            await stopped()
        finally:
            await scheduler.close()

    until_stopped(run)
