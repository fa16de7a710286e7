"""A model's file -> a graph, whose weights stay in the file.

Weights in external files are read through memory maps when they are wanted; those inside the model's file stay in the
form in which it was parsed.
"""

from __future__ import annotations

import mmap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from pipeload.errors import ExportError
from pipeload_export.graph.external_data import check_places, data_file
from pipeload_export.graph.from_checkpoint import constants_at
from pipeload_export.graph.graph import (
    PACKED,
    SUBGRAPHS,
    Constant,
    Graph,
    attribute,
    known_constant,
    sort_nodes,
    storage_dtype,
    tensor_proto,
)
from pipeload_export.source.places import Weights

__all__ = ["load"]

_UNKNOWN = ("?", "-1", "None")


def load(path: Path, weights: Weights | None = None) -> Graph:
    """Read a model's structure, sorted; weights in external files are left there.

    Args:
        path: the model's file.
        weights: those that lie in a checkpoint, and are inputs of the model's file.

    Raises:
        ExportError: it is no ONNX model, has a cycle, a tensor without a source, or a missing weights file.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf has no common base of its errors
        raise ExportError(f"{path} is no ONNX model: {str(error).splitlines()[0]}") from error
    if not model.graph.node or not model.graph.output:
        raise ExportError(f"{path} holds no ONNX graph with nodes and outputs.")
    check_places(model, path)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.HasField("sequence_type") or value.type.HasField("map_type"):
            raise ExportError(f"'{value.name}' of {path} is no tensor, which shards cannot take or make.")
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    if model.graph.sparse_initializer:
        raise ExportError(f"{path} has sparse initializers, which shards cannot hold. Export it with dense ones.")
    return _graph_of(model, path, weights or Weights(places={}, order=[]))


def _graph_of(model: ModelProto, path: Path, weights: Weights) -> Graph:
    for value in (*model.graph.input, *model.graph.output):
        _forget_unknown_sizes(value)
    files = _Files(path)
    constants = {tensor.name: _constant_of(tensor, files) for tensor in model.graph.initializer}
    outside, forget_weights = constants_at(weights.places)
    constants |= outside
    constants = {name: constants[name] for name in (*weights.order, *constants) if name in constants}

    def forget() -> None:
        files.forget()
        forget_weights()

    nodes = []
    for node in model.graph.node:
        constant = _constant_node(node, files)
        if constant is None:
            _bring_in(node, files)
            # Stack traces and scopes of the program that exported the model.
            node.doc_string = ""
            del node.metadata_props[:]
            nodes.append(node)
        else:
            constants[node.output[0]] = constant
    inputs = [value for value in model.graph.input if value.name not in constants]
    return Graph(
        nodes=sort_nodes(nodes, {*constants, *(value.name for value in inputs)}),
        constants=constants,
        inputs=inputs,
        outputs=list(model.graph.output),
        opsets={entry.domain if entry.domain != "ai.onnx" else "": entry.version for entry in model.opset_import},
        forget=forget,
    )


def _forget_unknown_sizes(value: ValueInfoProto) -> None:
    """Exporters write -1 or "?" for a size that varies; a name would say that all of these are equal."""
    for dim in value.type.tensor_type.shape.dim:
        if dim.dim_value < 0 or dim.dim_param in _UNKNOWN:
            dim.Clear()


def _constant_node(node: NodeProto, files: _Files) -> Constant | None:
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        value = attribute(node, name)
        if isinstance(value, TensorProto):
            return _constant_of(value, files)
        if value is not None:
            return known_constant(np.asarray(value, np.float32 if "float" in name else np.int64))
    return None


def _bring_in(node: NodeProto, files: _Files) -> None:
    """Replace tensors in attributes that lie in an external file by their values; they need no names."""
    for item in node.attribute:
        for tensor in (item.t, *item.tensors) if item.type in (item.TENSOR, item.TENSORS) else ():
            if tensor.data_location == TensorProto.EXTERNAL:
                tensor.CopyFrom(tensor_proto(tensor.name, _constant_of(tensor, files)))
            tensor.ClearField("name")  # optimum gives one where weights lie in a file, so shards would depend on that
        for graph in (item.g, *item.graphs) if item.type in SUBGRAPHS else ():
            for tensor in graph.initializer:
                if tensor.data_location == TensorProto.EXTERNAL:
                    tensor.CopyFrom(tensor_proto(tensor.name, _constant_of(tensor, files)))
            for inner in graph.node:
                _bring_in(inner, files)


class _Files:
    """External files of a model, each mapped once."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._maps: dict[str, NDArray[np.uint8]] = {}

    def read(self, location: str, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """A view of a part of a file."""
        path = data_file(self._model, location)
        if location not in self._maps:
            if not path.is_file():
                raise ExportError(f"The model's weights file {path} is missing.")
            self._maps[location] = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        data = self._maps[location][offset : offset + nbytes]
        if data.nbytes != nbytes:
            raise ExportError(
                f"The model's weights file {path} ends at byte {self._maps[location].nbytes}; "
                f"the model refers to byte {offset + nbytes}. Fetch or export the model again."
            )
        return data

    def forget(self) -> None:
        """Let go of the pages that were read; they come back from the file when they are needed."""
        for mapped in self._maps.values():
            if isinstance(mapped, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def _constant_of(proto: TensorProto, files: _Files) -> Constant:
    shape = tuple(proto.dims)
    if proto.data_location != TensorProto.EXTERNAL:
        return Constant(proto.data_type, shape, partial(numpy_helper.to_array, proto))
    info = ExternalDataInfo(proto)
    dtype = storage_dtype(proto.data_type)
    nbytes = Constant(proto.data_type, shape, lambda: np.empty(0)).nbytes
    if info.length is not None and info.length != nbytes:
        raise ExportError(f"Initializer '{proto.name}' should have {nbytes} bytes, but refers to {info.length}.")

    def read() -> NDArray[Any]:
        data = files.read(info.location, info.offset or 0, nbytes)
        if proto.data_type in PACKED:
            raw = TensorProto(data_type=proto.data_type, dims=proto.dims, raw_data=data.tobytes())
            values: NDArray[Any] = numpy_helper.to_array(raw)
            return values
        if (info.offset or 0) % dtype.itemsize:
            data = data.copy()
        return data.view(dtype).reshape(shape)

    files.read(info.location, info.offset or 0, nbytes)
    return Constant(proto.data_type, shape, read)
