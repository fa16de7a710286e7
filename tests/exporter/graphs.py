"""Hand-made transformer graphs with one odd thing each, for the tests of the exporter's graph side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from pipeload_export.graph.graph import Graph
from pipeload_export.graph.load import load
from pipeload_export.graph.normalise import normalise
from pipeload_export.graph.save import GraphFile
from pipeload_export.rewrite.parts import Parts
from pipeload_export.rewrite.rounding import Rounding
from pipeload_export.rewrite.small_weights import is_fine, round_weights

WIDTH = 32
ROWS = 1024
"""Rows of the word table: enough bytes to be lifted out."""


def load_normalised(path: Path) -> Graph:
    """The graph in a file, as the search for blocks takes it."""
    graph = load(path)
    normalise(graph)
    return graph


def write_rounded_graph(
    source: Path | ModelProto, folder: Path, coarse: Rounding, fine: Rounding, *, integers: bool = False
) -> Path:
    """The unsplit graph with rounded weights, in a new folder in `folder`, as the file `model.onnx`."""
    folder.mkdir(exist_ok=True)
    if not isinstance(source, Path):
        onnx.save(source, folder / "source.onnx")
        source = folder / "source.onnx"
    graph, made = load_normalised(source), folder / "made"
    made.mkdir()
    round_weights(
        *(graph, lambda matrix: fine if is_fine(matrix) else coarse, Parts(made)),
        integers=integers,
        outputs=graph.output_names,
    )
    with GraphFile(made / "model.onnx", "model.onnx_data") as file:
        file.finish(graph)
    return made / "model.onnx"


class Builder:
    """Collects nodes and initializers; names are made up as it goes."""

    def __init__(self, *, seed: int = 0, opset: int = 17) -> None:
        self.random = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._count = 0

    def input(self, name: str, shape: Sequence[int | str | None], dtype: int = TensorProto.INT64) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, source: str, name: str, shape: Sequence[int | str | None], dtype: int = TensorProto.FLOAT) -> None:
        self.nodes.append(helper.make_node("Identity", [source], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def constant(self, array: Any, dtype: Any = None) -> str:
        self._count += 1
        name = f"constant.{self._count}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def weight(self, *shape: int, scale: float = 0.2) -> str:
        return self.constant((self.random.standard_normal(shape) * scale).astype(np.float32))

    def op(self, kind: str, *inputs: str, count: int = 1, **attributes: Any) -> Any:
        self._count += 1
        names = [f"{kind.lower()}.{self._count}.{i}" for i in range(count)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"node.{self._count}", **attributes))
        return names[0] if count == 1 else names

    def norm(self, x: str, width: int = WIDTH) -> str:
        scale = self.constant(1 + 0.1 * self.random.standard_normal(width), np.float32)
        return self.op("LayerNormalization", x, scale, self.constant(np.zeros(width), np.float32), axis=-1)

    def residual_norm(self, state: str, update: str) -> tuple[str, str]:
        """onnxruntime's fused sum and norm: the normed state and the state."""
        self._count += 1
        scale, shift = self.constant(np.ones(WIDTH), np.float32), self.constant(np.zeros(WIDTH), np.float32)
        names = [f"normed.{self._count}", "", "", f"state.{self._count}"]
        inputs = [state, update, scale, shift]
        options = {"domain": "com.microsoft", "epsilon": 1e-5}
        self.nodes.append(helper.make_node("SkipLayerNormalization", inputs, names, **options))
        return names[0], names[3]

    def attention(self, x: str, *, bias: str | None = None, past: str | None = None) -> tuple[str, str]:
        """One head over the normed activation. Returns the update, and the keys with those of the past."""
        normed = self.norm(x)
        query, key, value = (self.op("MatMul", normed, self.weight(WIDTH, WIDTH)) for _ in range(3))
        if past is not None:
            key = self.op("Concat", past, key, axis=1)
            value = key
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 2, 1]))
        if bias is not None:
            scores = self.op("Add", scores, bias)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), value)
        return self.op("MatMul", mixed, self.weight(WIDTH, WIDTH)), key

    def feed_forward(self, x: str, weight: str | None = None) -> str:
        inner = self.op("Relu", self.op("MatMul", self.norm(x), weight or self.weight(WIDTH, 2 * WIDTH)))
        return self.op("MatMul", inner, self.weight(2 * WIDTH, WIDTH))

    def layer(self, x: str, **options: Any) -> str:
        x = self.op("Add", x, self.attention(x, **options)[0])
        return self.op("Add", x, self.feed_forward(x))

    def embed(self, ids: str, rows: int = ROWS) -> str:
        return self.op("Gather", self.weight(rows, WIDTH, scale=1.0), ids)

    def mask_bias(self, mask: str) -> str:
        """[batch, length] of ones and zeros -> [batch, 1, length] to add to scores."""
        inverted = self.op("Sub", self.constant(1.0, np.float32), self.op("Cast", mask, to=TensorProto.FLOAT))
        row = self.op("Unsqueeze", inverted, self.constant([1]))
        return self.op("Mul", row, self.constant(-100.0, np.float32))

    def model(self) -> ModelProto:
        graph = helper.make_graph(self.nodes, "odd", self.inputs, self.outputs, self.initializers)
        domains = {node.domain for node in self.nodes} - {""}
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)

    def save(self, path: Path) -> Path:
        onnx.save(self.model(), str(path))
        return path


