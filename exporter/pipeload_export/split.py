"""An ONNX graph -> ordered shards with named edges, each a graph file and a weights file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx import ValueInfoProto

from pipeload.errors import ExportError
from pipeload.format.manifest import Cache, FileRecord, Head, Shard, Structure, TensorSpec, symbols
from pipeload.notify import Notify, silent
from pipeload_export.cut.blocks import find_cuts
from pipeload_export.cut.caches import find_caches
from pipeload_export.cut.head import HeadCut, cut_head
from pipeload_export.cut.placement import Piece, place
from pipeload_export.cut.tables import Lift, lift_tables
from pipeload_export.graph.graph import Graph, dtype_name, operators, storage_dtype
from pipeload_export.graph.load import load
from pipeload_export.graph.normalise import drop_dead, normalise
from pipeload_export.graph.runtime import open_session
from pipeload_export.rewrite.in_place import write_in_place
from pipeload_export.rewrite.int8 import quantise_caches
from pipeload_export.rewrite.settings import fix_settings
from pipeload_export.shard.alignment import related_inputs, related_structure
from pipeload_export.shard.published import Published
from pipeload_export.shard.sampler import Sampler
from pipeload_export.source.places import Weights
from pipeload_export.write.journal import Journal
from pipeload_export.write.narrow import given_type, stored_type
from pipeload_export.write.shards import ShardWriter

__all__ = ["SplitModel", "Written", "input_spec", "last_uses", "split", "written"]

_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The parts of a `pipeload.format.manifest.Manifest` that follow from the shards that were written."""

    edges: tuple[TensorSpec, ...]
    head: Head | None
    shards: tuple[Shard, ...]
    structures: dict[str, Structure]
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitModel:
    """The parts of a `pipeload.format.manifest.Manifest` that follow from a model's graph."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    edges: tuple[TensorSpec, ...]
    caches: tuple[Cache, ...]
    head: Head | None
    shards: tuple[Shard, ...]
    structures: dict[str, Structure]
    dims: tuple[str, ...]
    files: tuple[FileRecord, ...]
    quantised_dynamically: bool


def split(
    model_path: Path,
    shards_dir: Path,
    *,
    whole: bool = False,
    int8_caches: bool = False,
    exact_16_bits: bool = True,
    published: Published | None = None,
    stored: Weights | None = None,
    journal: Journal | None = None,
    progress: Notify | None = None,
) -> SplitModel:
    """Cut a transformer's ONNX graph into shards, and write them.

    Where the model keeps its weights in an external file, memory holds about one block at a time; the values of
    initializers inside the model's file are held as well.

    Args:
        model_path: the `.onnx` file.
        shards_dir: an existing folder for the shards; paths in the result are relative to its parent. Temporary
            files lie there too: on the disk whose free space was checked, and in a folder that goes if the split fails.
        whole: put a model without repeating blocks into one shard, instead of refusing it.
        int8_caches: make the KV caches int8.
        exact_16_bits: store float32 weights in 16 bits where all values of a tensor stay the same.
        published: sizes of inputs that the files beside the graph name.
        stored: the weights of the graph that lie in a checkpoint.
        journal: of the weights files that are finished; those of killed exports are taken from it.
        progress: called with the file being written, the bytes written so far, and the bytes in total.

    Raises:
        ExportError: the file is no graph that can be cut; the message says why.

    Example:
        >>> model = split(Path("model.onnx"), Path("target/shards"))
        >>> [shard.name for shard in model.shards]
        ['prologue', 'block.000', 'block.001', 'epilogue']
    """
    graph = load(model_path, stored)
    try:
        return _split(
            *(graph, shards_dir),
            whole=whole,
            int8_caches=int8_caches,
            exact_16_bits=exact_16_bits,
            published=published,
            journal=journal,
            progress=progress or silent,
        )
    except Exception:
        # A graph that onnxruntime refuses as a whole fails anywhere; onnxruntime's words are the reason then.
        open_session(model_path, str(model_path))
        raise


def _split(
    graph: Graph,
    shards_dir: Path,
    *,
    whole: bool,
    int8_caches: bool,
    exact_16_bits: bool,
    published: Published | None,
    journal: Journal | None,
    progress: Notify,
) -> SplitModel:
    fix_settings(graph)
    normalise(graph)
    inputs = tuple(input_spec(value, graph, published) for value in graph.inputs)
    quantised_dynamically = any(kind.startswith("DynamicQuantize") for kind in operators(graph.nodes))
    in_place = write_in_place(graph)
    scales = quantise_caches(graph, in_place) if int8_caches else {}
    inputs = tuple(_with_scales(inputs, {name: given for name, (given, _) in scales.items()}))
    in_place |= dict(scales.values())
    cuts = find_cuts(graph, whole=whole)
    activation = {name for segment in cuts.segments for name in segment}
    lifts = lift_tables(graph, block_bytes=cuts.block_bytes, activation=activation)
    stored = stored_type if exact_16_bits else given_type
    head = None
    if cuts.count:
        head = cut_head(
            graph,
            block_bytes=cuts.block_bytes,
            tables=[lift.table for lift in lifts],
            item_bytes=lambda table: storage_dtype(stored(table)).itemsize,
        )
    tables = dict.fromkeys(lift.table for lift in lifts)
    ends = [head.input, *head.parts, *([head.bias] if head.bias else [])] if head else []
    drop_dead(graph, [*ends, *tables, *(lift.indices for lift in lifts)])
    if random := sorted(_RANDOM.intersection(operators(graph.nodes))):
        raise ExportError(
            f"The model draws random numbers while it runs ({', '.join(random)}): it has no answer that could be "
            "compared, nor given twice. Export a model without them."
        )
    pieces = place(graph, cuts, lifts, kept=[head.input] if head else [])
    taken = tuple(input_spec(value, graph, published) for value in graph.inputs)
    sampler = Sampler(graph, taken, last_uses(pieces, lifts, head), shards_dir, published)
    writer = ShardWriter(graph, shards_dir, sampler, progress, stored_type=stored, journal=journal)
    writer.write_tables({name: graph.constants[name] for name in tables}, head)
    for piece in pieces:
        writer.write_piece(piece, lifts, head)
    if head:
        writer.write_head(head)
    writer.finish()
    inputs = related_inputs(inputs, sampler.sums, sampler.fixed)

    dims = tuple(dict.fromkeys(symbol for spec in inputs for dim in spec.shape for symbol in symbols(dim)))
    known = {*graph.output_names, *(spec.name for spec in inputs)}
    outputs = tuple(_output_spec(value, writer, dims, head) for value in graph.outputs)
    caches = tuple(
        replace(
            cache,
            in_place=in_place.get(cache.input) == cache.output,
            scale=scales[cache.input][0] if cache.input in scales else None,
        )
        for cache in find_caches(graph, pieces, inputs, outputs)
    )
    made = written(writer, sampler, head, known)
    return SplitModel(
        inputs=inputs,
        outputs=outputs,
        edges=made.edges,
        caches=caches,
        head=made.head,
        shards=made.shards,
        structures=made.structures,
        dims=dims,
        files=made.files,
        quantised_dynamically=quantised_dynamically,
    )


def written(writer: ShardWriter, sampler: Sampler, head: HeadCut | None, known: Collection[str]) -> Written:
    """The parts of a manifest that a writer has made.

    Args:
        writer: has written all shards.
        sampler: ran them.
        head: the head that was cut.
        known: names of the model's inputs and outputs, which are no edges.
    """
    edges = dict.fromkeys(name for shard in writer.shards for name in (*shard.inputs, *shard.outputs))
    slices = tuple(shard.name for shard in writer.shards if shard.role == "head")
    return Written(
        edges=tuple(writer.edge(name) for name in edges if name not in known),
        head=Head(input=head.input, output=head.output, shards=slices) if head else None,
        shards=tuple(writer.shards),
        structures={
            name: related_structure(one, sampler.sums, sampler.fixed) for name, one in writer.structures.known.items()
        },
        files=tuple(writer.files),
    )


def last_uses(pieces: Sequence[Piece], lifts: Sequence[Lift], head: HeadCut | None) -> dict[str, int]:
    """Tensor -> number of the last shard that takes it, or looks up rows by it."""
    result: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        result.update(dict.fromkeys(piece.inputs, number))
        result.update((lift.indices, number) for lift in lifts if lift.output in piece.inputs)
    if head:
        result[head.input] = len(pieces) + len(head.rows) - 1
    return result


def input_spec(value: ValueInfoProto, graph: Graph, published: Published | None) -> TensorSpec:
    """Type and shape of a graph's input, with the sizes that the model's files name.

    Raises:
        ExportError: the graph does not say its rank, or no input of a shard can have its type.
    """
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise ExportError(
            f"The graph does not say how many dimensions its input '{value.name}' has. Export it with shapes."
        )
    dtype = dtype_name(tensor.elem_type or graph.types.get(value.name, (0, None))[0])
    shape = _declared(value)
    # Of each token a row of features: their number is no size that a caller chooses.
    if published and len(shape) == 3 and isinstance(width := shape[-1], str):
        shape = (*shape[:-1], published.named.get(width, width))
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)


def _with_scales(specs: Sequence[TensorSpec], scales: Mapping[str, str]) -> Iterator[TensorSpec]:
    """The inputs that a caller passes: caches as int8, and each one's scales behind it."""
    for spec in specs:
        if spec.name in scales:
            yield replace(spec, dtype="int8")
            yield TensorSpec(name=scales[spec.name], dtype="float32", shape=(*spec.shape[:-1], 1))
        else:
            yield spec


def _declared(value: ValueInfoProto) -> tuple[int | str, ...]:
    """The shape that the graph declares; a dimension without a name gets one."""
    dims = value.type.tensor_type.shape.dim
    sizes = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]
    return tuple(f"{value.name}.{axis}" if size == "" else size for axis, size in enumerate(sizes))


def _output_spec(value: ValueInfoProto, writer: ShardWriter, dims: Sequence[str], head: HeadCut | None) -> TensorSpec:
    """As the graph declares it, if only dimensions of the inputs are in its shape; else as the sampler saw it."""
    declared = _declared(value)
    is_known = value.type.tensor_type.HasField("shape") and all(
        size >= 0 if isinstance(size, int) else set(dims).issuperset(symbols(size)) for size in declared
    )
    if head and value.name == head.output:
        found = writer.edge(head.input)
        # Like its slices, whose shapes the sampler saw: they must agree but for the last dimension.
        shape = (*found.shape[:-1], head.rows[-1][1]) if found.shape else ()
        return TensorSpec(name=value.name, dtype=dtype_name(value.type.tensor_type.elem_type), shape=shape)
    found = writer.edge(value.name)
    return TensorSpec(name=value.name, dtype=found.dtype, shape=declared if is_known else found.shape)
