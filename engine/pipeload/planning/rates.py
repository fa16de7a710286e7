"""Speeds of reading and running: from a profile, or assumed without one. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeload.errors import ConfigError
from pipeload.format.manifest import Manifest, Shard
from pipeload.machine.cores import big_cores
from pipeload.planning.profile import Profile, ShardTimes

__all__ = ["ASSUMED_READ_BYTES_PER_S", "LOADERS", "Rates"]

LOADERS = (1, 2, 4)
"""Numbers of Loading Agents to try. More were never faster on a disk that is read in large pieces."""
_CACHED_SHARE = 0.9
"""The page cache is used only where direct reads are below this fraction of its speed: it costs processor time."""
ASSUMED_READ_BYTES_PER_S = 1e9
_ASSUMED_RUN_BYTES_PER_S = 4e9
_ASSUMED_PACK_BYTES_PER_S = 0.7e9
_ASSUMED_WIDEN_BYTES_PER_S = 4e9
_ASSUMED_PACKED_SHARE = 0.9
_ASSUMED_SESSION_S = 0.002
"""Without a profile: a middling disk, and computing that is bound by memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The figures that plans are made from.

    Attributes:
        read_bytes_per_s: by number of Loading Agents.
        direct: whether that is past the page cache.
        times: intra-op threads -> shard name -> seconds.
    """

    read_bytes_per_s: Mapping[int, float]
    direct: bool
    times: Mapping[int, Mapping[str, ShardTimes]]

    @classmethod
    def of(cls, manifest: Manifest, profile: Profile, threads: int | None) -> Rates:
        """The profile's rates with this many threads, or with every measured number of them.

        Raises:
            ConfigError: the profile was measured with another model.
        """
        direct, cached = profile.read_bytes_per_s, profile.cached_read_bytes_per_s
        prefer_cached = bool(cached) and max(cached.values()) * _CACHED_SHARE > max(direct.values(), default=0.0)
        bandwidth = cached if prefer_cached else direct
        times: Mapping[int, Mapping[str, ShardTimes]] = profile.times
        if times and threads is not None:
            # This number of threads was not measured: the nearest one at least tells fast shards from slow ones.
            nearest = min(times, key=lambda number: abs(number - threads))
            times = {threads: times[nearest]}
        for shard in manifest.shards:
            if any(shard.name not in measured for measured in times.values()):
                raise ConfigError(
                    f"The profile has no times of shard '{shard.name}', so it is another model's. "
                    "Measure this one with `pipeload profile`."
                )
        if not times:
            # Threads on big cores would wait for those on little ones.
            fitting = min(profile.cores, big_cores(profile.core_capacities) or profile.cores)
            times = {threads or fitting: {shard.name: _assumed_times(shard) for shard in manifest.shards}}
        assumed = dict.fromkeys(LOADERS, ASSUMED_READ_BYTES_PER_S)
        return cls(
            read_bytes_per_s=bandwidth or assumed,
            direct=not prefer_cached,
            times=times,
        )

    @property
    def loaders(self) -> list[int]:
        """Numbers of Loading Agents worth a try: those of `LOADERS` that were measured, or else all measured ones."""
        return [number for number in self.read_bytes_per_s if number in LOADERS] or list(self.read_bytes_per_s)

    def bandwidth(self, loaders: int) -> float:
        """Bytes per second of this many Loading Agents together."""
        # More agents never read more slowly; where they seem to, the disk had something else to do meanwhile.
        known = [number for number in self.read_bytes_per_s if number <= loaders] or [min(self.read_bytes_per_s)]
        return max(self.read_bytes_per_s[number] for number in known)

    def packing_streamed_pays(self, threads: int) -> bool:
        """For weights that onnxruntime handles far better packed than not (int4 and int8 matrices)."""
        times = self.times[threads].values()
        return sum(t.run_s for t in times) > sum(t.packed_run_s + t.pack_s for t in times)


def _assumed_times(shard: Shard) -> ShardTimes:
    run_s = shard.memory_bytes / _ASSUMED_RUN_BYTES_PER_S
    widen_s = (shard.memory_bytes - shard.nbytes) / _ASSUMED_WIDEN_BYTES_PER_S
    return ShardTimes(
        session_s=_ASSUMED_SESSION_S + widen_s,
        run_s=run_s,
        loading_run_s=run_s,
        pack_s=shard.memory_bytes / _ASSUMED_PACK_BYTES_PER_S + widen_s,
        packed_run_s=run_s * _ASSUMED_PACKED_SHARE,
    )
