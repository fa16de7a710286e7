"""A shard's graph against the manifest's sizes: no tensor is larger than all that may be in memory together. Pure.

The manifest bounds the intermediate tensors of a shard for any sizes of the model's dimensions, and plans count on
that. Where a tensor's size follows from shapes and constants, it is held against the bound for some sizes; nothing is
allocated. What `extents` cannot tell passes: sizes that are computed from values, and operators that it does not know.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping

from pipeload.errors import ShardError
from pipeload.format.dims import evaluate_dim
from pipeload.format.dtypes import dtype_bytes
from pipeload.format.extents import Extent, extent_of, made_by
from pipeload.format.graphs import no_graph
from pipeload.format.inline import read_inline
from pipeload.format.manifest import Manifest, Shard
from pipeload.format.nodes import Graph, graphs_of, inner_graph
from pipeload.format.protobuf import fields, packed, signed

__all__ = ["check_sizes"]

_SIZES = (1, 64, 4096)
"""Of every dimension at once: products of dimensions that the manifest does not have show at the larger ones."""
_SPARE_BYTES = 1 << 20
"""Plans are made in steps of as much."""

_Known = ChainMap[str, Extent | None]


def check_sizes(manifest: Manifest, shard: Shard, data: bytes) -> None:
    """Check that the graph makes no tensor that is larger than the manifest's bound on all of the shard's.

    Args:
        manifest: the validated manifest.
        shard: one of its shards.
        data: its `.onnx` file, checked by `check_graph`, as a session gets it.

    Raises:
        ShardError: it makes one, or its nodes wait for each other.
    """
    try:
        graphs = graphs_of(memoryview(data))
        for size in _SIZES:
            dims = dict.fromkeys(manifest.dims, size)
            bound = manifest.structures[shard.structure].activation_bytes(dims)
            for place, graph in enumerate(graphs):
                given = {} if place else _inputs(manifest, shard, size)
                for name, nbytes in _made(graph, given, ChainMap()):
                    if nbytes > bound + _SPARE_BYTES:
                        raise ShardError(
                            f"'{shard.graph.path}' is not the graph that the manifest describes: it makes '{name}' of "
                            f"{nbytes} bytes where every dimension is {size}, and all of the shard's tensors take at "
                            f"most {bound}. Do not trust this model, or export it again."
                        )
    except (ValueError, IndexError) as error:
        raise no_graph(shard, error) from error


def _inputs(manifest: Manifest, shard: Shard, size: int) -> dict[str, Extent | None]:
    """The shard's inputs, where their shapes are known, if every dimension has this size."""
    dims = dict.fromkeys(manifest.dims, size)
    specs = {spec.name: spec for spec in (*manifest.edges, *manifest.inputs)}
    found: dict[str, Extent | None] = dict.fromkeys((*shard.inputs, *(lookup.output for lookup in shard.lookups)))
    for name in found:
        spec = specs.get(name)
        # An edge without dimensions may be one whose rank is not known.
        if spec is not None and spec.shape:
            found[name] = Extent(tuple(evaluate_dim(dim, dims) for dim in spec.shape), dtype_bytes(spec.dtype))
    return found


def _made(graph: Graph, given: Mapping[str, Extent | None], around: _Known) -> Iterator[tuple[str, int]]:
    """Names and bytes of the tensors that a graph makes, as far as they are known.

    Args:
        graph: the graph.
        given: its inputs.
        around: the tensors of the graphs around it, which it sees.
    """
    known = around.new_child({name: extent_of(tensor) for name, tensor in graph.inline.items()})
    # An initializer of the same name is only a default.
    known.update({**dict.fromkeys(graph.inputs), **given})
    for tensor in graph.sparse:
        yield "a sparse tensor", _sparse_bytes(tensor)
    for node in graph.nodes:
        for attribute in node.attributes.values():
            for tensor in attribute.sparse:
                yield node.outputs[0] if node.outputs else node.kind, _sparse_bytes(tensor)
            for inner in attribute.graphs:
                yield from _made(inner_graph(inner), {}, known)
        known.update(dict.fromkeys(node.outputs))
        if node.outputs and (made := made_by(node, [known.get(name) for name in node.inputs])) is not None:
            known[node.outputs[0]] = made
            if node.kind != "Constant":
                yield node.outputs[0], made.nbytes


def _sparse_bytes(data: memoryview) -> int:
    """Bytes of a sparse tensor as onnxruntime lays it out: in full."""
    nbytes, item_bytes = 1, 1
    for number, value in fields(data):
        if number == 1 and not isinstance(value, int):
            item_bytes = extent_of(read_inline(value)[1]).item_bytes
        elif number == 3:
            for size in [value] if isinstance(value, int) else packed(value):
                nbytes *= signed(size)
    return nbytes * item_bytes
