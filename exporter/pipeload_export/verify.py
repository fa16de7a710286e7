"""Is a sharded model directory whole, and does it compute what the unsplit model computes?

Three layers, each of which needs more installed: files and weights (nothing), graphs (the extra [export]), answers
(the extra, and the unsplit graph).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeload.errors import ConfigError, ExportError, PipeloadError, ShardError
from pipeload.manifest import Manifest, Shard, Verification, read
from pipeload.storage import Storage
from pipeload_export.chain import open_session, run_shards, run_unsplit
from pipeload_export.extra import has_module, require_modules
from pipeload_export.samples import Case, sample_cases

__all__ = ["Report", "limit_of", "verify"]

Progress = Callable[[str, int, int], None]

_PIECE_BYTES = 4 << 20
_LIMITS = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference that is allowed, in parts of the output's range. Float16 has 11 bits and bfloat16 has 8, and an
output is the end of many operations whose fused forms round at other places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was verified; whatever is in it passed.

    Attributes:
        shards: number of shards.
        files: number of files that the manifest lists.
        nbytes: their bytes.
        checks: what was checked.
        skipped: what was not, and why.
        differences: for each output, the worst difference between the shards and the unsplit model over all cases.
        cases: the batch sizes and lengths that were compared.
    """

    shards: int
    files: int
    nbytes: int
    checks: tuple[str, ...]
    skipped: tuple[str, ...]
    differences: tuple[Verification, ...]
    cases: tuple[str, ...]


def verify(directory: str | Path, against: str | Path | None = None, progress: Progress | None = None) -> Report:
    """Check a sharded model directory.

    Args:
        directory: the sharded model directory.
        against: the unsplit `.onnx` file; its answers are then compared with those of the shards.
        progress: called with what is being done, the part done, and the whole (0 when that is not known).

    Raises:
        ManifestError: there is no valid manifest.
        ShardError: files are missing, truncated, damaged or foreign; all of them are named.
        ExportError: a graph is not valid, does not run, or an output differs by more than its limit.
        ConfigError: `against` is no model to compare with.
    """
    directory, notify = Path(directory), progress or _silent
    manifest = read(directory)
    if against is not None:
        require_modules("onnx")
        if not Path(against).is_file():
            raise ConfigError(f"There is no unsplit model at {against}. Pass the path of its .onnx file.")
    _raise_all(_file_faults(directory, manifest, notify))
    _raise_all(_weight_faults(directory, manifest))
    checks = ["sizes and sha256 of all files", "safetensors headers and weights of every shard"]
    skipped = []
    if has_module("onnx"):
        from pipeload_export.graphcheck import check_graph  # needs onnx

        for number, shard in enumerate(manifest.shards):
            notify("check the graphs", number, len(manifest.shards))
            check_graph(directory, shard)
        notify("check the graphs", len(manifest.shards), len(manifest.shards))
        checks.append("every graph passes onnx.checker and points to the weights that the manifest lists")
    else:
        skipped.append("onnx.checker: the extra is not installed (pip install 'pipeload[export]')")
    for number, shard in enumerate(manifest.shards):
        notify("open the shards", number, len(manifest.shards))
        _check_session(directory, shard)
    notify("open the shards", len(manifest.shards), len(manifest.shards))
    checks.append("every shard opens in plain onnxruntime")
    cases: list[Case] = []
    differences: tuple[Verification, ...] = ()
    if against is None:
        skipped.append("comparison with the unsplit model: pass it with --against")
    else:
        cases = sample_cases(manifest, directory)
        differences = _compare(directory, manifest, Path(against), cases, notify)
        checks.append("the chain of shards computes what the unsplit model computes")
    return Report(
        shards=len(manifest.shards),
        files=len(manifest.files),
        nbytes=sum(record.nbytes for record in manifest.files),
        checks=tuple(checks),
        skipped=tuple(skipped),
        differences=differences,
        cases=tuple(case.name for case in cases),
    )


def limit_of(dtype: str) -> float:
    """The largest allowed difference of an output of that element type, in parts of its range; 0 for integers."""
    return _LIMITS.get(dtype, 0.0)


