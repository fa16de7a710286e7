"""The graphs of a finished directory's shards, each on its own; tables and the slices of a head are whole again.

```
lookup of rows, before a shard runs           -> Gather(table, indices) in `outside`
slices of a head, each with rows of a table   -> Gemm(input, table, bias) in `outside`
weight of 16 bits -> Cast -> ...              -> weight of float32, whose values are floats of 16 bits
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, ValueInfoProto, helper

from pipeload.format.dtypes import ONNX_DTYPES
from pipeload.format.manifest import Head, Lookup, Manifest, Shard, TensorSpec, WeightSpec
from pipeload_export.graph.graph import Constant, Graph, storage_dtype
from pipeload_export.graph.load import load
from pipeload_export.write.names import rename

__all__ = ["Joined", "Part", "join"]

_NUMBERS = {name: number for number, name in ONNX_DTYPES.items()}
_PRODUCTS = ("FusedMatMul", "MatMulNBits")
_Place: TypeAlias = tuple[str, WeightSpec]
"""A weights file, and a tensor in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A shard that is no slice of a head: its record, and its graph without lookups."""

    shard: Shard
    graph: Graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A directory's graphs.

    Attributes:
        parts: the shards in order, without the slices of a head.
        outside: the lookups of tables, and the product of a head that was cut.
        inputs: of the model.
        outputs: of the model.
        stored: ONNX's number of the type in which a constant of the directory is stored; None for other constants.
        forget: gives back the memory of all values that were read.
    """

    parts: tuple[Part, ...]
    outside: Graph
    inputs: list[ValueInfoProto]
    outputs: list[ValueInfoProto]
    stored: Callable[[Constant], int | None]
    forget: Callable[[], None]


def join(directory: Path, manifest: Manifest) -> Joined:
    """Read the graphs of a directory; weights are left in their files.

    Args:
        directory: a sharded model directory, whose weights are the source's.
        manifest: its manifest.

    Raises:
        ExportError: a graph does not open, or points to no weights.
    """
    weights = _Weights(directory)
    parts: list[Part] = []
    slices: list[Graph] = []
    for shard in manifest.shards:
        graph = load(directory / shard.graph.path)
        weights.take_over(shard, graph)
        if shard.role == "head":
            slices.append(graph)
        else:
            parts.append(Part(shard=shard, graph=graph))
    graphs = [*(part.graph for part in parts), *slices]
    opsets = {domain: version for graph in graphs for domain, version in graph.opsets.items()}
    outside = Graph(nodes=[], constants={}, inputs=[], outputs=[], opsets=opsets)
    _add_lookups(outside, [lookup for part in parts for lookup in part.shard.lookups], weights)
    _add_head(outside, manifest, slices, weights)

    def forget() -> None:
        for graph in graphs:
            graph.forget()

    return Joined(
        parts=tuple(parts),
        outside=outside,
        inputs=list(_values(manifest.inputs, [value for graph in graphs for value in graph.inputs])),
        outputs=list(_values(manifest.outputs, [value for graph in graphs for value in graph.outputs])),
        stored=weights.stored,
        forget=forget,
    )


class _Weights:
    """Constants of the directory's weights files. Those of one place are one constant, whatever shards take them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[tuple[str, str, tuple[int, ...], int], Constant] = {}
        self._stored: dict[int, int] = {}

    def stored(self, constant: Constant) -> int | None:
        """The type of 16 or more bits in which it lies in its file."""
        return self._stored.get(id(constant))

    def at(self, path: str, spec: WeightSpec) -> Constant:
        """The constant at a place; float32 where it is widened."""
        key = path, spec.dtype, spec.shape, spec.offset
        if key not in self._known:
            stored = _NUMBERS[spec.dtype]
            dtype = _NUMBERS[spec.memory_dtype]
            read = partial(_mapped, self._directory / path, storage_dtype(stored), spec.shape, spec.offset)
            self._known[key] = constant = Constant(dtype, spec.shape, read)
            self._stored[id(constant)] = stored
        return self._known[key]

    def take_over(self, shard: Shard, graph: Graph) -> None:
        """Let a shard's graph take the constants of this class, and those of 16 bits without their `Cast`."""
        casts = {spec.name: spec.widened for spec in shard.tensors if spec.widened}
        kept = GraphProto()
        kept.node.extend(
            node for node in graph.nodes if not (node.op_type == "Cast" and casts.get(node.input[0]) == node.output[0])
        )
        rename(kept, {wide: name for name, wide in casts.items()})
        graph.nodes = list(kept.node)
        if shard.weights:
            graph.constants |= {spec.name: self.at(shard.weights.path, spec) for spec in shard.tensors}


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    return np.memmap(path, dtype, "r", offset, shape)


