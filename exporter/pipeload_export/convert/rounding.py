"""A finished directory -> a copy of it with rounded weights, written shard by shard.

Memory holds the graphs, and of the weights about one matrix. Each shard's rounded graph is optimised and sampled as it
was when the directory was made, so that its bounds are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from onnx import GraphProto, NodeProto

import pipeload
from pipeload.errors import ConfigError, ExportError
from pipeload.format.dtypes import ONNX_DTYPES
from pipeload.format.manifest import Manifest, SmallWeights, TensorSpec, read, write
from pipeload.notify import Notify
from pipeload_export.check.shard_errors import HEAD
from pipeload_export.convert.joined import Part, join
from pipeload_export.convert.sharing import link_or_copy, share_equal_files
from pipeload_export.cut.head import HeadCut, cut_head
from pipeload_export.cut.placement import Piece
from pipeload_export.cut.tables import Lift, lift_again
from pipeload_export.graph.graph import Constant, Graph, node_inputs, same_values, storage_dtype
from pipeload_export.graph.types import type_of
from pipeload_export.rewrite.matrices import LEAST_BYTES, Matrix
from pipeload_export.rewrite.parts import Parts
from pipeload_export.rewrite.rounding import Rounding
from pipeload_export.rewrite.sixteen import LEAST_BYTES as LEAST_16_BIT_BYTES
from pipeload_export.rewrite.sixteen import round_to_16_bits
from pipeload_export.rewrite.small_weights import is_fine, round_weights
from pipeload_export.rewrite.unfused import take_products_apart
from pipeload_export.shard.published import read_published
from pipeload_export.shard.sampler import Sampler
from pipeload_export.source.folder import read_json
from pipeload_export.split import input_spec, last_uses, written
from pipeload_export.write.journal import Journal
from pipeload_export.write.names import rename
from pipeload_export.write.narrow import stored_type
from pipeload_export.write.shards import ShardWriter

__all__ = ["check_floats", "check_names", "round_directory"]

_BYTE_BITS = 8
_FLOATS = "fp32"
_SHARDS = "shards"
_NUMBERS = {name: number for number, name in ONNX_DTYPES.items()}
_STEP = "round the shards"


def round_directory(
    source: Path,
    target: Path,
    small: SmallWeights,
    *,
    kept: Mapping[str, str] | None = None,
    progress: Notify,
    journal: Journal | None = None,
) -> Manifest:
    """Write a copy of a sharded model directory with rounded weights, complete with its manifest, and not yet verified.

    Files that are equal in both directories are stored once where the file system allows that.

    Args:
        source: the directory, whose weights are the source's floats.
        target: an existing empty folder.
        small: how weights are rounded.
        kept: shards that stay wider: name, or "head" for all slices of a head -> "fp32", which is not rounded, or
            "int8". A table belongs to the shards that take rows of it.
        progress: called with the name of the step, the bytes of weights that were written, and all of them.
        journal: of finished weights files; see `split`.

    Returns:
        The manifest that was written.

    Raises:
        ConfigError: the directory has rounded weights already, or a name in `kept` is unknown.
        ExportError: nothing can be rounded, or a graph cannot be used.
    """
    manifest, kept = check_floats(source), kept or {}
    check_names(manifest, kept)
    (target / _SHARDS).mkdir()
    with TemporaryDirectory(prefix=".parts-", dir=target) as folder:
        made = _Rounding(source, manifest, small, kept, Parts(Path(folder))).write(target / _SHARDS, progress, journal)
    beside = [record for record in manifest.files if Path(record.path).parts[0] != _SHARDS]
    for record in beside:
        link_or_copy(source / record.path, target / record.path)
    made = replace(made, files=(*beside, *made.files))
    share_equal_files(source, manifest, target, made)
    write(made, target)
    return made


def check_floats(directory: Path) -> Manifest:
    """The manifest of a directory whose weights are the source's.

    Raises:
        ManifestError: there is no valid one.
        ConfigError: its weights were rounded before.
    """
    manifest = read(directory)
    if small := manifest.small_weights:
        how = f"of a GGUF file ({', '.join(small.gguf)})" if small.gguf else f"rounded to {small.bits} bits"
        raise ConfigError(
            f"The weights in {directory} are {how}, and are not rounded once more. Name a directory with the source's "
            "weights: `pipeload export SOURCE TARGET --weights fp32` makes one."
        )
    return manifest


def check_names(manifest: Manifest, kept: Iterable[str]) -> None:
    """Raise one ConfigError that names all unknown shards and those that exist."""
    known = list(dict.fromkeys(HEAD if shard.role == "head" else shard.name for shard in manifest.shards))
    if unknown := [f"'{name}'" for name in kept if name not in known]:
        raise ConfigError(f"The model has no shard {', '.join(unknown)}. Its shards are: {', '.join(known)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Whole:
    """The model's graph after rounding, and where its shards are in it."""

    graph: Graph
    pieces: list[Piece]
    lifts: list[Lift]
    head: HeadCut | None


