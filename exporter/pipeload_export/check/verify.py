"""Is a sharded model directory whole, and does it give the answers of the unsplit model?

Three layers, each of which needs more installed: files and weights (nothing), graphs (the extra [export]), answers
(the extra, and the unsplit graph).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipeload.errors import ConfigError, ExportError, PipeloadError, ShardError
from pipeload.foreign import first_line
from pipeload.format.manifest import FileRecord, Manifest, Parity, Shard, Verification, read
from pipeload.machine.files import open_file
from pipeload.notify import Notify
from pipeload.storage.digests import FileDigests, ranges_of
from pipeload.storage.weights import Storage
from pipeload_export.boundary import boundary
from pipeload_export.check.cases import Case, sample_cases
from pipeload_export.check.chain import run_unsplit
from pipeload_export.check.compare import Unsplit, compare
from pipeload_export.check.parity import check_parity
from pipeload_export.check.vectors import makes_vectors, obstacle
from pipeload_export.extra import has_module, how_to_install, require_modules
from pipeload_export.graph.runtime import open_session
from pipeload_export.source.places import Weights
from pipeload_export.source.sources import Checkpoint, find_source

__all__ = ["Report", "check_files", "runner", "verify", "verify_made"]

_PIECE_BYTES = 4 << 20
_REMEDY = "Export it from this source again, or pass the source that it was made from."


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of a verification that passed.

    Attributes:
        shards: number of shards.
        files: number of files that the manifest lists.
        nbytes: their bytes.
        checks: the checks that were made.
        skipped: the checks that were not made, and why.
        differences: for each output, the worst difference between the shards and the unsplit model over all cases.
        parity: how the streamed model compares with its source; None if it was not compared.
        cases: the batch sizes and lengths that were compared.
    """

    shards: int
    files: int
    nbytes: int
    checks: tuple[str, ...]
    skipped: tuple[str, ...]
    differences: tuple[Verification, ...]
    cases: tuple[str, ...]
    parity: Parity | None = None


def verify(
    directory: str | Path,
    against: str | Path | None = None,
    progress: Notify | None = None,
    *,
    source: str | Path | None = None,
) -> Report:
    """Check a sharded model directory.

    Args:
        directory: the sharded model directory.
        against: the unsplit `.onnx` file; its answers are then compared with those of the shards.
        progress: called with the name of the step, the part done, and the whole (0 where that is not known).
        source: the checkpoint that it was made from, as for `export`; its own answers are then compared with those of
            the directory, run by the engine.

    Raises:
        ManifestError: there is no valid manifest.
        ShardError: files are missing, truncated, damaged or foreign; all of them are named.
        ExportError: graphs are not valid or do not open, all of them named; one does not run, or an output differs by
            more than its limit.
        ConfigError: `against` or `source` is no model to compare with.
    """
    directory = Path(directory)
    with boundary(f"{directory} could not be verified", directory, progress) as notify:
        report = _verify(directory, None if against is None else _unsplit_at(Path(against)), notify)
        if source is None:
            skipped = () if against else ("comparison with the source: pass the checkpoint with --source",)
            return replace(report, skipped=(*report.skipped, *skipped))
        return _with_parity(report, directory, str(source), notify)


def _with_parity(report: Report, directory: Path, source: str, notify: Notify) -> Report:
    manifest = read(directory)
    found = find_source(source, task=manifest.task, progress=notify)
    if not isinstance(found, Checkpoint):
        raise ConfigError(f"'{source}' is an ONNX graph, not the checkpoint of a model. Pass it with --against.")
    with TemporaryDirectory(prefix="pipeload-verify-") as folder:
        parity = check_parity(directory, manifest, found.request, Path(folder), notify, _REMEDY)
    checks, skipped = [*report.checks, "the engine, streaming, answers as the source's own model does"], report.skipped
    if parity.vectors:
        checks.append("embed makes the vectors of sentence-transformers")
    elif makes_vectors(directory, manifest):
        why = obstacle(directory, manifest, found.request)
        skipped = (*skipped, f"comparison of vectors with those of sentence-transformers: {why}")
    return replace(report, checks=tuple(checks), skipped=skipped, parity=parity)


def verify_made(directory: Path, graph: Path, weights: Weights | None, notify: Notify) -> Report:
    """Check a sharded model directory that was just made.

    Args:
        directory: the sharded model directory.
        graph: the file that it was made from.
        weights: those of its weights that lie in a checkpoint.
        notify: as for `verify`.

    Raises:
        PipeloadError: as `verify` does.
    """
    return _verify(directory, runner(graph, weights), notify)


def check_files(directory: Path, notify: Notify) -> None:
    """Check the files and graphs of a sharded model directory that was just made, and not its answers.

    Args:
        directory: the sharded model directory.
        notify: as for `verify`.

    Raises:
        PipeloadError: as `verify` does.
    """
    _verify(directory, None, notify)


def runner(graph: Path, weights: Weights | None) -> Unsplit:
    """What runs an unsplit graph, some of whose weights may lie in a checkpoint."""
    if weights is None:
        return partial(run_unsplit, graph)
    from pipeload_export.check.parts import run_parts  # needs onnx

    return partial(run_parts, graph, weights)


