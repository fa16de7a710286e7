"""Element types: NumPy's name of each that a manifest may have, its bytes, and its names in safetensors and ONNX."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ITEM_BYTES", "NARROW", "ONNX_DTYPES", "SAFETENSORS_DTYPES", "WIDE", "dtype_bytes"]


class _Dtype(NamedTuple):
    name: str
    nbytes: int
    safetensors: str
    onnx: int


_DTYPES = (
    _Dtype("bool", 1, "BOOL", 9),
    _Dtype("int8", 1, "I8", 3),
    _Dtype("uint8", 1, "U8", 2),
    _Dtype("int16", 2, "I16", 5),
    _Dtype("uint16", 2, "U16", 4),
    _Dtype("int32", 4, "I32", 6),
    _Dtype("uint32", 4, "U32", 12),
    _Dtype("int64", 8, "I64", 7),
    _Dtype("uint64", 8, "U64", 13),
    _Dtype("float16", 2, "F16", 10),
    _Dtype("bfloat16", 2, "BF16", 16),
    _Dtype("float32", 4, "F32", 1),
    _Dtype("float64", 8, "F64", 11),
)

ITEM_BYTES = {dtype.name: dtype.nbytes for dtype in _DTYPES}
"""Every dtype that a manifest may name, and the bytes of one element."""

SAFETENSORS_DTYPES = {dtype.safetensors: dtype.name for dtype in _DTYPES}
"""The name in a safetensors header -> NumPy's."""

ONNX_DTYPES = {dtype.onnx: dtype.name for dtype in _DTYPES}
"""The number in an ONNX tensor (`TensorProto.DataType`) -> NumPy's name."""

NARROW, WIDE = frozenset({"bfloat16", "float16"}), "float32"
"""Types of tensors that may be widened when they are loaded, and the type that they get."""


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element."""
    return ITEM_BYTES[dtype]