class _Rounding:
    """One directory on its way to another."""

    def __init__(
        self, source: Path, manifest: Manifest, small: SmallWeights, kept: Mapping[str, str], parts: Parts
    ) -> None:
        self._source = source
        self._manifest = manifest
        self._small = small
        self._kept = kept
        self._parts = parts
        self._coarse = Rounding(bits=small.bits, block_size=small.block_size, symmetric=small.symmetric)
        self._fine = Rounding(bits=small.fine_bits, block_size=small.block_size)
        # With KV caches a pass has few rows, for which packed blocks are better.
        takes_past = bool(manifest.caches) or any("past" in spec.name for spec in manifest.inputs)
        self._integers = small.bits == _BYTE_BITS and small.symmetric and not takes_past
        self._joined = join(source, manifest)
        self._changed: set[str] = set()

    def write(self, folder: Path, progress: Notify, journal: Journal | None) -> Manifest:
        """Write the shards; the manifest lists no other files."""
        manifest, (rounded, integers) = self._manifest, self._round()
        if not rounded:
            raise self._nothing()
        whole = self._whole()
        graph = whole.graph
        published = read_published(
            read_json(self._source / "config.json"), read_json(self._source / "preprocessor_config.json")
        )
        specs = tuple(input_spec(value, graph, published) for value in graph.inputs)
        sampler = Sampler(graph, specs, last_uses(whole.pieces, whole.lifts, whole.head), folder, published)
        writer = ShardWriter(
            *(graph, folder, sampler, lambda _, done, total: progress(_STEP, done, total)),
            stored_type=self._stored,
            journal=journal,
        )
        writer.write_tables({lift.table: graph.constants[lift.table] for lift in whole.lifts}, whole.head)
        for piece in whole.pieces:
            writer.write_piece(piece, whole.lifts, whole.head, optimise=piece.name in self._changed)
        if whole.head:
            writer.write_head(whole.head)
        writer.finish()
        known = {spec.name for spec in (*manifest.inputs, *manifest.outputs)}
        made = written(writer, sampler, whole.head, known)
        return replace(
            manifest,
            exporter=f"pipeload {pipeload.__version__}",
            edges=made.edges,
            head=made.head,
            shards=made.shards,
            structures=made.structures,
            files=made.files,
            parity=None,
            small_weights=replace(self._small, integers=bool(integers), kept=dict(self._kept)),
        )

    def _stored(self, constant: Constant) -> int:
        known = self._joined.stored(constant)
        return stored_type(constant) if known is None else known

    def _round(self) -> tuple[int, int]:
        """Round all graphs; how many weights were rounded, and how many of them are multiplied as integers."""
        rounded, integers = 0, 0
        outputs = {spec.name for spec in self._manifest.outputs}
        for part in self._joined.parts:
            level = self._kept.get(part.shard.name)
            if level == _FLOATS:
                continue
            if self._small.dtype:
                found, whole = round_to_16_bits(part.graph, self._small.dtype), 0
            else:
                before = list(part.graph.nodes)
                take_products_apart(part.graph)
                how = self._fine if level else self._coarse
                choose = _chooser(how, self._fine)
                found, whole = round_weights(part.graph, choose, self._parts, integers=self._integers, outputs=outputs)
                if not found:
                    part.graph.nodes = before
            if found:
                self._changed.add(part.shard.name)
            rounded, integers = rounded + found, integers + whole
        return rounded + self._round_outside(), integers

    def _round_outside(self) -> int:
        """Round tables and head. One that a kept shard uses stays, for all that use it."""
        graph, floats = self._joined.outside, set[str]()
        for part in self._joined.parts:
            if self._kept.get(part.shard.name) == _FLOATS:
                floats.update(lookup.table.name for lookup in part.shard.lookups)
        if self._kept.get(HEAD) == _FLOATS:
            floats.update(graph.nodes[-1].input)
        if self._small.dtype:
            kept = {name: graph.constants[name] for name in floats & graph.constants.keys()}
            found = round_to_16_bits(graph, self._small.dtype)
            graph.constants |= kept
            return found
        choose = _chooser(self._fine if HEAD in self._kept else self._coarse, self._fine, floats)
        return round_weights(graph, choose, self._parts)[0]

    def _whole(self) -> _Whole:
        manifest, joined, outside = self._manifest, self._joined, self._joined.outside
        outside.types = _types(manifest)
        lifts = lift_again(outside)
        head = None
        if manifest.head:
            blocks = [part.graph for part in joined.parts if part.shard.role == "block"]
            head = cut_head(
                outside,
                block_bytes=max(sum(one.nbytes for one in graph.constants.values()) for graph in blocks),
                tables=[lift.table for lift in lifts],
                item_bytes=lambda table: storage_dtype(self._stored(table)).itemsize,
                again=True,
            )
        rows = _of_each_lookup(outside.nodes, [lk.output for part in joined.parts for lk in part.shard.lookups])
        graph = Graph(
            nodes=[],
            constants=dict(outside.constants),
            inputs=joined.inputs,
            outputs=joined.outputs,
            opsets={d: v for one in (outside, *(part.graph for part in joined.parts)) for d, v in one.opsets.items()},
            forget=self._forget,
        )
        pieces = []
        for part in joined.parts:
            nodes = list(_with_rows(_merged(graph, part), rows))
            first = len(graph.nodes)
            graph.nodes += nodes
            pieces.append(_piece(part, range(first, len(graph.nodes)), nodes, graph.constants))
        graph.types = {name: (constant.dtype, constant.shape) for name, constant in graph.constants.items()}
        graph.types |= outside.types | {value.name: type_of(value) for value in (*graph.inputs, *graph.outputs)}
        return _Whole(graph=graph, pieces=pieces, lifts=lifts, head=head)

    def _forget(self) -> None:
        self._joined.forget()
        self._parts.forget()

    def _nothing(self) -> ExportError | ConfigError:
        if self._kept:
            return ConfigError("All shards with weights are kept as they are, so that nothing is left to be rounded.")
        if self._small.dtype:
            return ExportError(
                "The graph has no weights of float32 that could be rounded, of at least "
                f"{LEAST_16_BIT_BYTES >> 10} kB. Export it with --weights auto, which leaves weights as they are."
            )
        return ExportError(
            "The graph has no weights of float32 that could be rounded: products with a constant matrix, or tables, of "
            f"at least {LEAST_BYTES >> 10} kB. Export it with --weights fp32, which leaves weights as they are."
        )


