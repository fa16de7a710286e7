"""A model's profile: complete for every architecture, of the right sizes, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.engine.harness import agents

from pipeload.errors import ConfigError, ShardError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Shard
from pipeload.machine.memory import rss_bytes
from pipeload.measuring import bandwidth, profiler
from pipeload.measuring import stopwatch as stopwatches
from pipeload.measuring.profiler import measure, measure_model, profile_dims
from pipeload.planning.needs import cache_bytes, pass_bytes, planning_dims
from pipeload.storage.buffers import Buffer
from pipeload.storage.model_files import ModelFiles
from pipeload.storage.weights import Storage
from pipeload.tasks.images import image_sizes


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_SMALL_MODEL_S", 0.0)
    monkeypatch.setattr(stopwatches, "_RUNS", 1)
    monkeypatch.setattr(stopwatches, "_CHOSEN_S", 0.0)


@pytest.mark.measures("memory")
def test_the_quick_profile_is_of_this_process() -> None:
    found = measure()
    assert 0.5 * rss_bytes() < found.process_bytes < 2 * rss_bytes()
    assert found.cores >= 1
    assert not found.measured


def test_every_architecture_can_be_measured(exported: Path) -> None:
    manifest = manifests.read(exported)
    sizes = image_sizes(ModelFiles(exported, manifest), manifest)
    if "sequence_length" in manifest.dims:
        # Tiny models have few positions.
        sizes |= {"sequence_length": 8} | ({"past_sequence_length": 5} if manifest.caches else {})
    dims = profile_dims(manifest, sizes)
    found = measure_model(exported, manifest, dims=dims)
    assert found.measured
    assert found.dims == dims
    assert list(found.times) == list(dict.fromkeys((found.cores, max(1, found.cores - 1))))
    for times in found.times.values():
        assert list(times) == [shard.name for shard in manifest.shards]
    assert list(found.read_bytes_per_s) == list(found.cached_read_bytes_per_s) == [1, 2, 4, 8]
    assert found.activation_bytes > 0
    assert found.runtime_bytes >= 0
    assert bool(found.cache_bytes_per_token) == bool(manifest.caches)


def test_a_model_with_caches_is_measured_for_one_decode_step(toy_decoder: Path) -> None:
    manifest = manifests.read(toy_decoder)
    dims = profile_dims(manifest)
    assert dims == {"batch_size": 1, "sequence_length": 1, "past_sequence_length": 128}
    found = measure_model(toy_decoder, manifest, dims=dims, threads=[1])
    assert list(found.times) == [1]
    # Four blocks, each with a cache of 64 floats for a token.
    assert found.cache_bytes_per_token == 4 * 64 * 4
    doubled = found.cache_bytes_per_token * 2 * (128 + 1)
    assert cache_bytes(manifest, dims) == doubled


def test_the_cache_of_a_token_is_that_of_one_sequence(toy_decoder: Path) -> None:
    manifest = manifests.read(toy_decoder)
    dims = profile_dims(manifest, {"batch_size": 3, "past_sequence_length": 2})
    assert measure_model(toy_decoder, manifest, dims=dims, threads=[1]).cache_bytes_per_token == 4 * 64 * 4


def test_a_model_without_caches_is_measured_for_what_it_is_planned_for(toy: Path) -> None:
    manifest = manifests.read(toy)
    assert profile_dims(manifest) == planning_dims(manifest) == {"batch_size": 1, "sequence_length": 128}
    assert profile_dims(manifest, {"sequence_length": 3})["sequence_length"] == 3
    with pytest.raises(ConfigError, match=r"no dimension \['height'\]; it has"):
        profile_dims(manifest, {"height": 3})


def test_progress_tells_of_reading_and_running(toy: Path) -> None:
    told: list[tuple[str, int, int]] = []
    manifest = manifests.read(toy)
    dims = profile_dims(manifest, {"sequence_length": 2})
    measure_model(toy, manifest, dims=dims, threads=[1], progress=lambda *each: told.append(each))
    assert list(dict.fromkeys(what for what, *_ in told)) == ["Reading", "Running"]
    assert all(0 <= done <= total for _, done, total in told)


def test_where_no_peak_is_known_the_manifest_tells_the_activations(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatches, "reset_peak_rss", lambda: False)
    manifest = manifests.read(toy)
    dims = profile_dims(manifest)
    assert measure_model(toy, manifest, dims=dims, threads=[1]).activation_bytes == pass_bytes(manifest, dims)


@pytest.mark.parametrize("after", [0, 7, 60])
def test_a_reader_that_fails_leaves_no_thread_and_no_file(
    toy_large: Path, monkeypatch: pytest.MonkeyPatch, after: int, descriptors: object
) -> None:
    reads = iter(range(10**6))
    stream = Storage.stream_weights

    def fail(self: Storage, shard: Shard, scratch: Buffer, *, direct: bool = True) -> Iterator[int]:
        if next(reads) >= after:
            raise ShardError("The disk is gone.")
        yield from stream(self, shard, scratch, direct=direct)

    monkeypatch.setattr(Storage, "stream_weights", fail)
    manifest = manifests.read(toy_large)
    before = descriptors()  # type: ignore[operator]
    with pytest.raises(ShardError, match="The disk is gone"):
        measure_model(toy_large, manifest, dims=profile_dims(manifest), threads=[1])
    assert agents() == []
    assert descriptors() == before  # type: ignore[operator]


def test_inputs_that_the_model_cannot_take_are_refused(toy_decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ids that are no rows of the table, as a manifest of another model would make them.
    monkeypatch.setattr(
        profiler,
        "example_inputs",
        lambda manifest, dims: (
            {s.name: np.zeros([manifests.evaluate_dim(d, dims) for d in s.shape], s.dtype) for s in manifest.inputs}
            | {"input_ids": np.full((1, 1), 10**6)}
        ),
    )
    manifest = manifests.read(toy_decoder)
    with pytest.raises(ConfigError, match="'input_ids' is out of range"):
        measure_model(toy_decoder, manifest, dims=profile_dims(manifest), threads=[1])
