"""Is a manifest consistent? Everything is checked that would make the engine misbehave later."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from pipeload.format.dims import parts, symbols
from pipeload.format.records import ITEM_BYTES, PAGE_BYTES, FileRecord, Manifest, Shard

__all__ = ["faults"]


def faults(m: Manifest) -> Iterator[str]:
    """Every inconsistency of the manifest, each as a part of a sentence."""
    if not m.shards:
        yield "it lists no shards"
    yield from _repeated("shard", (s.name for s in m.shards))
    yield from _repeated("input", (t.name for t in m.inputs))
    yield from _repeated("output", (t.name for t in m.outputs))
    yield from _repeated("file", (f.path for f in m.files))
    for spec in (*m.inputs, *m.outputs, *m.edges):
        if spec.dtype not in ITEM_BYTES:
            yield f"tensor '{spec.name}' has the unknown dtype '{spec.dtype}'"
        if any(dim < 0 if isinstance(dim, int) else "" in parts(dim) for dim in spec.shape):
            yield f"tensor '{spec.name}' has no valid shape {list(spec.shape)}"
        elif unknown := {symbol for dim in spec.shape for symbol in symbols(dim)} - set(m.dims):
            yield f"tensor '{spec.name}' has the unknown dimensions {sorted(unknown)}"
    for name, structure in m.structures.items():
        terms = [term for formula in structure.activations for term in formula]
        if unknown := {dim for term in terms for dim in term.dims} - set(m.dims):
            yield f"structure '{name}' uses the unknown dimensions {sorted(unknown)}"
        if any(term.nbytes < 0 for term in terms):
            yield f"structure '{name}' has a negative number of bytes"
    known_files = {record.path: record for record in m.files}
    for record in m.files:
        if not _inside(record.path):
            yield f"file '{record.path}' is not inside the model directory"
        if not _is_sha256(record.sha256) or record.nbytes < 0:
            yield f"file '{record.path}' has no valid size and sha256"
    available = {spec.name for spec in m.inputs}
    for shard in m.shards:
        yield from _shard_faults(shard, m, known_files, available)
        available.update(shard.outputs)
    outputs = {spec.name for spec in m.outputs}
    if m.head:
        names = {shard.name: shard for shard in m.shards}
        for name in m.head.shards:
            if name not in names or names[name].inputs != (m.head.input,) or len(names[name].outputs) != 1:
                yield f"head slice '{name}' is not a shard with the single input '{m.head.input}' and one output"
        if not m.head.shards or m.head.output not in outputs:
            yield f"the head makes '{m.head.output}', which is no output of the model"
        outputs.discard(m.head.output)
    for name in sorted(outputs - {name for shard in m.shards for name in shard.outputs}):
        yield f"output '{name}' is made by no shard"
    inputs, made = {spec.name: spec for spec in m.inputs}, {spec.name: spec for spec in m.outputs}
    in_place = {cache.input for cache in m.caches if cache.in_place}
    for cache in m.caches:
        before, after = inputs.get(cache.input), made.get(cache.output)
        if before is None:
            yield f"cache input '{cache.input}' is no input of the model"
        if after is None:
            yield f"cache output '{cache.output}' is no output of the model"
        if before and after and (before.dtype, len(before.shape)) != (after.dtype, len(after.shape)):
            yield f"cache input '{cache.input}' and output '{cache.output}' differ in dtype or rank"
        if cache.scale is not None and not {cache.input, cache.scale} <= in_place:
            yield f"cache '{cache.input}' has the scales '{cache.scale}', and not both are caches in place"


def _shard_faults(
    shard: Shard, m: Manifest, known_files: Mapping[str, FileRecord], available: set[str]
) -> Iterator[str]:
    fetched = {lookup.output for lookup in shard.lookups}
    for name in (*shard.inputs, *(lookup.indices for lookup in shard.lookups)):
        if name not in available and name not in fetched:
            yield f"shard '{shard.name}' takes '{name}', which nothing before it makes"
    if shard.structure not in m.structures:
        yield f"shard '{shard.name}' has the unknown structure '{shard.structure}'"
    if known_files.get(shard.graph.path) != shard.graph:
        yield f"graph '{shard.graph.path}' of shard '{shard.name}' is not in the list of files"
    if shard.tensors and shard.weights is None:
        yield f"shard '{shard.name}' has tensors, but no weights"
    if shard.weights is not None:
        record = known_files.get(shard.weights.path)
        begin, end = shard.weights.offset, shard.weights.offset + shard.weights.nbytes
        if record is None:
            yield f"weights '{shard.weights.path}' of shard '{shard.name}' are not in the list of files"
        elif not 0 <= begin <= end <= record.nbytes:
            yield f"weights of shard '{shard.name}' end at byte {end} of {record.nbytes}"
        if not _is_sha256(shard.weights.sha256):
            yield f"weights of shard '{shard.name}' have no valid sha256"
        if begin % PAGE_BYTES:
            yield f"weights of shard '{shard.name}' begin at byte {begin}, no multiple of {PAGE_BYTES}"
        for tensor in shard.tensors:
            if tensor.dtype not in ITEM_BYTES or any(size < 0 for size in tensor.shape):
                yield f"tensor '{tensor.name}' of shard '{shard.name}' has no valid dtype and shape"
            elif not begin <= tensor.offset <= tensor.offset + tensor.nbytes <= end:
                yield f"tensor '{tensor.name}' of shard '{shard.name}' lies outside the shard's weights"
            elif tensor.offset % ITEM_BYTES[tensor.dtype]:
                yield f"tensor '{tensor.name}' of shard '{shard.name}' is not aligned to its element size"
    for lookup in shard.lookups:
        record = known_files.get(lookup.path)
        table = lookup.table
        if table.dtype not in ITEM_BYTES or not table.shape or any(size < 0 for size in table.shape):
            yield f"table '{table.name}' of shard '{shard.name}' has no valid dtype and shape"
        elif record is None or not 0 <= table.offset <= table.offset + table.nbytes <= record.nbytes:
            yield f"table '{table.name}' of shard '{shard.name}' lies outside '{lookup.path}'"


def _repeated(what: str, names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield f"{what} '{name}' occurs twice"
        seen.add(name)


def _is_sha256(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def _inside(path: str) -> bool:
    pure = PurePosixPath(path)
    return bool(path) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in path and "\0" not in path
