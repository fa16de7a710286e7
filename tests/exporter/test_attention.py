"""Caches that are copied to grow become caches that are written in place, or the graph stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from tests.exporter.conftest import Sharded, assert_same_answers
from tests.exporter.graphs import Builder, run

from pipeload_export.attention import write_in_place
from pipeload_export.fold import normalise
from pipeload_export.graph import Graph, tensor_proto
from pipeload_export.loading import load

DECODERS = ("gpt2", "gptj", "gptneo", "llama")
HEADS, SIZE = 4, 8
WIDTH = HEADS * SIZE
LOWEST = float(np.finfo(np.float32).min)


def _layer(**odd: Any) -> Builder:
    """One layer of attention over a cache, as exporters write it, with something odd about it."""
    build, groups = Builder(opset=odd.get("opset", 18)), odd.get("groups", HEADS)
    dtype = odd.get("dtype", TensorProto.FLOAT)
    past, total = "past_sequence_length", odd.get("total", "past_sequence_length + sequence_length")
    x = build.input("x", ["batch_size", "sequence_length", WIDTH], dtype)
    seen = build.input("attention_mask", ["batch_size", total])
    number = np.float16 if dtype == TensorProto.FLOAT16 else np.float32

    def heads(count: int) -> str:
        weight = build.constant(build.random.standard_normal((WIDTH, count * SIZE)) * 0.2, number)
        product = build.op("MatMul", x, weight)
        split = build.op("Reshape", product, build.constant([0, 0, count, SIZE], np.int64))
        return str(build.op("Transpose", split, perm=[0, 2, 1, 3]))

    def cached(name: str, new: str) -> str:
        held = build.input(f"past.{name}", ["batch_size", groups, past, SIZE], dtype)
        build.nodes.append(onnx.helper.make_node("Concat", [held, new], [f"present.{name}"], axis=odd.get("axis", 2)))
        shape = ["batch_size", groups, total, SIZE]
        build.outputs.append(onnx.helper.make_tensor_value_info(f"present.{name}", dtype, shape))
        return f"present.{name}"

    def repeated(name: str) -> str:
        if groups == HEADS:
            return name
        wide = build.op("Unsqueeze", name, build.constant([2], np.int64))
        ones = build.constant([1, 1, HEADS // groups, 1, 1], np.int64)
        return str(build.op("Reshape", build.op("Expand", wide, ones), build.constant([0, HEADS, -1, SIZE], np.int64)))

    queries = heads(HEADS)
    keys, values = cached("key", heads(groups)), cached("value", heads(groups))
    if odd.get("looked_at"):
        build.output(build.op("ReduceSum", keys, keepdims=0), "sum", [], dtype)
    turned = build.op("Transpose", repeated(keys), perm=[0, 1, 3, 2])
    if odd.get("scaled_keys"):
        turned = build.op("Mul", turned, build.constant(0.5, number))
    scores = build.op("MatMul", queries, turned)
    scores = build.op("Div", scores, build.constant(SIZE**0.5, number))
    if odd.get("wide_factor"):
        scores = build.op("Mul", scores, build.constant(np.ones((HEADS, 1, 1)) * 2, number))
    hidden = build.op("Unsqueeze", build.op("Cast", seen, to=TensorProto.BOOL), build.constant([1, 2], np.int64))
    least = build.constant(odd.get("least", LOWEST if dtype == TensorProto.FLOAT else -6e4), number)
    if odd.get("chosen"):
        scores = build.op("Where", hidden, scores, least)
    elif not odd.get("unmasked"):
        scores = build.op("Add", scores, build.op("Where", hidden, build.constant(0, number), least))
    weights = build.op("Softmax", scores, axis=-1)
    if odd.get("guarded"):
        weights = build.op("Where", build.op("IsNaN", weights), build.constant(0, number), weights)
    mixed = build.op("MatMul", weights, repeated(values))
    joined = build.op(
        "Reshape", build.op("Transpose", mixed, perm=[0, 2, 1, 3]), build.constant([0, 0, WIDTH], np.int64)
    )
    build.output(joined, "y", ["batch_size", "sequence_length", WIDTH], dtype)
    return build


def _graph(build: Builder, folder: Path) -> Graph:
    onnx.save(build.model(), folder / "model.onnx")
    return normalise(load(folder / "model.onnx"))


def _kinds(graph: Graph) -> list[str]:
    return [node.op_type for node in graph.nodes]


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"groups": 2},
        {"scaled_keys": True},
        {"chosen": True},
        {"guarded": True, "least": -np.inf},
        {"groups": 1, "scaled_keys": True, "chosen": True, "axis": -2},
    ],
    ids=str,
)
def test_a_layer_computes_the_same_in_place(odd: dict[str, Any], tmp_path: Path) -> None:
    build = _layer(**odd)
    graph = _graph(build, tmp_path)
    assert write_in_place(graph) == {"past.key": "present.key", "past.value": "present.value"}
    kinds = _kinds(graph)
    # Two are new: of the places that are written to, and of the mask.
    assert [kinds.count(kind) for kind in ("TensorScatter", "Attention", "Softmax", "Expand")] == [2, 1, 0, 2]
    random = np.random.default_rng(3)
    groups = odd.get("groups", HEADS)
    for batch, past, length, room in ((1, 0, 3, 0), (2, 5, 1, 0), (2, 4, 3, 6)):
        mask = np.ones((batch, past + length), np.int64)
        mask[-1, : (past + length) // 2] = batch == 1
        mask[:, -1] = 1
        held = {f"past.{n}": random.standard_normal((batch, groups, past, SIZE), np.float32) for n in ("key", "value")}
        inputs = {"x": random.standard_normal((batch, length, WIDTH), np.float32), "attention_mask": mask}
        wanted = run(build.model(), {**inputs, **held})
        larger = {n: np.zeros((batch, groups, past + length + room, SIZE), np.float32) for n in held}
        for name, array in held.items():
            larger[name][:, :, :past] = array
        found = run(_model_of(graph), {**inputs, **larger})
        for name in ("present.key", "present.value"):
            assert not found[name][:, :, past + length :].any()
            found[name] = found[name][:, :, : past + length]
        assert_same_answers(wanted, found)


def _model_of(graph: Graph) -> onnx.ModelProto:
    initializers = [tensor_proto(name, constant) for name, constant in graph.constants.items()]
    proto = onnx.helper.make_graph(graph.nodes, "g", graph.inputs, graph.outputs, initializers)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opsets.items()]
    return onnx.helper.make_model(proto, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(
    "odd",
    [
        {"looked_at": True},
        {"wide_factor": True},
        {"unmasked": True},
        {"total": "total_sequence_length"},
        {"dtype": TensorProto.FLOAT16},
        {"opset": 17, "reduced": True},
    ],
    ids=str,
)
def test_what_is_not_understood_stays_as_it_is(odd: dict[str, Any], tmp_path: Path) -> None:
    build = _layer(**odd)
    if odd.get("reduced"):
        # An operator that means something else in later versions of ONNX.
        build.output(build.op("ReduceMean", "y", axes=[-1]), "mean", ["batch_size", "sequence_length", 1])
    graph = _graph(build, tmp_path)
    before = [node.SerializeToString() for node in graph.nodes]
    assert write_in_place(graph) == {}
    assert [node.SerializeToString() for node in graph.nodes] == before
    assert graph.opsets[""] == odd.get("opset", 18)


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_writes_its_caches_in_place(
    name: str, sharded_architecture: Callable[[str], Sharded], architecture: Callable[[str], Path]
) -> None:
    sharded = sharded_architecture(name)
    assert sharded.manifest.caches
    assert all(cache.in_place for cache in sharded.manifest.caches)
    for shard in sharded.manifest.shards:
        if shard.role == "block":
            graph = onnx.load(sharded.directory / shard.graph.path, load_external_data=False).graph
            kinds = [node.op_type for node in graph.node]
            assert (kinds.count("TensorScatter"), kinds.count("Attention"), kinds.count("Softmax")) == (2, 1, 0)
    # What a caller passes and gets has the shapes of the unsplit graph.
    unsplit = onnx.load(architecture(name), load_external_data=False).graph
    declared = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in unsplit.input}
    assert {spec.name: list(spec.shape) for spec in sharded.manifest.inputs} == declared