def _file_faults(directory: Path, manifest: Manifest, progress: Progress) -> Iterator[str]:
    done, total = 0, sum(record.nbytes for record in manifest.files)
    root = directory.resolve()
    for record in manifest.files:
        path = directory / record.path
        if not path.resolve().is_relative_to(root):
            yield f"'{record.path}' leads out of the model directory"
            continue
        try:
            if path.stat().st_size != record.nbytes:
                yield f"'{record.path}' has {path.stat().st_size} bytes, the manifest says {record.nbytes}"
                continue
            digest = hashlib.sha256()
            with path.open("rb", buffering=0) as file:
                while piece := file.read(_PIECE_BYTES):
                    digest.update(piece)
                    done += len(piece)
                    progress("check the files", done, total)
        except OSError as error:
            yield f"'{record.path}' cannot be read ({error.strerror or error})"
            continue
        if digest.hexdigest() != record.sha256:
            yield f"'{record.path}' is damaged: its sha256 is not the one in the manifest"


def _weight_faults(directory: Path, manifest: Manifest) -> Iterator[str]:
    """What the engine itself would object to when it loads the shards."""
    storage = Storage(directory, manifest)
    for shard in manifest.shards:
        try:
            storage.graph(shard)
            storage.verify_mapped(shard)
        except PipeloadError as error:
            yield str(error)


def _raise_all(faults: Iterator[str]) -> None:
    if found := list(faults):
        raise ShardError(f"{'; '.join(found)}. Copy or export the model again.")


def _check_session(directory: Path, shard: Shard) -> None:
    session = open_session(directory / shard.graph.path, f"shard '{shard.name}'")
    for what, listed, found in (
        ("inputs", shard.inputs, session.get_inputs()),
        ("outputs", shard.outputs, session.get_outputs()),
    ):
        if tuple(value.name for value in found) != listed:
            raise ExportError(
                f"Shard '{shard.name}' has the {what} {[value.name for value in found]}, the manifest says "
                f"{list(listed)}. Export the model again."
            )


def _compare(
    directory: Path, manifest: Manifest, against: Path, cases: list[Case], progress: Progress
) -> tuple[Verification, ...]:
    # Sessions are made one after another, and the first is gone before the second comes.
    wanted = run_unsplit(against, cases, progress)
    found = run_shards(directory, manifest, cases, progress)
    _check_caches(manifest, cases, found)
    worst = tuple(
        max(
            (
                _difference(spec.name, a[spec.name], b[spec.name], c)
                for a, b, c in zip(wanted, found, cases, strict=True)
            ),
            key=lambda result: result.max_rel_error,
        )
        for spec in manifest.outputs
    )
    for result in worst:
        if not result.max_rel_error <= result.limit:
            raise ExportError(
                f"Output '{result.output}' of the shards differs from the unsplit model by {result.max_abs_error:.3g}, "
                f"which is {result.max_rel_error:.3g} of its range; the limit is {result.limit:.3g}. "
                "Please report the model."
            )
    return worst


def _check_caches(manifest: Manifest, cases: list[Case], found: list[dict[str, NDArray[Any]]]) -> None:
    """What goes into a cache comes out of the output that the manifest pairs with it, not of another one.

    The samples' caches are all different, so a wrong pair shows. Caches that change what they hold are left alone.
    """
    for case, outputs in zip(cases, found, strict=True):
        for cache in manifest.caches:
            present = outputs[cache.output]

            def kept(name: str, case: Case = case, present: NDArray[Any] = present) -> bool:
                past = case.inputs[name]
                return past.size > 0 and np.array_equal(past, present[tuple(map(slice, past.shape))])

            if not kept(cache.input) and (others := [c.input for c in manifest.caches if kept(c.input)]):
                raise ExportError(
                    f"Output '{cache.output}' continues the cache '{others[0]}', and the manifest pairs it with "
                    f"'{cache.input}'. Please report the model."
                )


def _difference(name: str, wanted: NDArray[Any], found: NDArray[Any], case: Case) -> Verification:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        raise ExportError(
            f"Output '{name}' of the shards is {found.dtype} {list(found.shape)} for {case.name}; the unsplit model "
            f"makes {wanted.dtype} {list(wanted.shape)}. Please report the model."
        )
    limit = limit_of(wanted.dtype.name)
    a, b = wanted.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    # Where the unsplit model says nothing (NaN) or infinity, the shards must say the same.
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return Verification(output=name, max_abs_error=0.0, max_rel_error=0.0, limit=limit)
    finite = a[np.isfinite(a)]
    error = float(np.abs(np.subtract(a, b, where=~same, out=np.zeros_like(a))).max())
    span = float(np.ptp(finite)) if finite.size else 0.0
    # A single number has no range: its size stands in.
    span = span or float(np.abs(finite).max(initial=0.0))
    relative = error / span if span and np.isfinite(error) else float("inf")
    return Verification(output=name, max_abs_error=error, max_rel_error=relative, limit=limit)


def _silent(what: str, done: int, total: int) -> None:
    """Nobody wants to know."""
