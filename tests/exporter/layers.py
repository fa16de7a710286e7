"""One layer of attention over KV caches as a graph of its own, as exporters write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from tests.exporter.graphs import Builder, load_normalised

from pipeload_export.graph.graph import Graph, tensor_proto

HEADS, SIZE = 4, 8
WIDTH = HEADS * SIZE


def attention_layer(**odd: Any) -> Builder:
    """One layer of attention over a cache, as exporters write it, with something odd about it."""
    build, groups = Builder(opset=odd.get("opset", 18)), odd.get("groups", HEADS)
    dtype = odd.get("dtype", TensorProto.FLOAT)
    # Of the arrays that a caller passes and gets.
    outer = TensorProto.FLOAT if odd.get("wide_ends") else dtype
    past, total = "past_sequence_length", odd.get("total", "past_sequence_length + sequence_length")
    x = build.input("x", ["batch_size", "sequence_length", WIDTH], outer)
    seen = build.input("attention_mask", ["batch_size", total])
    number = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    x = build.op("Cast", x, to=dtype) if outer != dtype else x

    def heads(count: int) -> str:
        weight = build.constant(build.random.standard_normal((WIDTH, count * SIZE)) * 0.2, number)
        product = build.op("MatMul", x, weight)
        split = build.op("Reshape", product, build.constant([0, 0, count, SIZE], np.int64))
        return str(build.op("Transpose", split, perm=[0, 2, 1, 3]))

    def cached(name: str, new: str) -> str:
        held = build.input(f"past.{name}", ["batch_size", groups, past, SIZE], outer)
        held = build.op("Cast", held, to=dtype) if outer != dtype else held
        made = f"present.{name}" if outer == dtype else f"appended.{name}"
        build.nodes.append(onnx.helper.make_node("Concat", [held, new], [made], axis=odd.get("axis", 2)))
        if outer != dtype:
            build.nodes.append(onnx.helper.make_node("Cast", [made], [f"present.{name}"], to=outer))
        shape = ["batch_size", groups, total, SIZE]
        build.outputs.append(onnx.helper.make_tensor_value_info(f"present.{name}", outer, shape))
        return made

    whole_shapes: list[str] = []

    def repeated(name: str) -> str:
        if groups == HEADS:
            return name
        wide = build.op("Unsqueeze", name, build.constant([2], np.int64))
        ones = build.constant([1, 1, HEADS // groups, 1, 1], np.int64)
        made = build.op("Reshape", build.op("Expand", wide, ones), build.constant([0, HEADS, -1, SIZE], np.int64))
        whole_shapes.append(build.op("Shape", made))
        return str(made)

    batch, length = (build.op("Shape", x, start=axis, end=axis + 1) for axis in (0, 1))
    rows = build.op("Mul", batch, build.constant([HEADS], np.int64))

    def flat(name: str) -> str:
        """Batch and heads as one dimension."""
        if not odd.get("flat"):
            return name
        size = build.constant([-1, odd.get("flat_size", SIZE)], np.int64)
        return str(build.op("Reshape", name, build.op("Concat", rows, size, axis=0)))

    queries = flat(heads(HEADS))
    keys, values = cached("key", heads(groups)), cached("value", heads(groups))
    if odd.get("looked_at"):
        build.output(build.op("ReduceSum", keys, keepdims=0), "sum", [], dtype)
    if odd.get("past_looked_at"):
        build.output(build.op("ReduceSum", "past.key", keepdims=0), "sum", [], outer)
    turned = build.op("Transpose", flat(repeated(keys)), perm=[0, 2, 1] if odd.get("flat") else [0, 1, 3, 2])
    total_length = build.op("Shape", turned, start=-1)
    if odd.get("total_of_repeated"):
        total_length = build.op("Slice", whole_shapes[0], build.constant([2], np.int64), build.constant([3], np.int64))
    if odd.get("scaled_keys"):
        turned = build.op("Mul", turned, build.constant(0.5, number))
    scores = build.op("MatMul", queries, turned)
    scores = build.op("Div", scores, build.constant(SIZE**0.5, number))
    if odd.get("flat"):
        # As in Bloom: distances for each head, then the mask over all four dimensions.
        slopes = build.op("Cast", build.constant([[[0.5]], [[0.25]], [[0.2]], [[0.1]]], np.float32), to=dtype)
        columns = build.op("Cast", build.op("CumSum", seen, build.constant(1)), to=dtype)
        far = build.op("Mul", slopes, build.op("Unsqueeze", columns, build.constant([1, 2], np.int64)))
        far = build.op("Reshape", far, build.op("Concat", rows, build.constant([1]), total_length, axis=0))
        scores = build.op("Add", scores, far)
        whole = build.op("Concat", batch, build.constant([HEADS]), length, build.constant([-1]), axis=0)
        scores = build.op("Reshape", scores, whole)
    if odd.get("wide_scores"):
        scores, number = build.op("Cast", scores, to=TensorProto.FLOAT), np.float32
    if odd.get("wide_factor"):
        scores = build.op("Mul", scores, build.constant(np.ones((HEADS, 1, 1)) * 2, number))
    hidden = build.op("Unsqueeze", build.op("Cast", seen, to=TensorProto.BOOL), build.constant([1, 2], np.int64))
    least = build.constant(odd.get("least", np.finfo(number).min), number)
    if odd.get("chosen"):
        scores = build.op("Where", hidden, scores, least)
    elif odd.get("shut_out"):
        scores = build.op("Where", build.op("Not", hidden), least, scores)
    elif not odd.get("unmasked"):
        scores = build.op("Add", scores, build.op("Where", hidden, build.constant(0, number), least))
    if odd.get("shifted"):
        scores = build.op("Add", scores, build.constant(np.zeros((1, 1, 1, 1)), number))
    if odd.get("scaled_last"):
        scores = build.op("Div", scores, build.constant(2, number))
    weights = build.op("Softmax", scores, axis=-1)
    if odd.get("wide_scores"):
        weights = build.op("Cast", weights, to=dtype)
        number = np.float16
    if odd.get("guarded"):
        weights = build.op("Where", build.op("IsNaN", weights), build.constant(0, number), weights)
    if odd.get("flat"):
        weights = build.op("Reshape", weights, build.op("Concat", rows, length, build.constant([-1]), axis=0))
    mixed = build.op("MatMul", weights, flat(repeated(values)))
    if odd.get("flat"):
        whole = build.op("Concat", build.constant([-1, HEADS]), build.op("Shape", mixed, start=1), axis=0)
        mixed = build.op("Reshape", mixed, whole)
    joined = build.op(
        "Reshape", build.op("Transpose", mixed, perm=[0, 2, 1, 3]), build.constant([0, 0, WIDTH], np.int64)
    )
    joined = build.op("Cast", joined, to=outer) if outer != dtype else joined
    build.output(joined, "y", ["batch_size", "sequence_length", WIDTH], outer)
    return build


def graph_of(build: Builder, folder: Path) -> Graph:
    onnx.save(build.model(), folder / "model.onnx")
    return load_normalised(folder / "model.onnx")


def model_of(graph: Graph) -> onnx.ModelProto:
    initializers = [tensor_proto(name, constant) for name, constant in graph.constants.items()]
    proto = onnx.helper.make_graph(graph.nodes, "g", graph.inputs, graph.outputs, initializers)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opsets.items()]
    return onnx.helper.make_model(proto, opset_imports=opsets, ir_version=10)