def encoder(layers: int = 3, *, seed: int = 0, opset: int = 17) -> Builder:
    """Words and a mask -> hidden states."""
    builder = Builder(seed=seed, opset=opset)
    ids = builder.input("input_ids", ["batch", "length"])
    bias = builder.mask_bias(builder.input("attention_mask", ["batch", "length"]))
    x = builder.embed(ids)
    for _ in range(layers):
        x = builder.layer(x, bias=bias)
    builder.output(builder.norm(x), "hidden", ["batch", "length", WIDTH])
    return builder


def with_hidden_states(layers: int) -> Builder:
    """Layers whose hidden states are outputs too, and a last norm."""
    builder = Builder()
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    for number in range(layers):
        x = builder.layer(x)
        builder.output(x, f"hidden.{number}", ["batch", "length", WIDTH])
    builder.output(builder.norm(x), "last", ["batch", "length", WIDTH])
    return builder


def grouped_decoder(layers: int = 3) -> Builder:
    """A decoder as onnxruntime-genai writes them: fused norms and attention, one symbol for cache and text together."""
    builder = Builder()
    ids = builder.input("input_ids", ["batch", "length"])
    mask = builder.input("attention_mask", ["batch", "total"])
    state = builder.embed(ids)
    count = builder.op("Sub", builder.op("ReduceSum", mask, builder.constant([1]), keepdims=0), builder.constant([1]))
    counts = builder.op("Cast", count, to=TensorProto.INT32)
    total = builder.op("Gather", builder.op("Shape", mask), builder.constant(1))
    totals = builder.op("Cast", total, to=TensorProto.INT32)
    normed, presents = builder.norm(state), []
    for number in range(layers):
        pasts = [
            builder.input(f"past.{number}.{kind}", ["batch", 1, "past", 16], TensorProto.FLOAT)
            for kind in ("key", "value")
        ]
        sides = [builder.op("MatMul", normed, builder.weight(WIDTH, size)) for size in (WIDTH, 16, 16)]
        names = [f"mixed.{number}", f"present.{number}.key", f"present.{number}.value"]
        options = {"domain": "com.microsoft", "num_heads": 2, "kv_num_heads": 1}
        inputs = [*sides, *pasts, counts, totals]
        builder.nodes.append(helper.make_node("GroupQueryAttention", inputs, names, **options))
        presents += names[1:]
        normed, state = builder.residual_norm(state, builder.op("MatMul", names[0], builder.weight(WIDTH, WIDTH)))
        inner = builder.op("Relu", builder.op("MatMul", normed, builder.weight(WIDTH, 2 * WIDTH)))
        normed, state = builder.residual_norm(state, builder.op("MatMul", inner, builder.weight(2 * WIDTH, WIDTH)))
    builder.output(normed, "hidden", ["batch", "length", WIDTH])
    builder.outputs += [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1, "total", 16]) for name in presents
    ]
    return builder


def renamed(model: ModelProto, seed: int = 0) -> ModelProto:
    """The same model with every name but those of inputs and outputs replaced by a random one."""
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    kept = {value.name for value in (*graph.input, *graph.output)} | {""}
    random = np.random.default_rng(seed)
    names: dict[str, str] = {}

    def new(name: str) -> str:
        return name if name in kept else names.setdefault(name, f"t{random.integers(1 << 62)}")

    for tensor in graph.initializer:
        tensor.name = new(tensor.name)
    for node in graph.node:
        node.name = new(node.name or "unnamed")
        for own in (node.input, node.output):
            own[:] = [new(name) for name in own]
    del graph.value_info[:]
    return copy


def reordered(model: ModelProto, seed: int = 0) -> ModelProto:
    """The same model with its nodes in a random order, not even sorted."""
    copy = ModelProto()
    copy.CopyFrom(model)
    nodes = list(copy.graph.node)
    order = np.random.default_rng(seed).permutation(len(nodes))
    del copy.graph.node[:]
    copy.graph.node.extend(nodes[place] for place in order)
    return copy


def backwards(model: ModelProto) -> ModelProto:
    """The same model, sorted, but with independent nodes in the opposite order."""
    copy = ModelProto()
    copy.CopyFrom(model)
    known = {value.name for value in copy.graph.input} | {tensor.name for tensor in copy.graph.initializer} | {""}
    waiting, result = list(copy.graph.node)[::-1], []
    while waiting:
        ready = next(node for node in waiting if known.issuperset(node.input))
        waiting.remove(ready)
        result.append(ready)
        known.update(ready.output)
    del copy.graph.node[:]
    copy.graph.node.extend(result)
    return copy


def run(model: ModelProto | Path, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The unsplit model's outputs in plain onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))
