"""What people do to a graph before they bring it: other element types, quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Change = Callable[[Path, Path], None]
"""Takes a source and a target."""

_SIZES = {
    "batch_size": 2,
    "sequence_length": 8,
    "past_sequence_length": 3,
    "num_channels": 3,
    "height": 32,
    "width": 32,
}
_BLOCK = 32


def half(*, keep_io_types: bool) -> Change:
    def change(source: Path, target: Path) -> None:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=keep_io_types), target)

    return change


def dynamic_int8(source: Path, target: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, target)


def static_int8(kind: str) -> Change:
    def change(source: Path, target: Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

        samples = _samples(source)

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> Any:
                return next(samples, None)

        quantize_static(source, target, Reader(), quant_format=QuantFormat[kind])

    return change


def int4(source: Path, target: Path) -> None:
    """Products with constant matrices become MatMulNBits, symmetric in blocks of 32."""
    model = onnx.load(source)
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        weight = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.ndim != 2:
            continue
        rows, columns = weight.shape
        blocks = weight.T.reshape(columns, rows // _BLOCK, _BLOCK)
        scale = np.abs(blocks).max(axis=-1, keepdims=True) / 7
        steps = (np.rint(blocks / scale) + 8).astype(np.uint8)
        packed = steps[..., ::2] | steps[..., 1::2] << 4
        names = [f"{node.output[0]}.{part}" for part in ("packed", "scale")]
        values: list[NDArray[Any]] = [packed, scale.ravel().astype(np.float32)]
        graph.initializer.extend(map(numpy_helper.from_array, values, names))
        sizes = {"K": rows, "N": columns, "bits": 4, "block_size": _BLOCK}
        made = helper.make_node(
            "MatMulNBits", [node.input[0], *names], node.output, node.name, domain="com.microsoft", **sizes
        )
        node.CopyFrom(made)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, target)


def bfloat16_weights(source: Path, target: Path) -> None:
    """Matrices are kept as bfloat16, and widened where they are used: onnxruntime computes no products of bfloat16."""
    model = onnx.load(source)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2:
            values, name = numpy_helper.to_array(tensor), tensor.name
            tensor.CopyFrom(helper.make_tensor(f"{name}.bf16", TensorProto.BFLOAT16, values.shape, values.ravel()))
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)


def bfloat16(source: Path, target: Path) -> None:
    """Everything is bfloat16, inputs and outputs too."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.BFLOAT16, values.shape, values.ravel()))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    del model.graph.value_info[:]
    onnx.save(model, target)


PRECISIONS: Mapping[str, Change] = {
    "fp16": half(keep_io_types=False),
    "fp16-inside": half(keep_io_types=True),
    "bf16-weights": bfloat16_weights,
    "int8-dynamic": dynamic_int8,
    "int8-qdq": static_int8("QDQ"),
    "int8-operators": static_int8("QOperator"),
    "int4": int4,
}


def _samples(source: Path) -> Iterator[dict[str, NDArray[Any]]]:
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    for _ in range(4):
        yield {value.name: _sample(value, random) for value in session.get_inputs()}


def _sample(value: Any, random: np.random.Generator) -> NDArray[Any]:
    shape = [size if isinstance(size, int) else sum(_SIZES[part] for part in size.split(" + ")) for size in value.shape]
    if value.type == "tensor(float)":
        return random.standard_normal(shape).astype(np.float32)
    if "ids" in value.name:
        return random.integers(0, 2 if "type" in value.name else 60, shape)
    return np.ones(shape, np.int64)
