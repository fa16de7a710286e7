"""Detours of exporters go, constants are folded, compressed weights are not, and large results are not computed yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper
from tests.exporter.conftest import Sharded, assert_same_answers
from tests.exporter.graphs import WIDTH, Builder, load_normalised, run

from pipeload.errors import ExportError
from pipeload_export.graph.graph import Graph
from pipeload_export.graph.load import load
from pipeload_export.graph.types import SMALL_BYTES

BATCH = ["batch", "length", WIDTH]


@pytest.fixture
def normalised(tmp_path: Path) -> Callable[[ModelProto], Graph]:
    def make(model: ModelProto) -> Graph:
        onnx.save(model, str(tmp_path / "model.onnx"))
        return load_normalised(tmp_path / "model.onnx")

    return make


def kinds(graph: Graph) -> list[str]:
    return [node.op_type for node in graph.nodes]


def test_identities_of_initializers_and_casts_to_the_same_type_go(normalised: Callable[[ModelProto], Graph]) -> None:
    builder = Builder()
    x = builder.input("x", BATCH, TensorProto.FLOAT)
    x = builder.op("MatMul", x, builder.op("Identity", builder.weight(WIDTH, WIDTH)))
    x = builder.op("Relu", builder.op("Cast", x, to=TensorProto.FLOAT))
    builder.output(x, "y", BATCH)
    graph = normalised(builder.model())
    assert kinds(graph) == ["MatMul", "Relu"]
    assert graph.nodes[-1].output[0] == "y"


def test_dead_nodes_and_unused_constants_go(normalised: Callable[[ModelProto], Graph]) -> None:
    builder = Builder()
    x = builder.input("x", BATCH, TensorProto.FLOAT)
    builder.op("MatMul", x, builder.weight(WIDTH, WIDTH))
    builder.output(builder.op("Relu", x), "y", BATCH)
    graph = normalised(builder.model())
    assert (kinds(graph), graph.constants) == (["Relu"], {})


def test_small_arithmetic_on_constants_is_done(normalised: Callable[[ModelProto], Graph]) -> None:
    builder = Builder()
    x = builder.input("x", BATCH, TensorProto.FLOAT)
    scale = builder.op("Sqrt", builder.op("Mul", builder.constant(8.0, np.float32), builder.constant(2.0, np.float32)))
    builder.output(builder.op("Div", x, scale), "y", BATCH)
    graph = normalised(builder.model())
    assert kinds(graph) == ["Div"]
    assert float(graph.constants[graph.nodes[0].input[1]].load()) == 4.0


def test_large_transposes_are_views_until_they_are_written(normalised: Callable[[ModelProto], Graph]) -> None:
    builder = Builder()
    x = builder.input("x", BATCH, TensorProto.FLOAT)
    weight = builder.weight(4 * SMALL_BYTES // 4 // WIDTH, WIDTH)
    builder.output(
        builder.op("MatMul", x, builder.op("Transpose", weight, perm=[1, 0])), "y", ["batch", "length", None]
    )
    graph = normalised(builder.model())
    folded = graph.constants[graph.nodes[0].input[1]]
    assert kinds(graph) == ["MatMul"]
    assert folded.shape[0] == WIDTH
    assert folded.load().base is not None


@pytest.mark.parametrize("kind", ["Cast", "DequantizeLinear"])
def test_compressed_weights_are_not_decompressed(kind: str, normalised: Callable[[ModelProto], Graph]) -> None:
    builder = Builder()
    x = builder.input("x", BATCH, TensorProto.FLOAT)
    values = builder.constant(builder.random.integers(-9, 9, (WIDTH, WIDTH)), np.int8)
    if kind == "Cast":
        weight = builder.op("Cast", values, to=TensorProto.FLOAT)
    else:
        weight = builder.op("DequantizeLinear", values, builder.constant(0.5, np.float32))
    builder.output(builder.op("MatMul", x, weight), "y", BATCH)
    graph = normalised(builder.model())
    assert kinds(graph) == [kind, "MatMul"]


def test_results_that_grow_large_are_not_kept(normalised: Callable[[ModelProto], Graph]) -> None:
    builder = Builder()
    x = builder.input("x", [512, 512], TensorProto.FLOAT)
    mask = builder.op("Expand", builder.constant([[1.0]], np.float32), builder.constant([512, 512]))
    builder.output(builder.op("Mul", x, mask), "y", [512, 512])
    assert kinds(normalised(builder.model())) == ["Expand", "Mul"]


def test_residual_norms_with_two_outputs_come_apart(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    state = builder.embed(builder.input("input_ids", ["batch", "length"]))
    normed = builder.norm(state)
    for _ in range(3):
        update = builder.op("Tanh", builder.op("MatMul", normed, builder.weight(WIDTH, WIDTH)))
        normed, state = builder.residual_norm(state, update)
    builder.output(builder.op("MatMul", normed, builder.weight(WIDTH, WIDTH)), "hidden", BATCH)
    sharded = shard(builder.model())
    assert sharded.blocks == 3
    inputs = sharded.inputs({"batch": 2, "length": 5})
    assert_same_answers(run(sharded.unsplit, inputs), sharded.run(inputs))


def test_cycles_and_tensors_from_nowhere_are_refused(tmp_path: Path) -> None:
    for inputs, match in ((("x", "b"), "cycle"), (("x", "nowhere"), "nothing makes")):
        nodes = [helper.make_node("Add", list(inputs), ["a"]), helper.make_node("Relu", ["a"], ["b"])]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "b")]
        onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:])), str(tmp_path / "model.onnx"))
        with pytest.raises(ExportError, match=match):
            load(tmp_path / "model.onnx")
