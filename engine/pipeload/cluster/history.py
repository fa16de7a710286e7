"""The changes of a model's placement while it is open."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeload.cluster.route import shards_of
from pipeload.format.manifest import Manifest
from pipeload.planning.placement import Placement

__all__ = ["EVENTS", "History", "Reconfiguration"]

EVENTS = "pipeload-reconfigurations"
"""The topic under which Dask's scheduler keeps the latest changes of all models of the cluster."""
_MOST = 100

_LOG = logging.getLogger("pipeload.cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconfiguration:
    """A change of the placement of a model, or one that failed.

    Attributes:
        at: when it was over; in UTC.
        before: the placement until then.
        after: the placement from then on; None where there is none, or the one before stays.
        why: the reason, and what failed.
        waited_s: seconds in which no call of the model could begin.
    """

    at: datetime
    before: Placement
    after: Placement | None
    why: str
    waited_s: float


class History:
    """The latest changes of one model.

    Args:
        name: the model's.
        manifest: its manifest.
        tell: gets each change as plain values, for the cluster's scheduler.
    """

    def __init__(self, name: str, manifest: Manifest, tell: Callable[[Mapping[str, Any]], object]) -> None:
        self._name, self._manifest, self._tell = name, manifest, tell
        self._known: deque[Reconfiguration] = deque(maxlen=_MOST)

    @property
    def known(self) -> tuple[Reconfiguration, ...]:
        """At most 100, the oldest first."""
        return tuple(self._known)

    def add(self, before: Placement, after: Placement | None, why: str, waited_s: float = 0.0) -> None:
        """Keep a change, log it, and tell the scheduler; see `Reconfiguration`."""
        self._known.append(
            Reconfiguration(at=datetime.now(UTC), before=before, after=after, why=why, waited_s=waited_s)
        )
        told = {
            "model": self._name,
            "before": self._shown(before),
            "after": None if after is None else self._shown(after),
            "why": why,
            "waited_s": waited_s,
        }
        level = logging.WARNING if after is None else logging.INFO
        _LOG.log(level, "%s: %s; was on %s, is on %s", self._name, why, told["before"], told["after"] or "the same")
        self._tell(told)

    def _shown(self, placement: Placement) -> str:
        return ", ".join(f"{one.node} {shards_of(self._manifest, one.begin, one.end)}" for one in placement.segments)
