"""A node measures a model that it has no profile of by the model's own first shards, whatever its architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.engine.still_machine import PROCESS_BYTES

import pipeload
from pipeload.budget import Budget
from pipeload.cluster import rates
from pipeload.format import manifest as manifests
from pipeload.measuring import profiler
from pipeload.measuring.profiler import profile_dims
from pipeload.planning.profile import Profile

_GB = 1_000_000_000


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[pipeload.Model]:
    """The models that measuring has opened."""
    found: list[pipeload.Model] = []

    def load(*arguments: Any, **options: Any) -> pipeload.Model:
        found.append(pipeload.load(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(rates, "load", load)
    return found


def _speed(directory: Path, budget_bytes: int) -> Profile:
    return rates.speed_of(directory, manifests.read(directory), Budget(budget_bytes), PROCESS_BYTES)


def test_every_architecture_is_measured(
    exported: Path, opened: list[pipeload.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its shards hand on cannot be made up: GPT-2's lengths were, and no pass of it succeeded."""
    # The tiny GPT-2 has no more positions than the usual number.
    monkeypatch.setattr(profiler, "_PAST_TOKENS", 16)
    speed = _speed(exported, 8 * _GB)
    assert [model.stats.passes for model in opened] == [rates._RUNS]
    manifest = manifests.read(exported)
    first = opened[0].manifest.shards
    assert first == manifest.shards[: len(first)]
    assert first[-1].role == "block"
    assert speed.dims == profile_dims(manifest)
    for times in speed.times.values():
        assert times.keys() == {shard.name for shard in manifest.shards}
        assert sum(one.run_s for one in times.values()) > 0


def test_a_node_without_room_to_measure_still_tells_a_speed(toy: Path, opened: list[pipeload.Model]) -> None:
    speed = _speed(toy, PROCESS_BYTES)
    assert opened == []
    assert speed.times


def test_where_cores_are_little_a_node_is_measured_and_tells_its_speed_on_the_big_ones(
    toy: Path, opened: list[pipeload.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel refuses to pin a thread to these, which is no error.
    capacities = {900: 400, 901: 1024}
    monkeypatch.setattr(rates, "core_capacities", lambda: capacities)
    monkeypatch.setattr("pipeload.measuring.profiler.core_capacities", lambda: capacities)
    monkeypatch.setattr(rates, "cores", lambda: 2)
    speed = _speed(toy, 8 * _GB)
    assert list(speed.times) == [1]
    assert speed.core_capacities == capacities
    assert [model.plan.threads for model in opened] == [1]
