"""Writes the shards of one model: graph files, weights files, and their records in the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onnx import GraphProto, ModelProto, ValueInfoProto, helper

from pipeload.format.dtypes import ONNX_DTYPES
from pipeload.format.manifest import FileRecord, Lookup, Role, Shard, TensorSpec, WeightSpec, WeightsRange
from pipeload.notify import Notify
from pipeload_export.cut.head import HeadCut, slice_graph
from pipeload_export.cut.placement import Piece
from pipeload_export.cut.tables import Lift
from pipeload_export.graph.external_data import set_place
from pipeload_export.graph.graph import Constant, Graph, dtype_name, node_inputs, operators
from pipeload_export.shard.fuse import Fused, fuse
from pipeload_export.shard.sampler import Sampler
from pipeload_export.shard.structure import Structures
from pipeload_export.write.amount import Amount
from pipeload_export.write.journal import Journal
from pipeload_export.write.narrow import StoredType, narrow, wide_name, with_casts
from pipeload_export.write.shared import SharedWeights, by_use
from pipeload_export.write.weights import WeightsFile, in_order, write_weights

__all__ = ["ShardWriter"]

_TABLES = "embeddings"
_HEAD = "head"
_IR_VERSION = 10
_NUMBERS = {name: number for number, name in ONNX_DTYPES.items()}


class ShardWriter:
    """Writes shards in their order; each one's outputs give the shapes and types of the next one's inputs.

    Args:
        graph: the whole model's, without the parts that were lifted out.
        folder: where the files go.
        sampler: runs the shards.
        stored_type: in which type a constant is stored.
        progress: called with the file being written, the bytes written so far, and the bytes in total.
        journal: of finished weights files; None keeps none.

    Attributes:
        shards, files: those written so far.
        structures: of those shards.
    """

    def __init__(
        self,
        graph: Graph,
        folder: Path,
        sampler: Sampler,
        progress: Notify,
        *,
        stored_type: StoredType,
        journal: Journal | None,
    ) -> None:
        self._graph = graph
        self._stored_type = stored_type
        self._journal = journal
        self._folder = folder
        self._sampler = sampler
        self._progress = progress
        self._amount = Amount(sum(constant.nbytes for constant in graph.constants.values()))
        self._inputs = {value.name: value for value in graph.inputs}
        self._outputs = {value.name: value for value in graph.outputs}
        self._tables: WeightsFile | None = None
        self._constant = graph.constant_sources()
        self._shared = SharedWeights()
        self.shards: list[Shard] = []
        self.files: list[FileRecord] = []
        self.structures = Structures(sampler)

    def write_tables(self, tables: Mapping[str, Constant], head: HeadCut | None) -> None:
        """Write the lifted tables; one that slices of the head point into comes first, at the start of a page."""
        if not tables:
            return
        tied = head if head and head.tied else None
        if tied and tied.product:
            cut = {tied.tied, *(name for name in tied.scales if name in tables)}
            self._tables = self._write_cut(_TABLES, tied, [item for item in in_order(tables) if item[0] not in cut])
        else:
            self._tables = self._write_tables(_TABLES, tables, tied)

    def write_piece(self, piece: Piece, lifts: Sequence[Lift], head: HeadCut | None, *, optimise: bool = True) -> None:
        """Write one shard that was cut out of the graph; without `optimise`, one that is optimised already."""
        graph = self._graph
        nodes = [graph.nodes[index] for index in piece.nodes]
        names = {name for node in nodes for name in node_inputs(node)}
        constants = {name: constant for name, constant in graph.constants.items() if name in names}
        inputs = [self._value(name) for name in piece.inputs]
        outputs = [self._outputs.get(name) or self._value(name) for name in piece.outputs]
        model = self._model(helper.make_graph(nodes, piece.name, inputs, outputs))
        computes = any(name in self._constant for node in nodes for name in node.output)
        mine = [lift for lift in lifts if lift.output in piece.inputs]
        for lift in mine:
            self._sampler.fetch(len(self.shards), graph.constants[lift.table], lift.indices, lift.output)
        plain, fused = fuse(model, constants, self._folder, computes_constants=computes)
        chosen, structure = self.structures.choose(len(self.shards), plain, fused if optimise else None)
        for name, dtype in chosen.dtypes.items():
            graph.types[name] = (dtype, graph.types.get(name, (0, None))[1])
        chosen, widened = narrow(replace(chosen, external=by_use(chosen)), self._stored_type)
        structure = self.structures.stored(structure, [constant.dtype for constant in chosen.external.values()])
        written = (
            self._write_weights(piece.name, in_order(chosen.external), widened=widened) if chosen.external else None
        )
        if written and (known := self._shared.share(written, chosen)):
            self.files.remove(written.record)
            (self._folder / f"{piece.name}.safetensors").unlink()
            written = known
        self._add(
            piece.name,
            piece.role,
            chosen,
            structure,
            weights=written.range if written else None,
            tensors=written.tensors if written else (),
            lookups=tuple(self._lookup(lift, head) for lift in mine),
        )

    def write_head(self, head: HeadCut) -> None:
        """Write the slices of the head, and its table unless that is a lifted one."""
        if head.tied:
            assert self._tables is not None
            file = self._tables
        elif head.product is None:
            file = self._write_tables(_HEAD, {head.table: self._graph.constants[head.table]}, head)
        else:
            file = self._write_cut(_HEAD, head, [])
        table = next((spec for spec in file.tensors if spec.name == head.table), None)
        for index, (begin, _) in enumerate(head.rows):
            model, weights = slice_graph(self._graph, head, index, self._sampler.shape(head.input))
            model.ir_version = _IR_VERSION
            plain, _ = fuse(model, weights, self._folder, computes_constants=False)
            chosen, structure = self.structures.choose(len(self.shards), plain, None)
            self._graph.types.update((name, (dtype, None)) for name, dtype in chosen.dtypes.items())
            stored = dict.fromkeys(weights, _NUMBERS[table.dtype]) if table and table.widened else {}
            chosen, casts = with_casts(replace(chosen, external=weights), stored)
            part = file.slices[head.table, begin]
            self._add(
                f"{_HEAD}.{index:03d}",
                "head",
                chosen,
                structure,
                weights=part,
                tensors=tuple(_one_after_another(chosen.external, casts, part.offset)),
                lookups=(),
            )

    def _write_cut(self, name: str, head: HeadCut, others: Sequence[tuple[str, Constant]]) -> WeightsFile:
        """Write the rounded rows of a head so that each slice has its rows and their scales together."""
        cuts = [head.cut(self._graph, index) for index in range(len(head.rows))]
        runs = {(head.table, begin): list(cut) for (begin, _), cut in zip(head.rows, cuts, strict=True)}
        parts = [item for cut in cuts for item in cut.items()]
        return self._write_weights(name, [*parts, *others], tables=True, runs=runs)

    def finish(self) -> None:
        """Tell the progress function that the last byte is written."""
        self._progress("writing done", self._amount.done, self._amount.done)

    def edge(self, name: str) -> TensorSpec:
        """Type and shape of a tensor between shards, as far as they are known."""
        return TensorSpec(
            name=name,
            dtype=dtype_name(self._graph.types.get(name, (0, None))[0]),
            shape=self._sampler.shape(name) or (),
        )

    def _write_tables(self, name: str, tables: Mapping[str, Constant], head: HeadCut | None) -> WeightsFile:
        """Write tables, the one that the head is cut from first, at the start of a page."""
        stored = {key: Constant(self._stored_type(table), table.shape, table.load) for key, table in tables.items()}
        order = sorted(in_order(stored), key=lambda item: head is None or item[0] != head.table)
        widened = {key: wide_name(key) for key, table in tables.items() if stored[key].dtype != table.dtype}
        rows = {head.table: head.rows} if head else None
        return self._write_weights(name, order, tables=True, widened=widened, rows=rows)

    def _write_weights(
        self,
        name: str,
        constants: Sequence[tuple[str, Constant]],
        *,
        tables: bool = False,
        widened: Mapping[str, str] | None = None,
        rows: Mapping[str, Sequence[tuple[int, int]]] | None = None,
        runs: Mapping[tuple[str, int], Sequence[str]] | None = None,
    ) -> WeightsFile:
        def written(count: int) -> None:
            self._amount.done += count
            self._progress(f"writing {name}", self._amount.done, self._amount.total)

        narrow = sum(constant.nbytes for key, constant in constants if key in (widened or {}))
        nbytes = sum(constant.nbytes for _, constant in constants)
        self._amount.begin(nbytes, of=nbytes + narrow)
        path = self._folder / f"{name}.safetensors"
        result = write_weights(
            *(path, constants),
            tables=tables,
            widened=widened,
            rows=rows,
            runs=runs,
            journal=self._journal,
            written=written,
        )
        self.files.append(result.record)
        return result

    def _add(
        self,
        name: str,
        role: Role,
        fused: Fused,
        structure: str,
        *,
        weights: WeightsRange | None,
        tensors: tuple[WeightSpec, ...],
        lookups: tuple[Lookup, ...],
    ) -> None:
        places = {spec.name: spec for spec in tensors}
        self._declare(fused)
        for proto in fused.model.graph.initializer:
            if proto.name in fused.external:
                assert weights is not None
                spec = places[proto.name]
                set_place(proto, Path(weights.path).name, spec.offset, spec.nbytes)
        data = fused.model.SerializeToString(deterministic=True)
        path = self._folder / f"{name}.onnx"
        path.write_bytes(data)
        record = FileRecord(
            path=f"{self._folder.name}/{path.name}", nbytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
        self.files.append(record)
        self._graph.forget()
        self.shards.append(
            Shard(
                name=name,
                role=role,
                graph=record,
                weights=weights,
                tensors=tensors,
                inputs=tuple(value.name for value in fused.model.graph.input),
                outputs=tuple(value.name for value in fused.model.graph.output),
                lookups=lookups,
                packed="MatMulNBits" in operators(fused.model.graph.node),
                structure=structure,
            )
        )

    def _declare(self, fused: Fused) -> None:
        """Give types and shapes to those outputs of a shard that have none: ONNX wants them declared."""
        for value in fused.model.graph.output:
            if not value.type.tensor_type.HasField("shape"):
                ranks = {len(shape) for shape in self._sampler.shapes[value.name]}
                shape: tuple[int | str | None, ...] | None = self._sampler.shape(value.name)
                if shape is None and len(ranks) == 1:
                    shape = (None,) * ranks.pop()
                value.CopyFrom(helper.make_tensor_value_info(value.name, fused.dtypes[value.name], shape))

    def _lookup(self, lift: Lift, head: HeadCut | None) -> Lookup:
        assert self._tables is not None
        specs = {spec.name: spec for spec in self._tables.tensors}
        table, parts = specs.get(lift.table), tuple[WeightSpec, ...]()
        if table is None:
            # Of a rounded table that the head is tied to each slice lies in its own place, between scales.
            assert head is not None
            name = head.table if lift.table == head.tied else lift.table
            parts = tuple(specs[f"{name}[{begin}:{end}]"] for begin, end in head.rows)
            table = replace(parts[0], name=lift.table, shape=self._graph.constants[lift.table].shape)
        return Lookup(path=self._tables.record.path, table=table, indices=lift.indices, output=lift.output, parts=parts)

    def _value(self, name: str) -> ValueInfoProto:
        if name in self._inputs:
            return self._inputs[name]
        dtype, shape = self._graph.types.get(name, (0, None))
        if not dtype:
            return helper.make_empty_tensor_value_info(name)
        found = self._sampler.shape(name)
        return helper.make_tensor_value_info(name, dtype, shape if found is None else found)

    def _model(self, graph: GraphProto) -> ModelProto:
        domains = {node.domain for node in graph.node} | {""}
        opsets = [helper.make_opsetid(d, v) for d, v in self._graph.opsets.items() if d in domains]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="pipeload")


def _one_after_another(weights: Mapping[str, Constant], casts: Mapping[str, str], offset: int) -> Iterator[WeightSpec]:
    """Where the tensors of one slice lie in its file."""
    for name, constant in weights.items():
        dtype = dtype_name(constant.dtype)
        yield WeightSpec(name=name, dtype=dtype, shape=constant.shape, offset=offset, widened=casts.get(name))
        offset += constant.nbytes