def _values(specs: Sequence[TensorSpec], declared: Sequence[ValueInfoProto]) -> Iterator[ValueInfoProto]:
    """The model's inputs or outputs, as the shards that take or make them declare them."""
    known = {value.name: value for value in reversed(declared)}
    for spec in specs:
        yield known.get(spec.name) or helper.make_tensor_value_info(spec.name, _NUMBERS[spec.dtype], spec.shape)


def _add_lookups(outside: Graph, lookups: Sequence[Lookup], weights: _Weights) -> None:
    for lookup in lookups:
        rows = [weights.at(lookup.path, part) for part in lookup.parts]
        table = _one_below_another(rows, lookup.table.shape) if rows else weights.at(lookup.path, lookup.table)
        table = outside.constants.setdefault(lookup.table.name, table)
        outside.nodes.append(helper.make_node("Gather", [lookup.table.name, lookup.indices], [lookup.output], axis=0))
        outside.inputs.append(helper.make_empty_tensor_value_info(lookup.indices))
        outside.outputs.append(helper.make_empty_tensor_value_info(lookup.output))


def _add_head(outside: Graph, manifest: Manifest, slices: Sequence[Graph], weights: _Weights) -> None:
    if manifest.head is None:
        return
    shards = [shard for shard in manifest.shards if shard.role == "head"]
    products = [next(node for node in graph.nodes if node.op_type in _PRODUCTS) for graph in slices]
    names = [_whole(name) for name in products[0].input[1:]]
    if products[0].op_type == "FusedMatMul":
        table = _table_of(shards, weights)
        constants = {name: constant for name, constant in outside.constants.items() if constant is table}
        names = list(constants) or names
        outside.constants |= dict.fromkeys(names, table)
    else:
        # Those of a model that came with rounded weights.
        for place, name in enumerate(names, 1):
            cut = [graph.constants[product.input[place]] for graph, product in zip(slices, products, strict=True)]
            outside.constants[name] = _one_below_another(cut, (sum(one.shape[0] for one in cut), *cut[0].shape[1:]))
    biases = [graph.constants["bias"] for graph in slices if "bias" in graph.constants]
    if biases:
        bias = f"{manifest.head.output}.bias"
        outside.constants[bias] = _one_below_another(biases, (sum(one.shape[0] for one in biases),))
    outside.nodes += _head_nodes(manifest.head, products[0], names, outside, bias if biases else None)
    outside.inputs.append(helper.make_empty_tensor_value_info(manifest.head.input))
    outside.outputs.append(helper.make_empty_tensor_value_info(manifest.head.output))


def _head_nodes(
    head: Head, product: NodeProto, names: Sequence[str], outside: Graph, bias: str | None
) -> Iterator[NodeProto]:
    if product.op_type == "FusedMatMul":
        taken = [head.input, *names, *([bias] if bias else [])]
        yield helper.make_node("Gemm", taken, [head.output], transB=1)
        return
    whole = NodeProto()
    whole.CopyFrom(product)
    made = f"{head.output}.product" if bias else head.output
    whole.input[:], whole.output[:] = [head.input, *names], [made]
    next(item for item in whole.attribute if item.name == "N").i = outside.constants[names[0]].shape[0]
    yield whole
    if bias:
        yield helper.make_node("Add", [made, bias], [head.output])


def _table_of(shards: Sequence[Shard], weights: _Weights) -> Constant:
    """The table whose rows the slices of a head have one behind the other: that of a lookup, or one of its own."""
    spec, first = shards[0].tensors[0], shards[0].weights
    assert first is not None
    rows = sum(shard.tensors[0].shape[0] for shard in shards)
    whole = WeightSpec(
        name=_whole(spec.name),
        dtype=spec.dtype,
        shape=(rows, *spec.shape[1:]),
        offset=spec.offset,
        widened=spec.widened,
    )
    return weights.at(first.path, whole)


def _whole(name: str) -> str:
    """The name of the table of which a slice has some rows: those are named `table[begin:end]`."""
    return name.rsplit("[", 1)[0]


def _one_below_another(parts: Sequence[Constant], shape: tuple[int, ...]) -> Constant:
    return Constant(parts[0].dtype, shape, lambda: np.concatenate([part.load() for part in parts]).reshape(shape))