def _types(manifest: Manifest) -> dict[str, tuple[int, tuple[int | str | None, ...] | None]]:
    """Types and shapes of all tensors between shards; no shape means that the rank is not known."""
    specs: tuple[TensorSpec, ...] = (*manifest.inputs, *manifest.edges)
    return {spec.name: (_NUMBERS[spec.dtype], spec.shape or None) for spec in specs}


def _chooser(coarse: Rounding, fine: Rounding, floats: Collection[str] = ()) -> Callable[[Matrix], Rounding | None]:
    """How a matrix is rounded, where those of some names stay floats."""
    return lambda matrix: None if matrix.name in floats else fine if is_fine(matrix) else coarse


def _of_each_lookup(nodes: Sequence[NodeProto], outputs: Collection[str]) -> dict[str, list[NodeProto]]:
    """For each lookup the nodes that make its rows out of those of a rounded table."""
    result: dict[str, list[NodeProto]] = {}
    run: list[NodeProto] = []
    for node in nodes:
        run.append(node)
        if node.output[0] in outputs:
            result[node.output[0]], run = run, []
    return result


def _with_rows(nodes: Iterable[NodeProto], rows: dict[str, list[NodeProto]]) -> Iterator[NodeProto]:
    """A shard's nodes, and before the first that takes rows of a rounded table those that make them; `rows` shrinks."""
    for node in nodes:
        for name in node_inputs(node):
            yield from rows.pop(name, ())
        yield node


def _merged(graph: Graph, part: Part) -> list[NodeProto]:
    """A shard's nodes, whose constants are among the whole graph's. Optimisers repeat names in shards."""
    names: dict[str, str] = {}
    for name, constant in part.graph.constants.items():
        known = graph.constants.get(name)
        if known is not None and known is not constant and not _are_equal(known, constant):
            names[name] = f"{part.shard.name}/{name}"
        graph.constants[names.get(name, name)] = constant
    if not names:
        return part.graph.nodes
    renamed = GraphProto()
    renamed.node.extend(part.graph.nodes)
    rename(renamed, names)
    return list(renamed.node)


def _are_equal(one: Constant, other: Constant) -> bool:
    return one.nbytes < LEAST_BYTES and same_values(one, other)


def _piece(part: Part, indices: Iterable[int], nodes: Sequence[NodeProto], constants: Collection[str]) -> Piece:
    """The shard as it was; rows of rounded tables come in the place of floats."""
    made = {name for node in nodes for name in node.output}
    taken = (name for node in nodes for name in node_inputs(node))
    inputs = dict.fromkeys(name for name in part.shard.inputs if name not in made)
    inputs |= dict.fromkeys(name for name in taken if name not in made and name not in constants)
    return Piece(
        name=part.shard.name,
        role=part.shard.role,
        nodes=tuple(indices),
        inputs=tuple(inputs),
        outputs=part.shard.outputs,
    )
