"""Is a manifest consistent? The checks find every fault that would later make the engine misbehave or work for minutes.

A manifest comes from a stranger: the checks bound its numbers and names before they compute anything from them, and
each takes time in proportion to the manifest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from pipeload.format.dims import MOST_PARTS, parts, symbols
from pipeload.format.dtypes import ITEM_BYTES, NARROW
from pipeload.format.records import PAGE_BYTES, Accuracy, FileRecord, Lookup, Manifest, Shard, TensorSpec, WeightSpec

__all__ = ["faults"]

_MOST_SHARDS = 4096
_MOST_RANK = 16
_MOST_SYMBOLS = 256
_MOST_DIM_CHARACTERS = 1000
"""Of a dimension that is a sum."""
_MOST_TERMS = 10_000
"""Of the formulas of one structure."""
_MOST_NUMBER = 2**63 - 1
_MOST_BLOCK = 1 << 20
"""Weights that have one scale."""
_MOST_PATH_CHARACTERS = 4096
_CACHE_RANK = 4
"""Of a cache that is written in place."""


def faults(m: Manifest) -> Iterator[str]:
    """Every inconsistency of the manifest, each as a part of a sentence."""
    if not m.shards:
        yield "it lists no shards"
    if len(m.shards) > _MOST_SHARDS:
        yield f"it lists {len(m.shards)} shards, and a model has at most {_MOST_SHARDS}"
        return
    yield from _repeated("shard", (s.name for s in m.shards))
    yield from _repeated("input", (t.name for t in m.inputs))
    yield from _repeated("output", (t.name for t in m.outputs))
    yield from _repeated("edge", (t.name for t in m.edges))
    yield from _repeated("file", (f.path for f in m.files))
    yield from _repeated("dimension", m.dims)
    yield from _dimension_faults(m)
    yield from _structure_faults(m)
    known_files = {record.path: record for record in m.files}
    for record in m.files:
        yield from _file_faults(record)
    available = {spec.name for spec in m.inputs}
    described = available | {spec.name for spec in (*m.outputs, *m.edges)}
    yield from _repeated("tensor", (*available, *(name for shard in m.shards for name in shard.outputs)))
    for shard in m.shards:
        yield from _shard_faults(shard, m, known_files, available)
        yield from (
            f"shard '{shard.name}' makes '{name}', which is no edge and no output of the model"
            for name in _made(shard)
            if name not in described
        )
        available.update(shard.outputs)
    yield from _head_faults(m)
    outputs = {spec.name for spec in m.outputs} - {m.head.output if m.head else None}
    for name in sorted(outputs - {name for shard in m.shards for name in shard.outputs}):
        yield f"output '{name}' is made by no shard"
    yield from _cache_faults(m)
    small = m.small_weights
    if small and not all(0 < n <= _MOST_BLOCK for n in (small.bits, small.fine_bits, small.block_size)):
        yield f"it has weights of {small.bits} and {small.fine_bits} bits in blocks of {small.block_size}"
    if small and small.accuracy and not all(map(math.isfinite, _numbers(small.accuracy))):
        yield "the accuracy of its weights is no number"
    yield from _draft_faults(m, known_files)
    vectors = (m.parity.vectors.difference,) if m.parity and m.parity.vectors else ()
    for found in (*m.verification, *(m.parity.outputs if m.parity else ()), *vectors):
        if not all(0 <= n < math.inf for n in (found.max_abs_error, found.max_rel_error, found.limit)):
            yield f"the verification of output '{found.output}' has an error or limit that is no number"


def _draft_faults(m: Manifest, known_files: Mapping[str, FileRecord]) -> Iterator[str]:
    if m.draft is None:
        return
    if f"{m.draft.path}/pipeload.json" not in known_files:
        yield f"the manifest of the draft in '{m.draft.path}' is not in the list of files"
    if not m.caches:
        yield "it has a draft, and no caches"
    if not _is_size(m.draft.nbytes) or not 0 <= (m.draft.top1 or 0.0) <= 1:
        yield f"the draft has {m.draft.nbytes} bytes, and {m.draft.top1} of its first choices are right"


def _numbers(accuracy: Accuracy) -> Iterator[float]:
    for one in accuracy.outputs:
        yield from (one.max_abs_error, one.mean_abs_error, one.max_rel_error)
    known = (accuracy.cosine, accuracy.top1, accuracy.perplexity, accuracy.source_perplexity)
    yield from (number for number in known if number is not None)


def _dimension_faults(m: Manifest) -> Iterator[str]:
    if len(m.dims) > _MOST_SYMBOLS:
        yield f"it has {len(m.dims)} symbolic dimensions, and a model has at most {_MOST_SYMBOLS}"
    for symbol in m.dims:
        if not _is_dim(symbol) or symbols(symbol) != [symbol]:
            yield f"dimension '{symbol}' has no valid name"
    known = set(m.dims)
    for spec in (*m.inputs, *m.outputs, *m.edges):
        if spec.dtype not in ITEM_BYTES:
            yield f"tensor '{spec.name}' has the unknown dtype '{spec.dtype}'"
        if len(spec.shape) > _MOST_RANK:
            yield f"tensor '{spec.name}' has {len(spec.shape)} dimensions, and a tensor has at most {_MOST_RANK}"
        elif not all(map(_is_dim, spec.shape)):
            yield f"tensor '{spec.name}' has no valid shape {list(spec.shape)}"
        elif unknown := {symbol for dim in spec.shape for symbol in symbols(dim)} - known:
            yield f"tensor '{spec.name}' has the unknown dimensions {sorted(unknown)}"


def _structure_faults(m: Manifest) -> Iterator[str]:
    known = set(m.dims)
    for name, structure in m.structures.items():
        terms = [term for formula in structure.activations for term in formula]
        if max(len(terms), len(structure.activations)) > _MOST_TERMS:
            yield f"structure '{name}' has {len(terms)} terms, and a structure has at most {_MOST_TERMS}"
            continue
        if any(len(term.dims) > _MOST_RANK for term in terms):
            yield f"structure '{name}' has a term of more than {_MOST_RANK} dimensions"
        elif unknown := {dim for term in terms for dim in term.dims} - known:
            yield f"structure '{name}' uses the unknown dimensions {sorted(unknown)}"
        if any(term.steps and len(term.steps) != len(term.dims) for term in terms):
            yield f"structure '{name}' has a term with another number of steps than of dimensions"
        if any(not 1 <= step <= _MOST_NUMBER for term in terms for step in term.steps):
            yield f"structure '{name}' has a step that is not between 1 and {_MOST_NUMBER}"
        if any(term.nbytes < 0 for term in terms):
            yield f"structure '{name}' has a negative number of bytes"
        elif not all(_is_size(term.nbytes) for term in terms):
            yield f"structure '{name}' has a number of bytes above {_MOST_NUMBER}"


def _file_faults(record: FileRecord) -> Iterator[str]:
    pure = PurePosixPath(record.path)
    if not record.path or pure.is_absolute() or {"..", "\\", "\0"} & {*pure.parts, *record.path}:
        yield f"file '{record.path}' is not inside the model directory"
    elif len(record.path) > _MOST_PATH_CHARACTERS:
        yield f"the path of file '{record.path}' has {len(record.path)} characters"
    elif str(pure) != record.path:
        yield f"file '{record.path}' is another way to write '{pure}'"
    if not _is_sha256(record.sha256) or not _is_size(record.nbytes):
        yield f"file '{record.path}' has no valid size and sha256"


def _shard_faults(
    shard: Shard, m: Manifest, known_files: Mapping[str, FileRecord], available: set[str]
) -> Iterator[str]:
    fetched = {lookup.output for lookup in shard.lookups}
    for name in (*shard.inputs, *(lookup.indices for lookup in shard.lookups)):
        if name not in available and name not in fetched:
            yield f"shard '{shard.name}' takes '{name}', which nothing before it makes"
    yield from _repeated(f"of shard '{shard.name}', input", shard.inputs)
    named = [name for tensor in shard.tensors for name in (tensor.name, tensor.widened) if name is not None]
    yield from _repeated(f"of shard '{shard.name}', tensor", named)
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
        yield from _tensor_faults(shard, begin, end)
    for lookup in shard.lookups:
        record = known_files.get(lookup.path)
        table = lookup.table
        if not _is_weight(table) or not table.shape:
            yield f"table '{table.name}' of shard '{shard.name}' has no valid dtype and shape"
        elif record is None or not 0 <= table.offset <= table.offset + table.nbytes <= record.nbytes:
            yield f"table '{table.name}' of shard '{shard.name}' lies outside '{lookup.path}'"
        elif lookup.parts:
            yield from _part_faults(lookup, shard, record)


def _part_faults(lookup: Lookup, shard: Shard, record: FileRecord) -> Iterator[str]:
    table, rows = lookup.table, 0
    for part in lookup.parts:
        what = f"part '{part.name}' of table '{table.name}' of shard '{shard.name}'"
        if not _is_weight(part) or not part.shape or part.dtype != table.dtype:
            yield f"{what} has no valid dtype and shape"
            return
        if math.prod(part.shape[1:]) != math.prod(table.shape[1:]):
            yield f"{what} has rows of another size"
        if not part.offset + part.nbytes <= record.nbytes:
            yield f"{what} lies outside '{lookup.path}'"
        rows += part.shape[0]
    if rows != table.shape[0]:
        yield f"the parts of table '{table.name}' of shard '{shard.name}' have {rows} rows of {table.shape[0]}"


def _tensor_faults(shard: Shard, begin: int, end: int) -> Iterator[str]:
    inside: list[WeightSpec] = []
    for tensor in shard.tensors:
        if not _is_weight(tensor):
            yield f"tensor '{tensor.name}' of shard '{shard.name}' has no valid dtype and shape"
        elif not begin <= tensor.offset <= tensor.offset + tensor.nbytes <= end:
            yield f"tensor '{tensor.name}' of shard '{shard.name}' lies outside the shard's weights"
        elif tensor.offset % ITEM_BYTES[tensor.dtype]:
            yield f"tensor '{tensor.name}' of shard '{shard.name}' is not aligned to its element size"
        else:
            inside.append(tensor)
    inside.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    for one, other in pairwise(inside):
        if one.offset + one.nbytes > other.offset:
            yield f"tensors '{one.name}' and '{other.name}' of shard '{shard.name}' overlap"


def _head_faults(m: Manifest) -> Iterator[str]:
    slices = tuple(shard.name for shard in m.shards if shard.role == "head")
    if m.head is None:
        if slices:
            yield f"shard '{slices[0]}' is a slice of a head, and the model has none"
        return
    shards, outputs = {shard.name: shard for shard in m.shards}, {spec.name: spec for spec in m.outputs}
    for name in m.head.shards:
        if name not in shards or shards[name].inputs != (m.head.input,) or len(shards[name].outputs) != 1:
            yield f"head slice '{name}' is not a shard with the single input '{m.head.input}' and one output"
    if not m.head.shards or m.head.output not in outputs:
        yield f"the head makes '{m.head.output}', which is no output of the model"
    elif slices != m.head.shards:
        yield f"the head consists of {list(m.head.shards)}, and the slices among the shards are {list(slices)}"
    else:
        whole, edges = outputs[m.head.output].shape, {spec.name: spec for spec in m.edges}
        made = [edges[name].shape for slice_ in slices for name in shards[slice_].outputs if name in edges]
        widths = [shape[-1] for shape in made if shape and isinstance(shape[-1], int)]
        if len(widths) == len(slices) and whole and sum(widths) != whole[-1]:
            yield f"the slices of the head make {sum(widths)} values of '{m.head.output}', which has {whole[-1]}"
        # No dimensions: the exporter does not know the tensor's shape, and so none of its dimensions.
        is_known = bool(whole) or any(made)
        if is_known and (len(widths) != len(slices) or not whole or any(shape[:-1] != whole[:-1] for shape in made)):
            yield f"the slices of the head do not have the shape of '{m.head.output}' but for its last dimension"


def _cache_faults(m: Manifest) -> Iterator[str]:
    yield from _repeated("cache input", (cache.input for cache in m.caches))
    yield from _repeated("cache output", (cache.output for cache in m.caches))
    inputs, made = {spec.name: spec for spec in m.inputs}, {spec.name: spec for spec in m.outputs}
    in_place = {cache.input for cache in m.caches if cache.in_place}
    for cache in m.caches:
        before, after = inputs.get(cache.input), made.get(cache.output)
        if before is None:
            yield f"cache input '{cache.input}' is no input of the model"
        if after is None:
            yield f"cache output '{cache.output}' is no output of the model"
        if before and after and _kind(before) != _kind(after):
            yield f"cache input '{cache.input}' and output '{cache.output}' differ in dtype or rank"
        elif before and cache.in_place and len(before.shape) != _CACHE_RANK:
            yield f"cache '{cache.input}' is written in place and has {len(before.shape)} dimensions, not {_CACHE_RANK}"
        if cache.scale is not None and not {cache.input, cache.scale} <= in_place:
            yield f"cache '{cache.input}' has the scales '{cache.scale}', and not both are caches in place"


def _kind(spec: TensorSpec) -> tuple[str, int]:
    return spec.dtype, len(spec.shape)


def _made(shard: Shard) -> tuple[str, ...]:
    return (*dict.fromkeys(lookup.output for lookup in shard.lookups), *shard.outputs)


def _repeated(what: str, names: Iterable[Hashable]) -> Iterator[str]:
    seen: set[Hashable] = set()
    for name in names:
        if name in seen:
            yield f"{what} '{name}' occurs twice"
        seen.add(name)


def _is_size(number: int) -> bool:
    return 0 <= number <= _MOST_NUMBER


def _is_dim(dim: Any) -> bool:
    """Whether a dimension is a size, or a sum of symbols and sizes, of bounded length."""
    if isinstance(dim, int):
        return _is_size(dim)
    if len(dim) > _MOST_DIM_CHARACTERS:
        return False
    found = parts(dim)
    return len(found) <= MOST_PARTS and all(
        part and (not part.isdecimal() or (len(part) < _MOST_DIM_CHARACTERS and _is_size(int(part)))) for part in found
    )


def _is_weight(spec: WeightSpec) -> bool:
    return (
        spec.dtype in ITEM_BYTES
        and _is_size(spec.offset)
        and len(spec.shape) <= _MOST_RANK
        and all(map(_is_size, spec.shape))
        # NumPy refuses a shape whose other dimensions are too large even where one of them is 0.
        and (0 not in spec.shape or math.prod(size or 1 for size in spec.shape) <= _MOST_NUMBER)
        and (spec.widened is None or spec.dtype in NARROW)
    )


def _is_sha256(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None
