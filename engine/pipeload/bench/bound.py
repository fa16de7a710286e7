"""The bound T*: the least time of a pass in a model of the disk and the cores, from rates measured here.

`python -m pipeload.bench.bound ORDER.json` profiles a model in a process of its own, so that it runs under the same
throttle of the disk as the contenders; `bounds` computes T* from its output.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeload.bench.spec import from_json, to_json
from pipeload.bench.workload import step_dims
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest
from pipeload.measuring.profiler import measure_model
from pipeload.planning.profile import Profile
from pipeload.planning.schedule import roofline

__all__ = ["Bounds", "Order", "Profiles", "bounds", "main"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The order for one profiling process.

    Attributes:
        directory: the sharded model directory.
        dims: sizes of all symbolic dimensions of the first pass.
        threads: intra-op threads; None measures several numbers.
        target: the JSON file for the `Profiles`.
    """

    directory: Path
    dims: dict[str, int]
    threads: int | None
    target: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiles:
    """One model at the sizes of the first pass, and of a steady pass (which differ for a decoder)."""

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
    """T* with `resident_bytes` of weights resident between the passes."""
    return Bounds(
        first_s=roofline(manifest, profiles.first).first_s,
        steady_s=roofline(manifest, profiles.steady, resident_bytes).steady_s,
    )


def _measure(order: Order, manifest: Manifest, dims: Mapping[str, int]) -> Profile:
    return measure_model(order.directory, manifest, dims=dims, threads=(order.threads,) if order.threads else None)


if __name__ == "__main__":
    sys.exit(main())
