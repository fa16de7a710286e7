"""SOURCE -> a complete, verified sharded model directory, or nothing: the whole export in order."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from pipeload.errors import ConfigError, EmbeddingWarning, ExportError, PipeloadError
from pipeload.format.manifest import MANIFEST_NAME, Manifest, SmallWeights, write
from pipeload.machine.sizes import format_bytes
from pipeload.notify import Notify
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.embed.embed import check_embed
from pipeload.tasks.runner import FilesOnly
from pipeload_export.boundary import boundary
from pipeload_export.build import build
from pipeload_export.check.accuracy import (
    accuracy_cases,
    compared_outputs,
    keep_accuracy,
    measure_accuracy,
    with_no_past,
)
from pipeload_export.check.compare import Unsplit as UnsplitModel
from pipeload_export.check.parity import check_parity
from pipeload_export.check.running import check_running
from pipeload_export.check.vectors import MODULES, makes_vectors, obstacle
from pipeload_export.check.verify import runner
from pipeload_export.convert.convert import write_rounded
from pipeload_export.convert.draft import DraftWeights, add_draft, how_to_draft, no_draft
from pipeload_export.convert.how import BlockSize, How, how_to_round
from pipeload_export.extra import require_modules
from pipeload_export.source.beside import resolve_beside
from pipeload_export.source.identity import facts_of, identity_of
from pipeload_export.source.refused import Declined
from pipeload_export.source.sources import Checkpoint, Unsplit, find_source
from pipeload_export.staging import Staging
from pipeload_export.write.journal import Journal

__all__ = ["BlockSize", "DraftWeights", "KvCache", "Weights", "export"]

KvCache = Literal["model", "int8"]
"""Element type of KV caches: as the model has them, or 8 bits and a scale for each token and head."""

Weights = Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"]
"""How float32 weights are stored: in 16 bits where that loses nothing, and a GGUF file's in its own blocks; as they
are; rounded to 16 bits; or those of products and tables rounded to 8 or 4 bits with a scale for each block of them."""

_CHECKPOINT_DISK_FACTOR, _ONNX_DISK_FACTOR, _SPARE_DISK_BYTES = 2.2, 1.05, 32 << 20
"""Disk per byte of weights. A checkpoint becomes an ONNX graph, which optimum writes twice, then shards."""
_VALUED_DISK_BYTES = 2 * (64 << 20)
"""While a shard is fused, its smaller constants lie on the disk twice: at most this many bytes."""
_FLOAT_BITS = 32
_KEPT_ONNX = "model.onnx"
_REMEDY = (
    "Nothing was written. Use another model, or an .onnx file of your own; --no-verify exports it with these answers."
)
_NO_ERROR = (
    "An error is only measured where weights are rounded (--weights bf16, fp16, int8 or int4), or those of a "
    "GGUF file, and the result is verified: leave --max-error out."
)
_DECODES = "text-generation"
_LOGGER = logging.getLogger("pipeload_export")


def export(
    source: str | Path,
    target: str | Path,
    *,
    task: str | None = None,
    revision: str | None = None,
    opset: int | None = None,
    whole: bool = False,
    weights: Weights = "auto",
    kv_cache: KvCache = "model",
    block_size: int = 32,
    asymmetric: bool = False,
    keep: str | Sequence[str] = (),
    mixed: str | float | None = None,
    draft: DraftWeights | None = None,
    max_error: float | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    allow_missing: bool = False,
    keep_onnx: str | Path | None = None,
    verify: bool = True,
    progress: Notify | None = None,
) -> Manifest:
    """Write a sharded model directory, which is complete and verified when it appears at `target`.

    Everything is made in a folder beside the target, which is renamed at the end. When the export fails, or its
    process is killed at any moment, the target is as it was before. The same export of a source that has not changed
    goes on where a killed one stopped: weights files that were finished are not written again. With `allow_missing` or
    `trust_remote_code` it begins anew.

    Args:
        source: hub id, checkpoint folder, `.gguf` file, `.onnx` file, or `catalog:NAME`.
        target: the folder to make. It must not exist, unless `force`.
        task: the model's task, e.g. "text-classification"; None: as the model's config says.
        revision: branch, tag or commit of a model on the hub.
        opset: version of the ONNX operators; None for the library's choice.
        whole: put a model without repeating blocks into one shard, instead of refusing it.
        weights: how float32 weights are stored. "auto" takes 16 bits for every tensor whose values all fit bfloat16 or
            float16 exactly, as those of most checkpoints do: the answers are the same bit for bit, from half the bytes.
            Products and tables of a GGUF file keep the file's own blocks, and answers are those of its values. "fp32"
            leaves all as they are. "bf16" and "fp16" round to 16 bits what does not fit. "int8" and "int4" round the
            weights of products and tables, to 8 or 4 bits with a scale for each block. Tables, products that are tied
            to one, and products that make at most half as many values as they sum over, have 8 bits in either. With
            "int8" the products of a model without KV caches have a scale for each output, and multiply integers.
        kv_cache: "int8" makes a decoder's KV caches about a quarter as large, at the price of their rounding; "model"
            leaves them as they are.
        block_size: weights of a block, which have one scale: 16, 32, 64, 128 or 256.
        asymmetric: give each block of a product's weights a zero of its own.
        keep: shards that stay wider than others, as "fp32:block.000,epilogue", or with "int4" also "int8:block.003";
            one text or several. "head" names all slices of a head. Tables belong to the shards that take rows of them.
        mixed: keep the shards wider whose rounding does the most, until no output is further from the source's than
            this part of its range: a number, or a text such as "0.5%".
        draft: "int4" puts a copy with weights of 4 bits beside a decoder, in the folder `draft`: it guesses tokens,
            which the model checks, so that texts come faster from a model that does not fit into memory.
        max_error: fail where rounding weights changes an output by more than this part of its range.
        force: replace an existing sharded model directory, once the new one is complete.
        trust_remote_code: run the Python code of the checkpoint, or of the tokenizer beside an `.onnx` file. Read it
            first.
        allow_missing: where weights of a checkpoint do not fit the model, leave those out that it has no place for, and
            put random numbers where some are missing. The manifest names them.
        keep_onnx: a folder in which the unsplit ONNX model is kept, for comparison.
        verify: check all files, compare the shards with the unsplit model, and let the engine run the finished
            directory, beside the own model of a checkpoint, and beside sentence-transformers where that is installed.
        progress: called with the name of the step, its bytes done, and its bytes in total (0 where that is not known).

    Returns:
        The manifest that was written, with the differences that were found.

    An `EmbeddingWarning` says why `embed` refuses a model of sentence-transformers whose modules pipeload lacks, or why
    its vectors were not compared with those of sentence-transformers.

    Raises:
        ConfigError: an argument cannot be used.
        ExportError: the model could not be fetched, exported, split or verified, or the disk is too small.

    Example:
        >>> manifest = export("catalog:minilm", "models/exported/minilm")
        >>> len([shard for shard in manifest.shards if shard.role == "block"])
        6
    """
    for what, given, known in (
        ("KV caches", kv_cache, get_args(KvCache)),
        ("weights", weights, get_args(Weights)),
    ):
        if given not in known:
            raise ConfigError(f"The {what} cannot be {given!r}; take one of {', '.join(map(str, known))}.")
    if draft is not None and draft not in get_args(DraftWeights):
        raise ConfigError(f"The draft cannot be {draft!r}; take {', '.join(get_args(DraftWeights))}, or none.")
    if draft is not None and weights == draft:
        raise ConfigError(f"A draft of {draft} is no smaller than a model with weights of {weights}. Leave one out.")
    how = how_to_round(
        weights,
        block_size=block_size,
        asymmetric=asymmetric,
        keep=keep,
        mixed=mixed,
        max_error=max_error,
        verify=verify,
    )
    with boundary("The export failed, and was undone", Path(target), progress) as notify:
        require_modules("onnx")
        staging = Staging(Path(target), MANIFEST_NAME, force=force)
        keeping = None if keep_onnx is None else Staging(Path(keep_onnx), _KEPT_ONNX, force=force)
        staging.check()
        if keeping:
            keeping.check()
            if staging.overlaps(keeping):
                raise ConfigError(f"The target {target} and the folder for the ONNX model {keep_onnx} overlap.")
        found = find_source(
            str(source),
            task=task,
            revision=revision,
            opset=opset,
            trust_remote_code=trust_remote_code,
            allow_missing=allow_missing,
            progress=notify,
        )
        gguf = found.request.gguf_path if isinstance(found, Checkpoint) and weights == "auto" else None
        if max_error is not None and weights == "auto" and not gguf:
            raise ConfigError(_NO_ERROR)
        if not (allow_missing or trust_remote_code):  # random numbers, or code, may make other weights each time
            options = (whole, weights, kv_cache, repr(how), draft, keep_onnx is None)
            staging.resume(identity_of({**facts_of(found), "options": options}))
        with ExitStack() as stack:
            stack.enter_context(staging)
            if not isinstance(found, Checkpoint):
                _check_space(staging, found.nbytes * (_ONNX_DISK_FACTOR + _share(how, draft)), found.nbytes)
            journal = stack.enter_context(Journal(staging.root))
            unsplit = (
                _traced(found, staging, weights, _share(how, draft), notify, keep=keeping is not None)
                if isinstance(found, Checkpoint)
                else resolve_beside(found, staging.work, notify, trust_remote_code=trust_remote_code)
            )
            floats, source_graph = runner(unsplit.path, unsplit.weights), unsplit
            if draft and unsplit.task != _DECODES:
                raise no_draft(unsplit.task)
            if gguf:
                unsplit = _with_blocks(unsplit, gguf, staging.work / "blocks", notify)
            built = partial(
                build,
                journal=journal,
                whole=whole,
                int8_caches=kv_cache == "int8",
                exact_16_bits=weights != "fp32",
                progress=notify,
            )
            split_into = staging.floats if how else staging.result
            split_into.mkdir(exist_ok=True)
            manifest = built(unsplit, split_into, verify=verify)
            if how:
                manifest = write_rounded(
                    *(split_into, staging.result, staging.work, how, notify), journal=journal, verify=verify
                )
            elif verify and manifest.small_weights:
                manifest = _measured(staging.result, manifest, floats, max_error, notify)
            if verify and isinstance(found, Checkpoint):
                parity = check_parity(staging.result, manifest, found.request, staging.work, notify, _REMEDY)
                manifest = replace(manifest, parity=parity)
                write(manifest, staging.result)
            elif verify:
                check_running(staging.result, manifest, notify)
            if draft:
                if not manifest.caches:
                    raise no_draft(f"{manifest.task} without KV caches")
                if gguf:
                    # The model has the file's blocks, and not the floats that they stand for.
                    split_into = staging.floats
                    split_into.mkdir()
                    built(source_graph, split_into, verify=False)
                manifest = add_draft(manifest, staging, split_into, draft, notify, journal=journal, verify=verify)
            journal.close()
            if keeping:
                stack.enter_context(keeping)
                _keep(unsplit, keeping.result, move=isinstance(found, Checkpoint))
                keeping.commit()
            staging.commit()
    _warn_of_embed(Path(target), manifest, found)
    return manifest


def _measured(
    result: Path, manifest: Manifest, source: UnsplitModel, max_error: float | None, progress: Notify
) -> Manifest:
    """The manifest with what the blocks of a GGUF file do to the answers; it is written."""
    cases = accuracy_cases(result, manifest)
    wanted = source(compared_outputs(manifest), with_no_past(manifest, cases, unsplit=True), progress)
    return keep_accuracy(result, manifest, measure_accuracy(result, manifest, cases, wanted, progress), max_error)


def _share(how: How | None, draft: DraftWeights | None) -> float:
    """The disk that rounded copies of the shards take, in parts of the weights in float32."""
    share = 0.0 if draft is None else how_to_draft(draft, verify=False).small.fine_bits / _FLOAT_BITS
    if how is None:
        return share
    copies = 1 if how.mixed is None else 1 + len(how.levels)
    return share + copies * how.small.fine_bits / _FLOAT_BITS


def _traced(
    found: Checkpoint, staging: Staging, weights: Weights, share: float, progress: Notify, *, keep: bool
) -> Unsplit:
    """The ONNX graph of a checkpoint, without its weights where that is possible, and where the graph is not kept.

    `share` is the disk of rounded copies, in parts of the weights in float32.
    """
    request = found.request
    nbytes, obstacle = request.weight_bytes, None
    rounded = nbytes * share
    if request.may_be_hollow and not keep:
        _check_space(staging, (nbytes if weights == "fp32" else request.stored_bytes) + rounded, nbytes)
        try:
            return found.to_onnx(staging.work, progress, hollow=True)
        except Declined as declined:
            obstacle = str(declined)
            _LOGGER.info("%s is exported with its weights in memory: %s.", request.name, obstacle)
            shutil.rmtree(staging.work / "onnx")
    _check_space(staging, nbytes * _CHECKPOINT_DISK_FACTOR + request.widened_bytes + rounded, nbytes)
    return found.to_onnx(staging.work, progress, obstacle=obstacle)


def _with_blocks(unsplit: Unsplit, gguf: Path, folder: Path, progress: Notify) -> Unsplit:
    """The unsplit model with the blocks of the GGUF file that it was made of, as far as the graph can take them."""
    from pipeload_export.rewrite.gguf_blocks import LAYOUTS  # needs the extra [export]
    from pipeload_export.rewrite.gguf_weights import write_with_blocks

    folder.mkdir()
    kept = write_with_blocks(unsplit.path, unsplit.weights, gguf, folder, progress)
    if kept.path is None:
        return unsplit
    layouts = [LAYOUTS[kind] for kind in kept.weights]
    small = SmallWeights(
        bits=min(layout.bits for layout in layouts),
        fine_bits=max(layout.bits for layout in layouts),
        block_size=min(layout.block_size for layout in layouts),
        symmetric=True,
        gguf=kept.weights,
        floats=kept.floats,
    )
    return replace(unsplit, path=kept.path, files=tuple(sorted(folder.iterdir())), weights=None, small_weights=small)


def _warn_of_embed(directory: Path, manifest: Manifest, found: Checkpoint | Unsplit) -> None:
    """Warn if the model was made for embeddings, and `embed` refuses it (`run` needs nothing of its modules), or makes
    vectors that could not be compared.
    """
    files = ModelFiles(directory, manifest, verify=False)
    if manifest.task != "feature-extraction" or MODULES not in files.records:
        return
    try:
        check_embed(FilesOnly(directory, manifest, files))
    except PipeloadError as error:
        warnings.warn(f"The model was exported, and embed refuses it: {error}", EmbeddingWarning, stacklevel=3)
        return
    if not isinstance(found, Checkpoint) or not manifest.parity or manifest.parity.vectors:
        return
    if makes_vectors(directory, manifest):
        warnings.warn(
            "The model was exported, and the vectors of embed were not compared with those of sentence-transformers: "
            f"{obstacle(directory, manifest, found.request)}",
            EmbeddingWarning,
            stacklevel=3,
        )


def _keep(unsplit: Unsplit, folder: Path, *, move: bool) -> None:
    """Copy or move the unsplit model: `model.onnx`, and its external data under the names that are in it."""
    for file in unsplit.files:
        name = _KEPT_ONNX if file == unsplit.path else file.relative_to(unsplit.path.parent)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if move:
            shutil.move(file, folder / name)
        else:
            shutil.copyfile(file, folder / name)
    for name, file in unsplit.side_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)


def _check_space(staging: Staging, needed: float, nbytes: int) -> None:
    """Raise ExportError if a disk has no room.

    Args:
        staging: a folder on it, whose files of a killed export need no more room.
        needed: bytes that graph and shards take.
        nbytes: bytes of the weights in float32.
    """
    needed = int(needed) + min(2 * nbytes, _VALUED_DISK_BYTES) + _SPARE_DISK_BYTES
    free = shutil.disk_usage(staging.disk).free + staging.kept_bytes
    if needed > free:
        raise ExportError(
            f"The export takes about {format_bytes(needed)} of disk, and {format_bytes(free)} are free at "
            f"{staging.disk}. Make room, or name a target on another disk."
        )
