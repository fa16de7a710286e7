"""Which shards are built alike: their graphs are equal but for names and the values of weights, and they take inputs of
the same shapes.

Two facts about one of them hold for all: the memory of its intermediate tensors, and whether its fused graph computes
the same as the graph it was made from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from pipeload.format.manifest import Structure
from pipeload_export.shard.activations import fit
from pipeload_export.shard.fuse import INLINE_BYTES, Fused
from pipeload_export.shard.liveness import LiveTensor, live_tensors
from pipeload_export.shard.sampler import Sampler
from pipeload_export.shard.trial import Event

__all__ = ["Structures", "structure_id"]

_WIDEST = 4
"""Bytes of an element of an edge."""


class Structures:
    """The structures of one model's shards, which must be passed in order.

    Args:
        sampler: runs the first shard of each structure.

    Attributes:
        known: id -> the facts that its shards share.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._examples: dict[str, list[tuple[int, str]]] = {}
        self._refused: set[str] = set()
        self._stored: dict[str, list[tuple[int, ...]]] = {}
        self.known: dict[str, Structure] = {}

    def choose(self, shard: int, plain: Fused, fused: Fused | None) -> tuple[Fused, str]:
        """The graph to write for a shard, and its structure's id.

        Args:
            shard: its number.
            plain: its graph as it was cut out.
            fused: the same with fused operators, if there is one.
        """
        wanted = plain if fused is None or structure_id(fused.model) in self._refused else fused
        identity = structure_id(wanted.model)
        for like, name in self._examples.get(identity, ()):
            if self._sampler.repeat(shard, wanted, like):
                return wanted, name
        chosen, events = self._sampler.run(shard, wanted, None if wanted is plain else plain)
        if chosen is not wanted:
            self._refused.add(identity)
            identity = structure_id(chosen.model)
        # Stages of a vision model have the same graphs, and each halves the image that the next one gets.
        alike = self._examples.setdefault(identity, [])
        name = f"{identity}-{len(alike)}" if alike else identity
        self.known[name] = self._bound(chosen, events)
        alike.append((shard, name))
        return chosen, name

    def stored(self, name: str, dtypes: Sequence[int]) -> str:
        """The structure of a shard whose weights are stored in these types, of one that was chosen."""
        variants = self._stored.setdefault(name, [])
        if tuple(dtypes) not in variants:
            variants.append(tuple(dtypes))
        place = variants.index(tuple(dtypes))
        if not place:
            return name
        # The same work, over other bytes.
        self.known[f"{name}.{place}"] = self.known[name]
        return f"{name}.{place}"

    def _bound(self, fused: Fused, events: list[list[Event]]) -> Structure:
        sampler, graph = self._sampler, fused.model.graph
        names = [value.name for value in (*graph.input, *graph.output)]
        # The manifest cannot say the size of such an edge; each shard that takes one counts it.
        unknown = [value.name for value in graph.input if sampler.shape(value.name) is None]
        runs = []
        for place, run in enumerate(events):
            taken = sampler.run_shapes(unknown, place).values()
            runs.append(
                [
                    *live_tensors(fused.model, run, sampler.run_shapes(names, place)),
                    *(LiveTensor(factors=(_WIDEST, *shape), first=0, last=len(run) - 1) for shape in taken),
                ]
            )
        return fit(sampler.free_symbols, sampler.points, runs, steps=sampler.steps)


def structure_id(model: ModelProto) -> str:
    """Equal for graphs that differ only in names and in the values of weights.

    Shapes of inputs and outputs do not count, because their symbols depend on where the shard stands in the model.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    names = {"": ""}

    def short(name: str) -> str:
        return names.setdefault(name, str(len(names)))

    for value in graph.input:
        value.CopyFrom(_typed(short(value.name), value))
    for node in graph.node:
        node.name, node.doc_string = "", ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            attribute.t.name = ""
            if not attribute.HasField("t") or attribute.type != attribute.TENSOR:
                attribute.ClearField("t")
        for own in (node.input, node.output):
            own[:] = [short(name) for name in own]
    for value in graph.output:
        value.CopyFrom(_typed(short(value.name), value))
    initializers = sorted((p for p in graph.initializer if p.name in names), key=lambda p: int(names[p.name]))
    digest = hashlib.sha256()
    for proto in initializers:
        proto.name, proto.doc_string = names[proto.name], ""
        if proto.data_location == TensorProto.EXTERNAL or proto.ByteSize() >= INLINE_BYTES:
            proto.CopyFrom(TensorProto(name=proto.name, data_type=proto.data_type, dims=proto.dims))
        digest.update(proto.SerializeToString(deterministic=True))
    graph.name = ""
    del graph.initializer[:], graph.value_info[:], graph.metadata_props[:]
    digest.update(copy.SerializeToString(deterministic=True))
    return digest.hexdigest()[:12]


def _typed(name: str, value: ValueInfoProto) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, None)
