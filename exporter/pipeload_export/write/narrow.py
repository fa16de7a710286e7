"""Weights of a shard -> the same in 16 bits, where that loses nothing.

The graph takes the stored values through a `Cast` to float32, so that any ONNX program runs it. The casts come first:
onnxruntime then runs each just before the first node that needs it, and holds one wide tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from pipeload_export.graph.graph import Constant, row_pieces, storage_dtype
from pipeload_export.rewrite.sixteen import LEAST_BYTES
from pipeload_export.shard.fuse import Fused
from pipeload_export.write.names import all_names, rename

__all__ = ["StoredType", "given_type", "narrow", "stored_type", "wide_name", "with_casts"]

StoredType: TypeAlias = Callable[[Constant], int]
"""ONNX's number of the element type in which a constant is stored."""

_PIECE = 1 << 22
"""Values that are looked at in one step."""


def stored_type(constant: Constant) -> int:
    """ONNX's number of the element type in which a constant is stored: of 16 bits if all values stay the same.

    The values are read piece by piece, as far as they fit; not those of a file of bfloat16, which fit.
    """
    if constant.dtype == TensorProto.FLOAT and constant.nbytes >= LEAST_BYTES:
        if constant.load().dtype == storage_dtype(TensorProto.BFLOAT16):
            return int(TensorProto.BFLOAT16)
        for dtype in (TensorProto.BFLOAT16, TensorProto.FLOAT16):
            if all(_is_exact(piece, dtype) for piece in _pieces(constant)):
                return int(dtype)
    return constant.dtype


def given_type(constant: Constant) -> int:
    """The element type that a constant has."""
    return constant.dtype


def narrow(fused: Fused, stored_type: StoredType) -> tuple[Fused, dict[str, str]]:
    """A shard's graph over weights as they are stored, and for each tensor of 16 bits the name of what it becomes."""
    names = all_names(fused.model.graph)
    types = {name: stored_type(constant) for name, constant in fused.external.items() if wide_name(name) not in names}
    return with_casts(fused, {name: dtype for name, dtype in types.items() if dtype != fused.external[name].dtype})


def with_casts(fused: Fused, types: Mapping[str, int]) -> tuple[Fused, dict[str, str]]:
    """The graph over weights that are stored in other types, and for each of them the name of what it is cast to."""
    casts = {name: wide_name(name) for name in types}
    model = ModelProto()
    model.CopyFrom(fused.model)
    graph = model.graph
    rename(graph, casts, initializers=False)
    for proto in graph.initializer:
        proto.data_type = types.get(proto.name, proto.data_type)
    nodes = [helper.make_node("Cast", [name], [made], made, to=TensorProto.FLOAT) for name, made in casts.items()]
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    stored = {
        name: Constant(dtype, fused.external[name].shape, fused.external[name].load) for name, dtype in types.items()
    }
    return replace(fused, model=model, external=fused.external | stored), casts


def wide_name(name: str) -> str:
    """The name of the float32 tensor that becomes of one that is stored in 16 bits."""
    return f"{name}.float32"


def _pieces(constant: Constant) -> Iterator[NDArray[np.float32]]:
    return (np.asarray(piece, np.float32) for piece in row_pieces(constant.load(), _PIECE))


def _is_exact(piece: NDArray[np.float32], dtype: int) -> bool:
    bits = np.ascontiguousarray(piece).view(np.uint32)
    if dtype == TensorProto.BFLOAT16:
        return not (bits & 0xFFFF).any()
    with np.errstate(over="ignore"):
        back: NDArray[Any] = piece.astype(storage_dtype(dtype)).astype(np.float32)
    return bool(np.isfinite(back).all() and np.array_equal(back.view(np.uint32), bits))
