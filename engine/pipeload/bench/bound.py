"""The bound T*: no engine can be faster than the disk and the cores are.

`python -m pipeload.bench.bound ORDER.json` profiles a model in a process of its own, so that it runs under the same
throttle of the disk as the contenders; `bounds` computes T* from what it wrote.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from pipeload import manifest as manifests
from pipeload import profiler
from pipeload.bench.spec import from_json, to_json
from pipeload.bench.workload import step_dims, work_inputs
from pipeload.buffers import Buffer, page_ceil
from pipeload.forward import Forward
from pipeload.manifest import Manifest
from pipeload.profile import Profile, ShardTimes
from pipeload.session import ShardSession, Stopper, to_value
from pipeload.storage import Storage

__all__ = ["Bounds", "Order", "Profiles", "bounds", "main"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to profile.

    Attributes:
        directory: the sharded model directory.
        dims: sizes of all symbolic dimensions of the first pass.
        threads: intra-op threads.
        target: where the `Profiles` go, as JSON.
    """

    directory: Path
    dims: dict[str, int]
    threads: int
    target: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiles:
    """The same model at the sizes of the first pass, and at those of a steady one (which are others for a decoder)."""

    first: Profile
    steady: Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """T* of a cold first pass and of a steady one, in seconds."""

    first_s: float
    steady_s: float


def main() -> int:
    """Read the order that the command line names, measure, write the profiles."""
    order = from_json(Path(sys.argv[1]).read_bytes(), Order)
    manifest = manifests.read(order.directory)
    later = step_dims(manifest, order.dims)
    first = _measure(order, manifest, order.dims)
    steady = first if later == order.dims else _measure(order, manifest, later)
    order.target.write_bytes(to_json(Profiles(first=first, steady=steady)))
    return 0


def bounds(manifest: Manifest, profiles: Profiles, resident_bytes: int) -> Bounds:
    """T* with so many bytes of weights resident between the passes."""
    return Bounds(
        first_s=_roofline(manifest, profiles.first, 0).first_s,
        steady_s=_roofline(manifest, profiles.steady, resident_bytes).steady_s,
    )


# From here to the end: stand-ins for `profiler.measure_model` and `planner.roofline`.


def _measure(order: Order, manifest: Manifest, dims: Mapping[str, int]) -> Profile:
    before = profiler.measure()
    chain = _Chain(order, manifest)
    forward = Forward(manifest, chain.storage)
    for _ in range(2):
        inputs = work_inputs(manifest, order.directory, dims)
        values = {spec.name: to_value(inputs[spec.name], spec.dtype) for spec in manifest.inputs}
        forward.run(values, chain.borrow, Stopper(), last_position=bool(manifest.caches))
    return Profile(
        process_bytes=before.process_bytes,
        cores=before.cores,
        read_bytes_per_s={1: chain.read_bytes / chain.read_s},
        dims=dict(dims),
        times={order.threads: chain.times},
    )


@dataclass
class _Chain:
    order: Order
    manifest: Manifest
    read_bytes: int = 0
    read_s: float = 1e-9
    times: dict[str, ShardTimes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.storage = Storage(self.order.directory, self.manifest, verify=False)
        self.buffer = Buffer(max(page_ceil(shard.nbytes) for shard in self.manifest.shards))

    @contextmanager
    def borrow(self, index: int) -> Iterator[ShardSession]:
        shard = self.manifest.shards[index]
        begin = time.perf_counter()
        self.storage.read_weights(shard, self.buffer, lambda: False)
        self.read_s += time.perf_counter() - begin
        self.read_bytes += shard.nbytes
        session = ShardSession(shard, self.storage.graph(shard), self.buffer, self.order.threads)
        begin = time.perf_counter()
        yield session
        seconds = time.perf_counter() - begin
        self.times[shard.name] = ShardTimes(
            session_s=0, run_s=seconds, loading_run_s=seconds, pack_s=0, packed_run_s=seconds
        )


def _roofline(manifest: Manifest, profile: Profile, resident_bytes: int) -> Bounds:
    """With weights s_i and compute times c_i of the shards, and the bandwidth B."""
    rate = max(profile.read_bytes_per_s.values())
    times = min(profile.times.values(), key=lambda shards: sum(each.run_s for each in shards.values()))
    run_s = [min(times[shard.name].run_s, times[shard.name].packed_run_s) for shard in manifest.shards]
    read_s = list(accumulate(shard.nbytes / rate for shard in manifest.shards))
    left_s = list(accumulate(reversed(run_s)))[::-1]
    return Bounds(
        first_s=max(before + after for before, after in zip(read_s, left_s, strict=True)),
        steady_s=max(sum(run_s), max(0, manifest.weight_bytes - resident_bytes) / rate),
    )


if __name__ == "__main__":
    sys.exit(main())
