"""The contract between exporter and engine: `pipeload.json`, format 1.

The exporter builds a `Manifest` and calls `write`; the engine calls `read` and trusts nothing that
`validate` has not seen. Every path is relative to the model directory and stays inside it.

A model is a list of shards in running order. Tensors that travel between shards are *edges*; an edge has one
name in the whole model, which is also the name of the input or output in the shard's own graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec
import numpy as np

from pipeload.errors import ConfigError, ManifestError

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "PAGE_BYTES",
    "ByteTerm",
    "Cache",
    "FileRecord",
    "Head",
    "Lookup",
    "Manifest",
    "Shard",
    "Structure",
    "TensorSpec",
    "Verification",
    "WeightSpec",
    "WeightsRange",
    "bind_dims",
    "dtype_bytes",
    "evaluate_dim",
    "match_dims",
    "read",
    "symbols",
    "write",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "pipeload.json"
PAGE_BYTES = 4096
"""Alignment of the data part of a weights file, and of every range that is read to load a shard."""

_DTYPES = frozenset(
    "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64".split()  # noqa: SIM905
)
_ITEM_BYTES = {"bfloat16": 2} | {name: np.dtype(name).itemsize for name in _DTYPES - {"bfloat16"}}

Role = Literal["prologue", "block", "epilogue", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A graph input, a graph output or an edge.

    Attributes:
        name: its name in the unsplit graph, in the shards' graphs and in `model.run`.
        dtype: NumPy's name of the element type.
        shape: an int where the dimension is fixed, a string where it is not: a symbol (`"batch_size"`) or a
            sum of symbols and ints (`"past_sequence_length + sequence_length"`). For an edge whose rank is
            not known, empty.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """One tensor in a weights file; `offset` counts bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor occupies."""
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file of the model directory: where it is, how large, and what it contains."""

    path: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRange:
    """The one contiguous range of a weights file that is read to load a shard.

    Attributes:
        path: the weights file; several head slices share one.
        offset: first byte; a multiple of `PAGE_BYTES`, so that direct I/O can read it.
        nbytes: length; the end need not be aligned.
        sha256: of just these bytes, so that a loader can check what it read.
    """

    path: str
    offset: int
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """Rows of a table that the engine reads from the weights file, instead of loading the table.

    Equals `Gather(table, indices, axis=0)`: the edge `output` has the shape of `indices` followed by
    `table.shape[1:]`. Negative indices count from the end, as in ONNX.
    """

    path: str
    table: WeightSpec
    indices: str
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One piece of the model that is loaded, run and freed as a whole.

    Attributes:
        name: `prologue`, `block.000`, `epilogue`, `head.000` ...
        role: what it is in the model.
        graph: the `.onnx` file.
        weights: what is read to load it; None for a graph without large initializers.
        tensors: the initializers that lie in that range.
        inputs: edges and graph inputs that it takes, in the order of its graph.
        outputs: edges and graph outputs that it makes.
        lookups: rows that the engine fetches before it runs the shard.
        structure: id of its structure; shards of one structure have the same graph up to names and weights.
    """

    name: str
    role: Role
    graph: FileRecord
    weights: WeightsRange | None
    tensors: tuple[WeightSpec, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    lookups: tuple[Lookup, ...] = ()
    structure: str

    @property
    def nbytes(self) -> int:
        """Bytes of weights that loading the shard brings into memory."""
        return self.weights.nbytes if self.weights else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteTerm:
    """`nbytes` times the product of the named dimensions (a name may occur twice; none means a constant)."""

    nbytes: int
    dims: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What shards of one structure have in common.

    Attributes:
        activations: upper bound of the intermediate tensors that are alive together while the shard runs,
            outputs included and inputs not: the maximum over the formulas of the sum of the formula's terms.
    """

    activations: tuple[tuple[ByteTerm, ...], ...]

    def activation_bytes(self, dims: Mapping[str, int]) -> int:
        """The bound in bytes for the given sizes of the model's symbolic dimensions."""
        return max(
            (sum(t.nbytes * prod(dims[d] for d in t.dims) for t in formula) for formula in self.activations),
            default=0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A pair of a graph input and the graph output that takes its place at the next step (KV cache)."""

    input: str
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A language-model head that was cut along the vocabulary.

    `output` is the concatenation along the last axis of the first outputs of `shards`, in that order. Every
    one of them takes the edge `input`, and treats each position on its own, so that a caller who needs only
    the last position may pass only that.
    """

    input: str
    output: str
    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What the exporter found when it compared the chain of shards with the unsplit graph."""

    output: str
    max_abs_error: float
    max_rel_error: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that the engine knows about a model before it opens a shard. See the module's docstring."""

    format: int = FORMAT_VERSION
    exporter: str
    source: str
    model_type: str
    task: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    edges: tuple[TensorSpec, ...]
    caches: tuple[Cache, ...] = ()
    head: Head | None = None
    shards: tuple[Shard, ...]
    structures: dict[str, Structure]
    files: tuple[FileRecord, ...]
    verification: tuple[Verification, ...] = ()
    dims: tuple[str, ...] = field(default=())

    @property
    def weight_bytes(self) -> int:
        """Bytes that one pass needs when nothing is resident (tables that are read by row not included)."""
        return sum(shard.nbytes for shard in self.shards)

    def validate(self) -> None:
        """Raise one `ManifestError` that lists every fault of the manifest, or return."""
        faults = list(_faults(self))
        if faults:
            raise ManifestError(
                f"{MANIFEST_NAME} has {len(faults)} fault{'s' * (len(faults) > 1)}: "
                + "; ".join(faults)
                + ". Export the model again."
            )


def read(directory: Path) -> Manifest:
    """The validated manifest of a sharded model directory.

    Raises:
        ManifestError: there is none, it is no JSON of this format, its version is unknown, or it is inconsistent.
    """
    path = directory / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ManifestError(
            f"{path} does not exist, so {directory} is not a sharded model directory. "
            "Make one with `pipeload export SOURCE TARGET`."
        ) from error
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        version = msgspec.json.decode(data, type=_Version).format
        if version != FORMAT_VERSION:
            raise ManifestError(
                f"{path} has format {version}; this pipeload reads format {FORMAT_VERSION}. "
                "Upgrade pipeload, or export the model again with this one."
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"{path} is damaged: {error}. Export the model again.") from error
    manifest.validate()
    return manifest


def write(manifest: Manifest, directory: Path) -> Path:
    """Validate the manifest and write it into the directory as indented JSON. Returns the file's path."""
    manifest.validate()
    path = directory / MANIFEST_NAME
    path.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    return path


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element."""
    return _ITEM_BYTES[dtype]


def evaluate_dim(dim: int | str, dims: Mapping[str, int]) -> int:
    """The size of a dimension, given the sizes of the symbols. Raises KeyError for an unbound symbol."""
    if isinstance(dim, int):
        return dim
    return sum(int(part) if part.isdecimal() else dims[part] for part in _parts(dim))


def bind_dims(specs: Iterable[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of all symbolic dimensions, from the shapes of the arrays that were passed.

    A symbol that occurs only inside a sum is solved from it; contradictions are an error.

    Raises:
        ConfigError: a rank or size does not fit; all faults at once.
    """
    dims, faults = match_dims(specs, shapes)
    if faults:
        raise ConfigError("The inputs do not fit the model: " + "; ".join(faults) + ".")
    return dims


def match_dims(
    specs: Iterable[TensorSpec], shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, int] | None = None
) -> tuple[dict[str, int], list[str]]:
    """As `bind_dims`, but gives the faults instead of raising them; `known` are sizes that are given beforehand."""
    specs = [spec for spec in specs if spec.name in shapes]
    faults = [
        f"'{s.name}' has {len(shapes[s.name])} dimensions {shapes[s.name]}, the model takes {len(s.shape)} {s.shape}"
        for s in specs
        if len(s.shape) != len(shapes[s.name])
    ]
    pairs = [
        (spec, dim, size)
        for spec in specs
        if len(spec.shape) == len(shapes[spec.name])
        for dim, size in zip(spec.shape, shapes[spec.name], strict=True)
    ]
    dims: dict[str, int] = dict(known or {})
    for _, dim, size in pairs:
        if isinstance(dim, str) and _parts(dim) == [dim]:
            dims.setdefault(dim, size)
    solved = True
    while solved:
        solved = False
        for _, dim, size in pairs:
            if len(unbound := set(symbols(dim)) - dims.keys()) == 1:
                symbol = unbound.pop()
                rest = size - evaluate_dim(dim, {**dims, symbol: 0})
                # Where no size fits, the comparison below finds the contradiction.
                dims[symbol] = max(0, rest // symbols(dim).count(symbol))
                solved = True
    for spec, dim, size in pairs:
        try:
            wanted = evaluate_dim(dim, dims)
        except KeyError:
            continue
        if wanted != size:
            faults.append(
                f"'{spec.name}' has size {size} where the model takes {dim}"
                + ("" if isinstance(dim, int) else f" = {wanted}")
            )
    return dims, faults


def symbols(dim: int | str) -> list[str]:
    """The symbols in a dimension: none for an int, several for a sum."""
    return [] if isinstance(dim, int) else [part for part in _parts(dim) if not part.isdecimal()]


@dataclass(frozen=True)
class _Version:
    format: int


def _parts(dim: str) -> list[str]:
    return [part.strip() for part in dim.split("+")]


def _faults(m: Manifest) -> Iterator[str]:
    """Every inconsistency that would make the engine misbehave later."""
    if not m.shards:
        yield "it lists no shards"
    yield from _repeated("shard", (s.name for s in m.shards))
    yield from _repeated("input", (t.name for t in m.inputs))
    yield from _repeated("output", (t.name for t in m.outputs))
    yield from _repeated("file", (f.path for f in m.files))
    for spec in (*m.inputs, *m.outputs, *m.edges):
        if spec.dtype not in _DTYPES:
            yield f"tensor '{spec.name}' has the unknown dtype '{spec.dtype}'"
        if any(dim < 0 if isinstance(dim, int) else "" in _parts(dim) for dim in spec.shape):
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
    for cache in m.caches:
        before, after = inputs.get(cache.input), made.get(cache.output)
        if before is None:
            yield f"cache input '{cache.input}' is no input of the model"
        if after is None:
            yield f"cache output '{cache.output}' is no output of the model"
        if before and after and (before.dtype, len(before.shape)) != (after.dtype, len(after.shape)):
            yield f"cache input '{cache.input}' and output '{cache.output}' differ in dtype or rank"


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
            if tensor.dtype not in _DTYPES or any(size < 0 for size in tensor.shape):
                yield f"tensor '{tensor.name}' of shard '{shard.name}' has no valid dtype and shape"
            elif not begin <= tensor.offset <= tensor.offset + tensor.nbytes <= end:
                yield f"tensor '{tensor.name}' of shard '{shard.name}' lies outside the shard's weights"
            elif tensor.offset % _ITEM_BYTES[tensor.dtype]:
                yield f"tensor '{tensor.name}' of shard '{shard.name}' is not aligned to its element size"
    for lookup in shard.lookups:
        record = known_files.get(lookup.path)
        table = lookup.table
        if table.dtype not in _DTYPES or not table.shape or any(size < 0 for size in table.shape):
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
