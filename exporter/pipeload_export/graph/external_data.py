"""Tensors that refer to a part of a weights file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo

from pipeload.errors import ExportError
from pipeload_export.graph.graph import SUBGRAPHS, Constant

__all__ = ["check_places", "data_file", "external_initializer", "set_place", "without_external_data"]


def check_places(model: ModelProto, path: Path) -> None:
    """Look where all tensors of a model lie, those in attributes, subgraphs and functions too. Nothing is read.

    Raises:
        ExportError: one lies outside of the model's folder.
    """
    for tensor in _tensors(model.graph):
        _check_place(tensor, path)
    for function in model.functions:
        for node in function.node:
            for tensor in _tensors_of(node):
                _check_place(tensor, path)


def data_file(path: Path, location: str) -> Path:
    """The file with a model's external data.

    Args:
        path: the model's file.
        location: as the model has it, relative to its folder.

    Raises:
        ExportError: it lies neither in the model's folder, nor beside the file that the model is a link to.
    """
    file = path.parent / location
    if not any(file.resolve().is_relative_to(folder) for folder in (path.parent.resolve(), path.resolve().parent)):
        raise ExportError(f"{path} has weights at '{location}', outside of its own folder. Move them into it.")
    return file


def _check_place(tensor: TensorProto, path: Path) -> None:
    if tensor.data_location == TensorProto.EXTERNAL:
        data_file(path, ExternalDataInfo(tensor).location)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from _tensors_of(node)


def _tensors_of(node: NodeProto) -> Iterator[TensorProto]:
    for item in node.attribute:
        if item.type in (AttributeProto.TENSOR, AttributeProto.TENSORS):
            yield from (item.t, *item.tensors)
        elif item.type in SUBGRAPHS:
            for graph in (item.g, *item.graphs):
                yield from _tensors(graph)


def external_initializer(name: str, constant: Constant, location: str, offset: int) -> TensorProto:
    """An initializer that refers to a part of a file."""
    proto = TensorProto(name=name, data_type=constant.dtype, dims=constant.shape, data_location=TensorProto.EXTERNAL)
    set_place(proto, location, offset, constant.nbytes)
    return proto


def set_place(proto: TensorProto, location: str, offset: int, nbytes: int) -> None:
    """Make an initializer refer to a part of a file."""
    proto.data_location = TensorProto.EXTERNAL
    del proto.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(nbytes))):
        proto.external_data.add(key=key, value=value)


def without_external_data(model: ModelProto) -> ModelProto:
    """A copy in which external initializers are inputs, so that it can be checked without their files."""
    copy = ModelProto()
    copy.CopyFrom(model)
    kept = [proto for proto in copy.graph.initializer if proto.data_location != TensorProto.EXTERNAL]
    taken = [proto for proto in copy.graph.initializer if proto.data_location == TensorProto.EXTERNAL]
    copy.graph.input.extend(helper.make_tensor_value_info(p.name, p.data_type, p.dims) for p in taken)
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy
