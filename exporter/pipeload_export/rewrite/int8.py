"""KV caches that are written in place -> caches of int8, with a scale of float32 for each token and head.

```
before    present = TensorScatter(past, new)
          Attention(q, present_k, present_v, mask)
after     scale = max(abs(new)) / 127, along the size of a head
          present = TensorScatter(past, QuantizeLinear(new, scale))
          present_scale = TensorScatter(past_scale, scale)
          Attention(q, DequantizeLinear(present_k, present_k_scale), DequantizeLinear(present_v, ...), mask)
```

A token is rounded once, before it enters the cache. Every query reads it from there, those of its own text too, so a
text has the same answers whether it comes at once, in pieces, or token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from pipeload.errors import ExportError
from pipeload_export.graph.graph import Graph, known_constant
from pipeload_export.graph.types import infer_types

__all__ = ["quantise_caches"]

_STEPS = 127
"""The largest int8 that has an opposite."""
_LEAST = 1e-30
"""The least peak of a head. Values below it are nearly zero; a scale must be neither 0 nor too small to be exact."""
_LAST, _STEPS_NAME, _LEAST_NAME = "pipeload.last", "pipeload.steps", "pipeload.least"


def quantise_caches(graph: Graph, in_place: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Rewrite a decoder's graph.

    Args:
        graph: the model's.
        in_place: caches that are written in place, graph input -> graph output.

    Returns:
        For each of them the graph input and the graph output with its scales, which is a cache in place as well.

    Raises:
        ExportError: there are no such caches, or the size of a head is not known.
    """
    last = {name: (graph.types[name][1] or (None,))[-1] for name in in_place}
    sizes = {name: size for name, size in last.items() if isinstance(size, int)}
    if not in_place or len(sizes) < len(in_place):
        raise ExportError(
            "This model has no KV caches that could be int8: that takes caches of float32 or float16, read by an "
            "attention that the exporter knows how to write in place. Export it with the KV caches of the model."
        )
    scales = {name: (f"{name}.scale", f"{output}.scale") for name, output in in_place.items()}
    graph.constants[_LAST] = known_constant(np.array([-1], np.int64))
    graph.constants[_STEPS_NAME] = known_constant(np.array(_STEPS, np.float32))
    graph.constants[_LEAST_NAME] = known_constant(np.array(_LEAST, np.float32))
    read = {output: f"{output}.dequantised" for output in in_place.values()}
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        past = node.input[0] if node.input else ""
        if node.op_type == "TensorScatter" and past in scales:
            block = {"axis": -1, "block_size": sizes[past]}
            narrow = graph.types[past][0] == TensorProto.FLOAT16
            nodes += _written(node, scales[past], block, read[node.output[0]], narrow=narrow)
            continue
        if node.op_type != "Shape":
            node.input[:] = [read.get(name, name) for name in node.input]
        nodes.append(node)
    graph.nodes = nodes
    graph.inputs = list(_declared(graph.inputs, {name: given for name, (given, _) in scales.items()}))
    graph.outputs = list(_declared(graph.outputs, {in_place[name]: made for name, (_, made) in scales.items()}))
    graph.types = infer_types(graph)
    return scales


def _written(
    scatter: NodeProto, scales: tuple[str, str], block: Mapping[str, int], read: str, *, narrow: bool
) -> Iterator[NodeProto]:
    """The nodes that replace one that writes new tokens into a cache; `narrow` ones are fp16."""
    past, new, where = scatter.input
    present = scatter.output[0]
    size, peak, least, scale, rounded = (f"{present}.{part}" for part in ("size", "peak", "least", "step", "rounded"))
    if narrow:
        narrow_new, new = new, f"{present}.wide"
        yield helper.make_node("Cast", [narrow_new], [new], to=TensorProto.FLOAT)
    yield helper.make_node("Abs", [new], [size])
    yield helper.make_node("ReduceMax", [size, _LAST], [peak], keepdims=1)
    yield helper.make_node("Max", [peak, _LEAST_NAME], [least])
    yield helper.make_node("Div", [least, _STEPS_NAME], [scale])
    yield helper.make_node("QuantizeLinear", [new, scale], [rounded], output_dtype=TensorProto.INT8, **block)
    for before, tokens, after in ((past, rounded, present), (scales[0], scale, scales[1])):
        written = NodeProto()
        written.CopyFrom(scatter)
        written.input[:], written.output[:] = [before, tokens, where], [after]
        yield written
    # One row for each token and head: onnxruntime has a loop for rows that is six times as fast as that for blocks.
    rows, row_scales, floats, shape = (f"{present}.{part}" for part in ("rows", "row_scales", "floats", "shape"))
    yield helper.make_node("Flatten", [present], [rows], axis=3)
    yield helper.make_node("Reshape", [scales[1], _LAST], [row_scales])
    yield helper.make_node("DequantizeLinear", [rows, row_scales], [floats], axis=0)
    yield helper.make_node("Shape", [present], [shape])
    yield helper.make_node("Reshape", [floats, shape], [read])


def _declared(values: list[ValueInfoProto], scales: Mapping[str, str]) -> Iterator[ValueInfoProto]:
    """Inputs or outputs of the graph: caches as int8, and each one's scales behind it."""
    for value in values:
        if value.name in scales:
            scale = ValueInfoProto()
            scale.CopyFrom(value)
            scale.name = scales[value.name]
            scale.type.tensor_type.elem_type = TensorProto.FLOAT
            scale.type.tensor_type.shape.dim[-1].dim_value = 1
            value.type.tensor_type.elem_type = TensorProto.INT8
            yield value
            yield scale
        else:
            yield value
