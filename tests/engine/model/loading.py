"""Models under budgets of every kind, and calls on them, for the tests of the facade."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.engine.harness import (
    EMULATED,
    Gate,
    assert_close,
    assert_same,
)
from tests.engine.still_machine import PROFILE

import pipeload
from pipeload.format import manifest as manifests
from pipeload.planning import needs, planner
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.storage.weights import Storage

THREADS = 2


PLENTY = "8GB"


no_subprocess = pytest.mark.skipif(EMULATED, reason="subprocesses do not work under qemu")


def load(directory: Path, budget: int | str | pipeload.Budget = PLENTY, **options: Any) -> pipeload.Model:
    return pipeload.load(directory, budget, **{"threads": THREADS, **options})


def budget_kinds(directory: Path) -> dict[str, int]:
    """A budget for each kind of plan, from the smallest that works to one in which everything fits."""
    manifest = manifests.read(directory)
    dims = needs.planning_dims(manifest) | {d: 32 for d in ("height", "width") if d in manifest.dims}
    # Of a whole pass: caches are then outputs, and take more than a step's.
    need = needs.Needs(pass_bytes=needs.pass_bytes(manifest, dims))

    def plan(budget: int) -> Plan:
        return planner.make_plan(manifest, PROFILE, budget_bytes=budget, needs=need, threads=THREADS)

    with pytest.raises(pipeload.BudgetError) as caught:
        plan(1)
    found: dict[str, int] = {}
    for budget in range(caught.value.needed_bytes - 2_000_000, caught.value.needed_bytes + 100_000_000, 100_000):
        try:
            made = plan(budget)
        except pipeload.BudgetError:
            continue
        kind = f"{made.buffers} buffers, {'some' if made.resident else 'none'} resident"
        kind += ", some in part" * bool(made.partly_resident)
        if not made.streamed_bytes:
            kind = "packed" if made.packed else "all resident"
        found.setdefault(kind, budget)
        if made.packed:
            break
    return found


def check_until_packed(model: pipeload.Model, inputs: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Bit for bit as long as nothing was ever packed, and close from then on."""
    outputs = model.run(inputs)
    if any(span.kind == "pack" for span in model.trace.spans):
        assert_close(outputs, expected, 1e-5)
    else:
        assert_same(outputs, expected)


def fast_profile(directory: Path) -> Profile:
    """Reading takes longest, and packing gains nothing."""
    times = ShardTimes(session_s=1e-4, run_s=1e-4, loading_run_s=1e-4, pack_s=1e-2, packed_run_s=1e-4)
    shards = {shard.name: times for shard in manifests.read(directory).shards}
    return Profile(process_bytes=1, cores=99, read_bytes_per_s={1: 1e9}, times={THREADS: shards})


def gated_reads(monkeypatch: pytest.MonkeyPatch, at: str) -> Gate:
    """Reading this shard stops at a gate."""
    gate, real = Gate(), Storage.read_weights

    def read(self: Storage, shard: Any, *rest: Any, **options: Any) -> bool:
        if shard.name == at:
            gate.stop_here()
        return real(self, shard, *rest, **options)

    monkeypatch.setattr(Storage, "read_weights", read)
    return gate
