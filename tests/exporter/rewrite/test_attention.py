"""Caches that are copied to grow become caches that are written in place, or the graph stays as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from tests.exporter.conftest import Sharded, assert_same_answers
from tests.exporter.graphs import run
from tests.exporter.layers import HEADS, SIZE, WIDTH, attention_layer, graph_of, model_of

from pipeload_export import export
from pipeload_export.graph.graph import Graph
from pipeload_export.rewrite.in_place import write_in_place

DECODERS = ("bloom", "gpt2", "gptj", "gptneo", "llama")
_SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 1000}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 128}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "CodeGen": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 1000, "rotary_dim": 8, "n_positions": 256},
    "Cohere": _GROUPED,
    "Glm": {**_GROUPED, "head_dim": 16, "pad_token_id": 0},
    "Helium": {**_GROUPED, "head_dim": 16},
    "Mpt": {"d_model": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 1000, "max_seq_len": 256},
    "Qwen3Moe": {**_GROUPED, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
}


HALF: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "half": {"dtype": TensorProto.FLOAT16},
    "half with float32 inside": {"dtype": TensorProto.FLOAT16, "wide_scores": True},
    "half inside": {"dtype": TensorProto.FLOAT16, "wide_ends": True},
}
"""How much of a graph is fp16."""


def _kinds(graph: Graph) -> list[str]:
    return [node.op_type for node in graph.nodes]


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"groups": 2},
        {"scaled_keys": True},
        {"chosen": True},
        {"chosen": True, "least": -1e4},
        {"least": -1e4},
        {"guarded": True, "least": -np.inf},
        {"shut_out": True},
        {"scaled_last": True},
        {"shut_out": True, "scaled_last": True},
        {"groups": 1, "scaled_keys": True, "chosen": True, "axis": -2},
        {"flat": True},
        {"flat": True, "scaled_keys": True, "groups": 2},
        {"flat": True, "guarded": True, "least": -np.inf},
        {"flat": True, "groups": 2, "total_of_repeated": True},
    ],
    ids=str,
)
def test_a_layer_computes_the_same_in_place(odd: dict[str, Any], kind: str, tmp_path: Path) -> None:
    build = attention_layer(**odd, **HALF[kind])
    graph = graph_of(build, tmp_path)
    assert write_in_place(graph) == {"past.key": "present.key", "past.value": "present.value"}
    kinds = _kinds(graph)
    # Two are new: of the places that are written to, and of the mask.
    assert [kinds.count(kind) for kind in ("TensorScatter", "Attention", "Softmax", "Expand")] == [2, 1, 0, 2]
    random = np.random.default_rng(3)
    groups = odd.get("groups", HEADS)
    dtype = np.float16 if HALF[kind] and "wide_ends" not in HALF[kind] else np.float32

    def numbers(*shape: int) -> NDArray[Any]:
        # Caches hold what the model has put there.
        return random.standard_normal(shape).astype(np.float16 if HALF[kind] else np.float32).astype(dtype)

    for batch, past, length, room in ((1, 0, 3, 0), (2, 5, 1, 0), (3, 4, 3, 6)):
        mask = np.ones((batch, past + length), np.int64)
        mask[-1, : (past + length) // 2] = batch == 1
        mask[:, -1] = 1
        # One text hides all that there is.
        mask[1:2] = batch < 3
        held = {f"past.{n}": numbers(batch, groups, past, SIZE) for n in ("key", "value")}
        inputs = {"x": numbers(batch, length, WIDTH), "attention_mask": mask}
        wanted = run(build.model(), {**inputs, **held})
        larger = {n: np.zeros((batch, groups, past + length + room, SIZE), dtype) for n in held}
        for name, array in held.items():
            larger[name][:, :, :past] = array
        found = run(model_of(graph), {**inputs, **larger})
        for name in ("present.key", "present.value"):
            assert not found[name][:, :, past + length :].any()
            found[name] = found[name][:, :, : past + length]
        assert_same_answers(wanted, found, 1e-3 if HALF[kind] else 1e-5)


@pytest.mark.parametrize(
    "odd",
    [
        {"looked_at": True},
        {"wide_factor": True},
        {"unmasked": True},
        {"total": "total_sequence_length"},
        {"unmasked": True, "scaled_last": True},
        {"past_looked_at": True},
        {"flat": True, "flat_size": 2 * SIZE},
        {"dtype": TensorProto.DOUBLE},
        # A number in the place of the scores that would not swallow them, and something added to it.
        {"chosen": True, "least": -1e4, "shifted": True},
        {"chosen": True, "least": -10.0},
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


@pytest.mark.parametrize(("opset", "wanted"), [(17, 0), (18, 2)])
def test_operators_that_only_took_more_types_since_are_no_obstacle(opset: int, wanted: int, tmp_path: Path) -> None:
    build = attention_layer(opset=opset)
    axes = {"axes": [-1]} if opset < 18 else {}
    peak = build.op("ReduceMax", "y", *([] if axes else [build.constant([-1])]), **axes)
    build.output(peak, "peak", ["batch_size", "sequence_length", 1])
    best, _ = build.op("TopK", "y", build.constant([2]), count=2)
    build.output(best, "best", ["batch_size", "sequence_length", 2])
    graph = graph_of(build, tmp_path)
    assert len(write_in_place(graph)) == wanted
    if wanted:
        random = np.random.default_rng(3)
        held = {f"past.{n}": np.zeros((2, HEADS, 3, SIZE), np.float32) for n in ("key", "value")}
        inputs = {"x": random.standard_normal((2, 3, WIDTH), np.float32), "attention_mask": np.ones((2, 3), np.int64)}
        empty = {name: array[:, :, :0] for name, array in held.items()}
        assert_same_answers(run(build.model(), inputs | empty), run(model_of(graph), inputs | held))


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


@pytest.mark.survey
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_with_other_masks_and_operators_do_too(family: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    getattr(transformers, f"{family}ForCausalLM")(config).eval().save_pretrained(tmp_path / "checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Verified as well: the shards' answers are those of the unsplit graph.
        manifest = export(tmp_path / "checkpoint", tmp_path / "target", task="text-generation", kv_cache="int8")
    assert manifest.caches
    assert all(cache.in_place for cache in manifest.caches)
