"""Measures this machine and this process, and a model on them -> Profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from pipeload.errors import ConfigError
from pipeload.format.caches import past_symbols
from pipeload.format.manifest import Manifest, symbols
from pipeload.machine.cores import big_cores, core_capacities, reading_cores
from pipeload.machine.hardware import cores
from pipeload.machine.heap import trim
from pipeload.machine.memory import warm_rss_bytes
from pipeload.machine.threads import together
from pipeload.measuring.bandwidth import measure_bandwidth
from pipeload.measuring.example_inputs import example_inputs
from pipeload.measuring.stopwatch import Stopwatch
from pipeload.notify import Notify
from pipeload.pipeline.session import to_value
from pipeload.planning import needs
from pipeload.planning.profile import Profile
from pipeload.storage.weights import Storage

__all__ = ["measure", "measure_model", "profile_dims"]

_PAST_TOKENS = 128
"""Cached tokens before the decode step that is measured."""


def measure() -> Profile:
    """The profile of this process as it is now; takes less than a millisecond."""
    trim()
    return Profile(process_bytes=warm_rss_bytes(), cores=cores(), core_capacities=core_capacities())


def profile_dims(manifest: Manifest, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Sizes of the symbolic dimensions that a profile is measured with; `sizes` override the defaults.

    Defaults without caches: the sizes that the first plan is made for. With caches: those of one decode step after 128
    tokens.

    Raises:
        ConfigError: the model has no such dimension.
    """
    if unknown := set(sizes or {}) - set(manifest.dims):
        raise ConfigError(f"The model has no dimension {sorted(unknown)}; it has {sorted(manifest.dims)}.")
    if not manifest.caches:
        return needs.planning_dims(manifest, sizes)
    past = past_symbols(manifest)
    return {symbol: _PAST_TOKENS if symbol in past else 1 for symbol in manifest.dims} | dict(sizes or {})


def measure_model(
    directory: Path,
    manifest: Manifest,
    *,
    dims: Mapping[str, int],
    threads: Sequence[int] | None = None,
    progress: Notify | None = None,
) -> Profile:
    """Measure the reading of the model's files and the runs of its shards, in some seconds and several reads of them.

    The process should be as it is when it runs the model, and nothing else should go on. The model's files are dropped
    from the page cache, and the peak of the process's memory, as the system counts it, begins anew.

    Args:
        directory: the sharded model directory.
        manifest: its validated manifest.
        dims: sizes of all symbolic dimensions, such as `profile_dims` gives.
        threads: numbers of intra-op threads to run with; None takes every core, one less, and the big ones.
        progress: called with (what, done, total).

    Returns:
        The profile. Its `runtime_bytes` say little where the process has run a model before.

    Raises:
        ConfigError: the model cannot take inputs of these sizes.
        ShardError, LoadError, RunError: a shard could not be read, made or run.
    """
    before = measure()
    report = progress or (lambda *_: None)
    storage = Storage(directory, manifest, verify=False)
    capacities = before.core_capacities
    big = min(before.cores, big_cores(capacities) or before.cores)
    bandwidth = measure_bandwidth(storage, manifest.shards, report, reading_cores(capacities, big))
    wanted = dict.fromkeys(threads or (before.cores, max(1, before.cores - 1), big))
    stopwatch = Stopwatch(storage, manifest, tuple(wanted), report, capacities)
    arrays = example_inputs(manifest, dims)
    inputs = {spec.name: to_value(arrays[spec.name], spec.dtype) for spec in manifest.inputs}
    # It moves from core to core, which the calling thread must not.
    (times,) = together([partial(stopwatch.run, inputs)]) if capacities else (stopwatch.run(inputs),)
    activation_bytes = stopwatch.activation_bytes
    if activation_bytes is None:
        activation_bytes = needs.pass_bytes(manifest, dims, positions=1 if manifest.caches else None)
    return Profile(
        process_bytes=before.process_bytes,
        cores=before.cores,
        read_bytes_per_s=bandwidth.read_bytes_per_s,
        cached_read_bytes_per_s=bandwidth.cached_read_bytes_per_s,
        read_bytes_per_s_by_request=bandwidth.read_bytes_per_s_by_request,
        dims=dict(dims),
        times=times,
        runtime_bytes=max(0, stopwatch.settled_bytes - before.process_bytes),
        activation_bytes=activation_bytes,
        cache_bytes_per_token=_cache_bytes_per_token(manifest, dims),
        core_capacities=capacities,
    )


def _cache_bytes_per_token(manifest: Manifest, dims: Mapping[str, int]) -> int:
    past = min(past_symbols(manifest), default=None)
    if past is None:
        return 0
    spec = next(spec for spec in manifest.inputs if spec.name == manifest.caches[0].input)
    # The first dimension is the batch.
    one = {**dims, **dict.fromkeys(symbols(spec.shape[0]), 1)}
    more = one | {past: one[past] + 1}
    outputs = [spec for spec in manifest.outputs if spec.name in manifest.cache_outputs]
    return sum(needs.tensor_bytes(spec, more) - needs.tensor_bytes(spec, one) for spec in outputs)
