"""All rows, by what fails."""

from __future__ import annotations

from tests.system import allocators, disks, groups, kills, limits, places, servers, space
from tests.system.rows import Row

__all__ = ["ROWS"]

ROWS: tuple[Row, ...] = (
    *disks.ROWS,
    *groups.ROWS,
    *kills.ROWS,
    *space.ROWS,
    *limits.ROWS,
    *allocators.ROWS,
    *places.ROWS,
    *servers.ROWS,
)
