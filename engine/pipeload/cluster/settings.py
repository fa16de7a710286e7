"""How the processes of a cluster use Dask."""

from __future__ import annotations

import logging

import dask
import distributed  # noqa: F401 - sets up the logger

__all__ = ["LOST_AFTER_S", "PORT", "use"]

PORT = 8786
LOST_AFTER_S = 20
"""A node that the scheduler has not heard of for this time is lost. One whose process ends is lost at once."""
_CONNECT_S = 10


def use() -> None:
    """Set Dask's options for this process, which is a scheduler's or a node's."""
    logging.getLogger("distributed").setLevel(logging.WARNING)
    dask.config.set(
        {
            # Neither a dashboard nor pages beside it: they have no TLS.
            "distributed.scheduler.http.routes": [],
            "distributed.worker.http.routes": [],
            "distributed.scheduler.worker-ttl": f"{LOST_AFTER_S}s",
            "distributed.comm.timeouts.connect": f"{_CONNECT_S}s",
            "distributed.comm.timeouts.tcp": f"{LOST_AFTER_S}s",
            # A sampling thread, whose records take memory.
            "distributed.worker.profile.enabled": False,
            "distributed.admin.low-level-log-length": 100,
        }
    )
