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
from tests.exporter.graphs import run
from tests.exporter.layers import HEADS, SIZE, WIDTH, attention_layer, graph_of, model_of

from pipeload_export.graph.graph import Graph
from pipeload_export.rewrite.in_place import write_in_place

DECODERS = ("gpt2", "gptj", "gptneo", "llama")


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
    build = attention_layer(**odd)
    graph = graph_of(build, tmp_path)
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
        found = run(model_of(graph), {**inputs, **larger})
        for name in ("present.key", "present.value"):
            assert not found[name][:, :, past + length :].any()
            found[name] = found[name][:, :, : past + length]
        assert_same_answers(wanted, found)


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
    build = attention_layer(**odd)
    if odd.get("reduced"):
        # An operator that means something else in later versions of ONNX.
        build.output(build.op("ReduceMean", "y", axes=[-1]), "mean", ["batch_size", "sequence_length", 1])
    graph = graph_of(build, tmp_path)
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
    # Arrays that a caller passes and gets have the shapes of the unsplit graph.
    unsplit = onnx.load(architecture(name), load_external_data=False).graph
    declared = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in unsplit.input}
    assert {spec.name: list(spec.shape) for spec in sharded.manifest.inputs} == declared
