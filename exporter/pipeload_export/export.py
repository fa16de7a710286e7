"""SOURCE -> a complete, verified sharded model directory, or nothing: the whole export in order."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import pipeload
from pipeload.errors import ConfigError, EmbeddingWarning, ExportError, PipeloadError
from pipeload.format.manifest import MANIFEST_NAME, FileRecord, Manifest, SmallWeights, write
from pipeload.machine.sizes import format_bytes
from pipeload.notify import Notify
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.embed.embed import check_embed
from pipeload.tasks.runner import FilesOnly
from pipeload_export.boundary import boundary
from pipeload_export.check.accuracy import check_error, measure_accuracy
from pipeload_export.check.parity import check_parity
from pipeload_export.check.running import check_running
from pipeload_export.check.vectors import MODULES, makes_vectors, obstacle
from pipeload_export.check.verify import runner, verify_made
from pipeload_export.extra import require_modules
from pipeload_export.shard.published import Published, read_published
from pipeload_export.source.beside import resolve_beside
from pipeload_export.source.folder import read_json
from pipeload_export.source.identity import identity_of
from pipeload_export.source.refused import Declined
from pipeload_export.source.sources import Checkpoint, Unsplit, find_source
from pipeload_export.staging import Staging
from pipeload_export.write.journal import Journal

__all__ = ["BlockSize", "KvCache", "Weights", "export"]

KvCache = Literal["model", "int8"]
"""Element type of KV caches: as the model has them, or 8 bits and a scale for each token and head."""

Weights = Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"]
"""How float32 weights are stored: in 16 bits where that loses nothing, and a GGUF file's in its own blocks; as they
are; rounded to 16 bits; or those of products and tables rounded to 8 or 4 bits with a scale for each block of them."""

BlockSize = Literal["16", "32", "64", "128", "256"]
"""Weights of 8 or 4 bits that have one scale."""

_CHECKPOINT_DISK_FACTOR, _ONNX_DISK_FACTOR, _SPARE_DISK_BYTES = 2.2, 1.05, 32 << 20
"""Disk per byte of weights. A checkpoint becomes an ONNX graph, which optimum writes twice, then shards."""
_VALUED_DISK_BYTES = 2 * (64 << 20)
"""While a shard is fused, its smaller constants lie on the disk twice: at most this many bytes."""
_TYPES: dict[Weights, str] = {"bf16": "bfloat16", "fp16": "float16"}
_BITS: dict[Weights, int] = {"int8": 8, "int4": 4}
_FINE_BITS = 8
"""Of tables, the head that is tied to one, and products that narrow: 4 bits hurt there most."""
_KEPT_ONNX = "model.onnx"
_REMEDY = (
    "Nothing was written. Use another model, or an .onnx file of your own; --no-verify exports it with these answers."
)
_NO_ERROR = (
    "A largest error is only measured where weights are rounded (--weights bf16, fp16, int8 or int4), or those of a "
    "GGUF file, and the result is verified."
)
_WRITING = "write the shards"
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
        ("size of blocks", block_size, tuple(map(int, get_args(BlockSize)))),
    ):
        if given not in known:
            raise ConfigError(f"The {what} cannot be {given!r}; take one of {', '.join(map(str, known))}.")
    if max_error is not None and (weights == "fp32" or not verify):
        raise ConfigError(_NO_ERROR)
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
            options = (whole, weights, kv_cache, block_size, asymmetric, keep_onnx is None)
            staging.resume(identity_of(found, options))
        with ExitStack() as stack:
            stack.enter_context(staging)
            if not isinstance(found, Checkpoint):
                _check_space(staging, found.nbytes * _ONNX_DISK_FACTOR, found.nbytes)
            unsplit = (
                _traced(found, staging, weights, notify, keep=keeping is not None)
                if isinstance(found, Checkpoint)
                else resolve_beside(found, staging.work, notify, trust_remote_code=trust_remote_code)
            )
            floats = runner(unsplit.path, unsplit.weights)
            if small := _small(weights, block_size, symmetric=not asymmetric):
                unsplit = _rounded(unsplit, staging.work / "rounded", small, notify)
            elif gguf:
                unsplit = _with_blocks(unsplit, gguf, staging.work / "blocks", notify)
            manifest = _build(
                *(unsplit, staging),
                whole=whole,
                weights=weights,
                kv_cache=kv_cache,
                verify=verify,
                progress=notify,
            )
            if verify and manifest.small_weights:
                accuracy = measure_accuracy(staging.result, manifest, floats, notify)
                if max_error is not None:
                    check_error(accuracy, max_error)
                manifest = replace(manifest, small_weights=replace(manifest.small_weights, accuracy=accuracy))
                write(manifest, staging.result)
            if verify and isinstance(found, Checkpoint):
                parity = check_parity(staging.result, manifest, found.request, staging.work, notify, _REMEDY)
                manifest = replace(manifest, parity=parity)
                write(manifest, staging.result)
            elif verify:
                check_running(staging.result, manifest, notify)
            if keeping:
                stack.enter_context(keeping)
                _keep(unsplit, keeping.result, move=isinstance(found, Checkpoint))
                keeping.commit()
            staging.commit()
    _warn_of_embed(Path(target), manifest, found)
    return manifest


def _small(weights: Weights, block_size: int, *, symmetric: bool) -> SmallWeights | None:
    """How weights are to be rounded; None where they are not."""
    if weights in _TYPES:
        return SmallWeights(dtype=_TYPES[weights], bits=16, fine_bits=16, block_size=1, symmetric=True)
    if weights in _BITS:
        return SmallWeights(bits=_BITS[weights], fine_bits=_FINE_BITS, block_size=block_size, symmetric=symmetric)
    return None


def _rounded(unsplit: Unsplit, folder: Path, small: SmallWeights, progress: Notify) -> Unsplit:
    """The unsplit model with rounded weights."""
    from pipeload_export.rewrite.rounding import Rounding  # needs the extra [export]
    from pipeload_export.rewrite.sixteen import write_with_16_bits
    from pipeload_export.rewrite.small_weights import write_with_small_weights

    folder.mkdir()
    if small.dtype:
        path = write_with_16_bits(unsplit.path, unsplit.weights, folder, small.dtype)
    else:
        coarse = Rounding(bits=small.bits, block_size=small.block_size, symmetric=small.symmetric)
        fine = Rounding(bits=small.fine_bits, block_size=small.block_size)
        made = write_with_small_weights(unsplit.path, unsplit.weights, folder, coarse, fine, progress)
        path, small = made.path, replace(small, integers=made.integers)
    return replace(unsplit, path=path, files=tuple(sorted(folder.iterdir())), weights=None, small_weights=small)


def _traced(found: Checkpoint, staging: Staging, weights: Weights, progress: Notify, *, keep: bool) -> Unsplit:
    """The ONNX graph of a checkpoint, without its weights where that is possible, and where the graph is not kept."""
    request = found.request
    nbytes, obstacle = request.weight_bytes, None
    if request.may_be_hollow and not keep:
        _check_space(staging, request.stored_bytes if weights == "auto" else nbytes, nbytes)
        try:
            return found.to_onnx(staging.work, progress, hollow=True)
        except Declined as declined:
            obstacle = str(declined)
            _LOGGER.info("%s is exported with its weights in memory: %s.", request.name, obstacle)
            shutil.rmtree(staging.work / "onnx")
    _check_space(staging, nbytes * _CHECKPOINT_DISK_FACTOR + request.widened_bytes, nbytes)
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


def _build(
    unsplit: Unsplit,
    staging: Staging,
    *,
    whole: bool,
    weights: Weights,
    kv_cache: KvCache,
    verify: bool,
    progress: Notify,
) -> Manifest:
    from pipeload_export.check.padding import takes_left_padding
    from pipeload_export.split import split  # needs the extra [export], which importing this module does not

    result = staging.result
    shards = result / "shards"
    shards.mkdir()
    with Journal(staging.journal, staging.before) as journal:
        # One step, not one for each of perhaps a hundred shards.
        model = split(
            unsplit.path,
            shards,
            whole=whole,
            int8_caches=kv_cache == "int8",
            exact_16_bits=weights != "fp32",
            published=_published(unsplit),
            stored=unsplit.weights,
            journal=journal,
            progress=lambda _, done, total: progress(_WRITING, done, total),
        )
    written = sum(record.nbytes for record in model.files)
    progress(_WRITING, written, written)
    for name, file in unsplit.side_files.items():
        (result / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, result / name)
    for name, value in unsplit.side_json.items():
        (result / name).write_text(json.dumps(value, indent=2) + "\n")
    manifest = Manifest(
        exporter=f"pipeload {pipeload.__version__}",
        source=unsplit.source,
        model_type=unsplit.model_type,
        task=unsplit.task,
        inputs=model.inputs,
        outputs=model.outputs,
        edges=model.edges,
        caches=model.caches,
        head=model.head,
        shards=model.shards,
        structures=model.structures,
        files=(*(_record(result, name) for name in sorted({*unsplit.side_files, *unsplit.side_json})), *model.files),
        dims=model.dims,
        missing_weights=unsplit.missing_weights,
        unused_weights=unsplit.unused_weights,
        quantised_dynamically=model.quantised_dynamically,
        rope_change=unsplit.rope_change,
        small_weights=unsplit.small_weights,
    )
    write(manifest, result)
    manifest = replace(manifest, takes_left_padding=takes_left_padding(result, manifest, progress))
    write(manifest, result)
    if verify:
        report = verify_made(result, unsplit.path, unsplit.weights, progress)
        manifest = replace(manifest, verification=report.differences)
        write(manifest, result)
    return manifest


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


def _published(unsplit: Unsplit) -> Published:
    config, processor = (unsplit.side_files.get(name) for name in ("config.json", "preprocessor_config.json"))
    made = dict(unsplit.side_json.get("preprocessor_config.json", {}))
    return read_published(read_json(config) if config else {}, read_json(processor) if processor else made)


def _record(result: Path, name: str) -> FileRecord:
    data = (result / name).read_bytes()
    return FileRecord(path=name, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())


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