def _unsplit_at(path: Path) -> Unsplit:
    require_modules("onnx")
    if not path.is_file():
        raise ConfigError(
            f"There is no unsplit model at {path}. Pass the .onnx file that the shards were made from, which "
            "`pipeload export --keep-onnx DIR` keeps."
        )
    return partial(run_unsplit, path)


def _verify(directory: Path, unsplit: Unsplit | None, notify: Notify) -> Report:
    manifest = read(directory)
    _raise_all(_file_faults(directory, manifest, notify))
    _raise_all(_weight_faults(directory, manifest))
    draft = _verified_draft(directory / manifest.draft.path, notify) if manifest.draft else None
    checks = ["sizes and sha256 of all files", "safetensors headers and weights of every shard"]
    skipped = []
    if has_module("onnx"):
        from pipeload_export.check.graphs import check_graph  # needs onnx

        _check_shards("check the graphs", check_graph, directory, manifest, notify)
        checks.append("every graph passes onnx.checker and points to the weights that the manifest lists")
    else:
        skipped.append(f"onnx.checker: the extra is not installed ({how_to_install()})")
    _check_shards("open the shards", _check_session, directory, manifest, notify)
    checks.append("every shard opens in plain onnxruntime")
    cases: list[Case] = []
    differences: tuple[Verification, ...] = ()
    if unsplit is None:
        skipped.append("comparison with the unsplit model: pass it with --against")
    else:
        cases = sample_cases(manifest, directory)
        differences = compare(directory, manifest, unsplit, cases, notify)
        rounded = any(cache.scale for cache in manifest.caches)
        but = ", but for the rounding of its int8 caches" if rounded else ""
        checks.append(f"the chain of shards computes what the unsplit model computes{but}")
    if draft:
        checks.append("all of that for the draft, too")
    return Report(
        shards=len(manifest.shards) + (draft.shards if draft else 0),
        files=len(manifest.files) + (draft.files if draft else 0),
        nbytes=sum(record.nbytes for record in manifest.files) + (draft.nbytes if draft else 0),
        checks=tuple(checks),
        skipped=tuple(skipped),
        differences=differences,
        cases=tuple(case.name for case in cases),
    )


def _verified_draft(directory: Path, notify: Notify) -> Report:
    try:
        return _verify(directory, None, notify)
    except ShardError as error:
        raise ShardError(f"The draft in '{directory.name}': {error}") from error


def _file_faults(directory: Path, manifest: Manifest, progress: Notify) -> Iterator[str]:
    """Faults of the files. Each is read once, for its own sha256 and for those of the shards that have a part of it."""
    ranges = ranges_of(manifest)
    done, total = 0, sum(record.nbytes for record in manifest.files)
    for record in manifest.files:
        spans = ranges.get(record.path, [])
        digests = FileDigests.of(record, spans)
        try:
            for piece in _pieces(directory, record):
                digests.update(piece)
                progress("check the files", done + digests.position, total)
        except ShardError as error:
            yield str(error)
            continue
        done += record.nbytes
        if not digests.agree(record, spans):
            yield f"'{record.path}' is damaged: its sha256 is not the one in the manifest"


def _pieces(directory: Path, record: FileRecord) -> Iterator[memoryview]:
    """The bytes of a file, each piece in the place of the one before. Raises ShardError if they are not all there."""
    try:
        folder = directory.resolve()
        path = (folder / record.path).resolve()
        if folder not in path.parents:
            raise ShardError(f"'{record.path}' leads out of the model directory")
        with open_file(path, below=folder) as descriptor:
            size = os.fstat(descriptor).st_size
            if size != record.nbytes:
                raise ShardError(f"'{record.path}' has {size} bytes, the manifest says {record.nbytes}")
            buffer = memoryview(bytearray(min(_PIECE_BYTES, max(size, 1))))
            position = 0
            while position < size:
                count = os.preadv(descriptor, [buffer[: size - position]], position)
                if not count:
                    raise ShardError(f"'{record.path}' ends at byte {position}: it was cut while it was read")
                position += count
                yield buffer[:count]
    except (OSError, RuntimeError) as error:  # Python has a RuntimeError for a circle of symbolic links
        raise ShardError(f"'{record.path}' cannot be read ({first_line(error)})") from error


def _weight_faults(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Faults that the engine finds in the headers of the weights files, whose sizes and hashes are right."""
    storage = Storage(directory, manifest, verify=False)
    no_rows = np.empty(0, np.int64)
    for shard in manifest.shards:
        try:
            storage.read_weights(shard, (), lambda: False)
            for lookup in shard.lookups:
                storage.read_rows(lookup, no_rows, keep_cached=True)
        except PipeloadError as error:
            yield str(error)


def _raise_all(faults: Iterator[str]) -> None:
    if found := list(faults):
        count = f"{len(found)} faults: " if len(found) > 1 else ""
        raise ShardError(f"{count}{'; '.join(found)}. Copy or export the model again.")


def _check_shards(
    what: str, check: Callable[[Path, Shard], None], directory: Path, manifest: Manifest, progress: Notify
) -> None:
    """Check every shard, and only then raise one ExportError with the faults of all."""
    faults = []
    for number, shard in enumerate(manifest.shards):
        progress(what, number, len(manifest.shards))
        try:
            check(directory, shard)
        except ExportError as error:
            faults.append(str(error))
    progress(what, len(manifest.shards), len(manifest.shards))
    if faults:
        raise ExportError(" ".join(faults))


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
