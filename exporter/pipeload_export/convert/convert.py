"""A directory -> another one with smaller weights, complete and verified, or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from pipeload.errors import ConfigError
from pipeload.format.manifest import MANIFEST_NAME, Accuracy, Manifest
from pipeload.notify import Notify
from pipeload_export.boundary import boundary
from pipeload_export.check.accuracy import accuracy_cases, keep_accuracy, measure_accuracy, with_no_past
from pipeload_export.check.shard_errors import Units, compare_shards
from pipeload_export.check.verify import check_files
from pipeload_export.convert.how import How, RoundedWeights, how_to_round
from pipeload_export.extra import require_modules
from pipeload_export.source.identity import identity_of
from pipeload_export.staging import Staging
from pipeload_export.write.journal import Journal

__all__ = ["convert", "write_rounded"]

_PART = 0.95
"""Of the limit of `--mixed`, where a directory that should have kept it does not."""


def convert(
    directory: str | Path,
    target: str | Path,
    *,
    weights: RoundedWeights,
    block_size: int = 32,
    asymmetric: bool = False,
    keep: str | Sequence[str] = (),
    mixed: str | float | None = None,
    max_error: float | None = None,
    force: bool = False,
    verify: bool = True,
    progress: Notify | None = None,
) -> Manifest:
    """Write a copy of a sharded model directory with rounded weights; it appears when it is complete and verified.

    Shards are rounded one after another, a matrix at a time. Files that both directories have in common, as those of
    the tokenizer, are stored once where the file system allows it: each directory can be removed without the other.

    Args:
        directory: the sharded model directory, with the weights of its source.
        target: the folder to make. It must not exist, unless `force`.
        weights: "bf16", "fp16", "int8" or "int4", as for `export`.
        block_size: weights of a block, which have one scale: 16, 32, 64, 128 or 256.
        asymmetric: give each block of a product's weights a zero of its own.
        keep: shards that stay wider, as "fp32:block.000,epilogue", or with "int4" also "int8:block.003"; one text or
            several. "head" names all slices of a head. Tables belong to the shards that take rows of them.
        mixed: keep the shards wider whose rounding does the most, until no output is further from the source's than
            this part of its range: a number, or a text such as "0.5%".
        max_error: fail where rounding weights changes an output by more than this part of its range.
        force: replace an existing sharded model directory, once the new one is complete.
        verify: check all files, and measure what rounding does, shard by shard and at the outputs.
        progress: called with the name of the step, its bytes done, and its bytes in total (0 where that is not known).

    Returns:
        The manifest that was written, with the errors that were found.

    Raises:
        ConfigError: an argument cannot be used, or the directory's weights were rounded before.
        ManifestError: there is no valid manifest.
        ExportError: the directory could not be rounded or verified, or an error is above its limit.

    Example:
        >>> manifest = convert("models/exported/minilm", "models/exported/minilm-int8", weights="int8")
        >>> manifest.small_weights.bits
        8
    """
    if weights not in get_args(RoundedWeights):
        known = ", ".join(get_args(RoundedWeights))
        raise ConfigError(f"The weights cannot be {weights!r}; take one of {known}.")
    how = how_to_round(
        weights,
        block_size=block_size,
        asymmetric=asymmetric,
        keep=keep,
        mixed=mixed,
        max_error=max_error,
        verify=verify,
    )
    assert how is not None
    source = Path(directory)
    with boundary("The conversion failed, and was undone", Path(target), progress) as notify:
        require_modules("onnx")
        from pipeload_export.convert.rounding import check_floats, check_names  # needs the extra [export]

        check_names(check_floats(source), how.kept)
        staging = Staging(Path(target), MANIFEST_NAME, force=force)
        staging.check()
        if source.resolve().is_relative_to(Path(target).expanduser().resolve()):
            raise ConfigError(
                f"The target {target} is the directory {source}, or a folder around it. Name another one."
            )
        facts = {"manifest": (source / MANIFEST_NAME).read_bytes(), "how": repr(how)}
        staging.resume(identity_of(facts))
        with staging, Journal(staging.root) as journal:
            manifest = write_rounded(
                *(source, staging.result, staging.work, how, notify), journal=journal, verify=verify
            )
            journal.close()
            staging.commit()
    return manifest


def write_rounded(
    source: Path,
    result: Path,
    work: Path,
    how: How,
    progress: Notify,
    *,
    journal: Journal | None = None,
    verify: bool = True,
) -> Manifest:
    """Write a rounded copy of a finished directory.

    Args:
        source: the directory, whose weights are the source's.
        result: an existing empty folder, which becomes the copy.
        work: an existing folder for temporary files.
        how: how weights are rounded.
        progress: called with the name of a step, the part done, and the whole.
        journal: of finished weights files; those of killed conversions are taken from it.
        verify: check the files, and measure what rounding does.

    Raises:
        PipeloadError: as `convert` does.
    """
    from pipeload_export.convert.mixed import Mixed  # needs the extra [export]
    from pipeload_export.convert.rounding import check_floats, round_directory

    floats = check_floats(source)
    mixed = None if how.mixed is None else Mixed(source, floats, work, how, progress)
    limit = how.mixed or 0.0
    while True:
        kept = mixed.choose(limit) if mixed else how.kept
        manifest = round_directory(source, result, how.small, kept=kept, progress=progress, journal=journal)
        if not verify:
            return manifest
        accuracy = _measured(source, floats, result, manifest, progress)
        worst = max((one.max_rel_error for one in accuracy.outputs), default=0.0)
        if how.mixed is None or worst <= how.mixed:
            break
        # The engine, which has the last word, adds up in another order; that decides how activations are rounded.
        limit *= _PART * how.mixed / worst
        _empty(result)
    return keep_accuracy(result, manifest, accuracy, how.max_error)


def _measured(source: Path, floats: Manifest, result: Path, manifest: Manifest, progress: Notify) -> Accuracy:
    """What rounding does, of a directory whose files are in order."""
    check_files(result, progress)
    cases = accuracy_cases(result, manifest)
    given = with_no_past(manifest, cases, unsplit=False)
    wanted, shards = compare_shards(Units(source, floats), Units(result, manifest), given, progress)
    return replace(measure_accuracy(result, manifest, cases, wanted, progress), shards=shards)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
