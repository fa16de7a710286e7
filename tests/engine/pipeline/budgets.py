"""A pipeline under one of three budgets, whose plans depend on budgets and needs only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.engine.pipeline.rig import Rig, rigged
from tests.engine.still_machine import PROCESS_BYTES

from pipeload.errors import BudgetError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan, make_plan
from pipeload.planning.profile import Profile, ShardTimes
from pipeload.planning.replanner import Replanner


class Unlearning(Replanner):
    """Does not learn, so that plans depend on budgets and needs only; tells when it was asked."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.asked = threading.Semaphore(0)

    def before_pass(self, *arguments: Any, **options: Any) -> Plan:
        try:
            return super().before_pass(*arguments, **options)
        finally:
            self.asked.release()

    def after_pass(self, *_: Any) -> bool:
        return False


def profile_of(manifest: Manifest) -> Profile:
    """Reading takes longest, and packing gains nothing."""
    times = ShardTimes(session_s=1e-4, run_s=1e-4, loading_run_s=1e-4, pack_s=1e-2, packed_run_s=1e-4)
    shards = {shard.name: times for shard in manifest.shards}
    return Profile(process_bytes=PROCESS_BYTES, cores=1, read_bytes_per_s={1: 1e9, 2: 1.2e9}, times={1: shards})


def budgets_of(manifest: Manifest, profile: Profile) -> list[int]:
    """From one buffer to everything resident, nothing packed."""

    def plan(budget: int) -> Plan:
        return make_plan(manifest, profile, budget_bytes=budget, needs=Needs(pass_bytes=10**6))

    with pytest.raises(BudgetError) as caught:
        plan(1)
    least = caught.value.needed_bytes
    everything = next(b for b in range(least, least + 10**9, 10**6) if not plan(b).streamed_bytes)
    assert not plan(everything).packed
    return [least, (least + everything) // 2, everything]


@contextmanager
def budgeted(directory: Path, which: int) -> Iterator[tuple[Rig, list[int], list[int]]]:
    """A rig under one of the budgets; the budgets and the free memory, which the test may change."""
    profile = profile_of(manifests.read(directory))
    budgets = budgets_of(manifests.read(directory), profile)
    free = [10**12]

    def replanner(manifest: Manifest) -> tuple[Plan, Replanner]:
        made = Unlearning(manifest, profile, budget_bytes=budgets[which], free_bytes=lambda: free[0])
        return made.plan(Needs(pass_bytes=10**6)), made

    with rigged(directory, replanner=replanner) as rig:
        yield rig, budgets, free
