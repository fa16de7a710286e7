"""A part of a processor for a node: a quota of cgroups v1, which can be changed while the node runs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Quota", "quota"]

_ROOT = Path("/sys/fs/cgroup/cpu")
_PERIOD_US = 20_000
"""Short beside the time of a shard, so that a node computes slowly, and not by fits and starts."""
_ENTER = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True, slots=True)
class Quota:
    """A group whose processes share a part of a processor."""

    _folder: Path

    def limit(self, cores: float) -> None:
        """Change the quota.

        Args:
            cores: processors' time in a second, of all its processes together.
        """
        (self._folder / "cpu.cfs_quota_us").write_text(str(round(cores * _PERIOD_US)))

    def entering(self, command: Sequence[str]) -> list[str]:
        """A command as it runs in the group."""
        return ["/bin/sh", "-c", _ENTER, str(self._folder / "cgroup.procs"), *command]


@contextmanager
def quota(cores: float) -> Iterator[Quota]:
    """A group with a quota; it is removed at the end, when its processes have ended.

    Args:
        cores: see `Quota.limit`.

    Raises:
        OSError: this user may not make one, or the machine has no cgroups of v1 for processors.
    """
    folder = _ROOT / f"pipeload-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        (folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        made = Quota(folder)
        made.limit(cores)
        yield made
    finally:
        folder.rmdir()
