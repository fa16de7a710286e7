"""The shards of a model directory -> one graph that does the same in a single session, without a copy of the weights.

For comparisons with engines that take an unsplit model. The graph's external data are the shards' own weights files,
so it is a few hundred kB whatever the size of the model. Lookups become `Gather`s over their tables, and the slices
of a head are joined by a `Concat`. Caches that shards write in place get their room in front of the first shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from pipeload.errors import ExportError
from pipeload.format.caches import length_input
from pipeload.format.dtypes import ONNX_DTYPES
from pipeload.format.manifest import LENGTH_AXIS, Lookup, Manifest, Shard, TensorSpec, read
from pipeload_export.graph.external_data import set_place

__all__ = ["merge"]

_NUMBERS = {name: number for number, name in ONNX_DTYPES.items()}


def merge(directory: Path, target: Path) -> Path:
    """Write the model as one graph whose weights stay where they are.

    The locations of its external data are relative to `directory`, so onnxruntime has to be told that folder: by the
    session's config entry `session.model_external_initializers_file_folder_path`, or by writing the graph into
    `directory` itself.

    Args:
        directory: a sharded model directory.
        target: the `.onnx` file to write.

    Returns:
        The target.

    Raises:
        ManifestError: the directory holds no valid model.
        ExportError: a shard's graph has functions of its own, or two shards disagree about the version of an opset.
    """
    manifest = read(directory)
    nodes: list[NodeProto] = []
    initializers: list[TensorProto] = []
    opsets: dict[str, int] = {}
    ir_version = 0
    rooms = {cache.input: f"{cache.input}.room" for cache in manifest.caches if cache.in_place}
    initializers += _room_constants() if rooms else []
    for name, room in rooms.items():
        nodes += _make_room(*length_input(manifest), name, room)
    for shard in manifest.shards:
        model = onnx.load(directory / shard.graph.path, load_external_data=False)
        if model.functions:
            raise ExportError(f"Shard '{shard.name}' has functions of its own, which cannot be merged.")
        ir_version = max(ir_version, model.ir_version)
        _add_opsets(opsets, model, shard)
        for lookup in shard.lookups:
            nodes.extend(_gather(lookup))
            if all(lookup.table.name != tensor.name for tensor in initializers):
                initializers.append(_table(lookup))
        _rename_inner(model.graph, shard, rooms)
        _move_weights(model.graph, shard)
        nodes.extend(model.graph.node)
        initializers.extend(model.graph.initializer)
    nodes.extend(_head(manifest))
    graph = helper.make_graph(
        nodes,
        "merged",
        [_value(spec) for spec in manifest.inputs],
        [_value(spec) for spec in manifest.outputs],
        initializers,
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    merged = helper.make_model(graph, opset_imports=imports, ir_version=ir_version, producer_name="pipeload")
    target.write_bytes(merged.SerializeToString(deterministic=True))
    return target


def _add_opsets(opsets: dict[str, int], model: ModelProto, shard: Shard) -> None:
    for opset in model.opset_import:
        known = opsets.setdefault(opset.domain, opset.version)
        if known != opset.version:
            raise ExportError(
                f"Shard '{shard.name}' has version {opset.version} of the opset '{opset.domain}', the shards before it "
                f"have {known}. Export the model again."
            )


def _rename_inner(graph: GraphProto, shard: Shard, others: dict[str, str]) -> None:
    """Put the shard's name in front of names that only it knows: optimisers give the same ones in every shard.

    Args:
        graph: of the shard.
        shard: its record in the manifest.
        others: new names of tensors that several shards know.
    """
    outer = {*shard.inputs, *shard.outputs, ""}
    inner = {name for node in graph.node for name in node.output} - outer
    inner |= {tensor.name for tensor in graph.initializer}
    _rename(graph, {name: f"{shard.name}/{name}" for name in inner} | others, shard.name)


def _rename(graph: GraphProto, names: dict[str, str], prefix: str) -> None:
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for number, node in enumerate(graph.node):
        # Optimisers leave some nodes without a name; a second empty one would be a fault.
        node.name = f"{prefix}/{number}.{node.name}"
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for part in (attribute.g, *attribute.graphs):
                _rename(part, names, prefix)


def _move_weights(graph: GraphProto, shard: Shard) -> None:
    """Locations relative to the shard's folder -> relative to the model directory."""
    folder = Path(shard.graph.path).parent
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = (folder / entry.value).as_posix()


def _gather(lookup: Lookup) -> Iterator[NodeProto]:
    rows = f"{lookup.output}.rows" if lookup.table.widened else lookup.output
    yield helper.make_node("Gather", [lookup.table.name, lookup.indices], [rows], rows, axis=0)
    if lookup.table.widened:
        yield helper.make_node("Cast", [rows], [lookup.output], lookup.output, to=_NUMBERS[lookup.table.memory_dtype])


def _table(lookup: Lookup) -> TensorProto:
    table = lookup.table
    tensor = TensorProto(name=table.name, data_type=_NUMBERS[table.dtype], dims=table.shape)
    set_place(tensor, lookup.path, table.offset, table.nbytes)
    return tensor


def _room_constants() -> list[TensorProto]:
    return [helper.make_tensor(f"room.zeros.{count}", TensorProto.INT64, [count], [0] * count) for count in (6, 1)]


def _make_room(length: str, axis: int, cache: str, room: str) -> Iterator[NodeProto]:
    """A cache with room for the new tokens, from one without."""
    pads = ["room.zeros.6", f"{room}.more", "room.zeros.1"]
    ends = {"start": LENGTH_AXIS, "end": LENGTH_AXIS + 1}
    yield helper.make_node("Shape", [length], [f"{room}.length"], f"{room}.length", start=axis, end=axis + 1)
    yield helper.make_node("Shape", [cache], [f"{room}.held"], f"{room}.held", **ends)
    yield helper.make_node("Sub", [f"{room}.length", f"{room}.held"], [f"{room}.more"], f"{room}.more")
    yield helper.make_node("Concat", pads, [f"{room}.pads"], f"{room}.pads", axis=0)
    yield helper.make_node("Pad", [cache, f"{room}.pads"], [room], room)


def _head(manifest: Manifest) -> Iterator[NodeProto]:
    if manifest.head:
        shards = {shard.name: shard for shard in manifest.shards}
        slices = [shards[name].outputs[0] for name in manifest.head.shards]
        yield helper.make_node("Concat", slices, [manifest.head.output], "head", axis=-1)


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, _NUMBERS[spec.dtype], spec.shape)
