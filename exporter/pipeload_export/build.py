"""An unsplit graph -> a sharded model directory: shards, side files, manifest, and what verification finds."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pipeload
from pipeload.format.manifest import FileRecord, Manifest, write
from pipeload.notify import Notify
from pipeload_export.check.verify import verify_made
from pipeload_export.shard.published import Published, read_published
from pipeload_export.source.folder import read_json
from pipeload_export.source.sources import Unsplit
from pipeload_export.write.journal import Journal

__all__ = ["build", "record_of"]

_WRITING = "write the shards"


def build(
    unsplit: Unsplit,
    result: Path,
    journal: Journal,
    *,
    whole: bool,
    int8_caches: bool,
    exact_16_bits: bool,
    verify: bool,
    progress: Notify,
) -> Manifest:
    """Write a sharded model directory of an unsplit graph.

    Args:
        unsplit: the graph, with its side files.
        result: an existing empty folder.
        journal: of finished weights files.
        whole: as for `split`.
        int8_caches: as for `split`.
        exact_16_bits: as for `split`.
        verify: check all files, and compare the shards with the unsplit graph.
        progress: called with the name of the step, its bytes done, and its bytes in total.

    Returns:
        The manifest that was written.

    Raises:
        ExportError: the graph cannot be split, or the shards compute something else.
    """
    from pipeload_export.check.padding import takes_left_padding
    from pipeload_export.split import split  # needs the extra [export], which importing this module does not

    shards = result / "shards"
    shards.mkdir()
    # One step, not one for each of perhaps a hundred shards.
    model = split(
        unsplit.path,
        shards,
        whole=whole,
        int8_caches=int8_caches,
        exact_16_bits=exact_16_bits,
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
        files=(*(record_of(result, name) for name in sorted({*unsplit.side_files, *unsplit.side_json})), *model.files),
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


def record_of(result: Path, name: str) -> FileRecord:
    """The record of a file that no shard loads."""
    data = (result / name).read_bytes()
    return FileRecord(path=name, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _published(unsplit: Unsplit) -> Published:
    config, processor = (unsplit.side_files.get(name) for name in ("config.json", "preprocessor_config.json"))
    made = dict(unsplit.side_json.get("preprocessor_config.json", {}))
    return read_published(read_json(config) if config else {}, read_json(processor) if processor else made)
