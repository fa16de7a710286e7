"""Initializers that refer to a part of a weights file."""

from __future__ import annotations

from onnx import ModelProto, TensorProto, helper

from pipeload_export.graph.graph import Constant

__all__ = ["external_initializer", "set_place", "without_external_data"]


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
