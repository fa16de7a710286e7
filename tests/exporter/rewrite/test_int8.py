"""Caches in place become int8 with a scale for each token and head, or the export is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from tests.exporter.conftest import Sharded
from tests.exporter.graphs import run
from tests.exporter.layers import HEADS, SIZE, WIDTH, attention_layer, graph_of, model_of
from tests.exporter.models import write_onnx
from tests.marks import slow

from pipeload.errors import ConfigError, ExportError
from pipeload.format.manifest import write
from pipeload.planning.needs import cache_bytes
from pipeload_export import export, verify
from pipeload_export.check.merge import merge
from pipeload_export.rewrite.in_place import write_in_place
from pipeload_export.rewrite.int8 import quantise_caches
from pipeload_export.shard.trial import agree

DECODERS = ("bloom", "gpt2", "gptj", "gptneo", slow("llama"))
CACHES = ("key", "value")


def _int8_layer(folder: Path, **odd: Any) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A layer as it was, and with caches of int8."""
    build = attention_layer(**odd)
    graph = graph_of(build, folder)
    scales = quantise_caches(graph, write_in_place(graph))
    assert scales == {f"past.{name}": (f"past.{name}.scale", f"present.{name}.scale") for name in CACHES}
    return build.model(), model_of(graph)


def _with_room(array: NDArray[Any], tokens: int) -> NDArray[Any]:
    return np.pad(array, [(0, 0), (0, 0), (0, tokens), (0, 0)])


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"groups": 2},
        {"guarded": True, "least": -np.inf},
        {"flat": True},
        {"dtype": TensorProto.FLOAT16},
        {"dtype": TensorProto.FLOAT16, "groups": 2, "wide_ends": True},
    ],
    ids=str,
)
def test_a_layer_computes_the_same_but_for_the_rounding(odd: dict[str, Any], tmp_path: Path) -> None:
    plain, rounded = _int8_layer(tmp_path, **odd)
    random = np.random.default_rng(3)
    x_type = np.float16 if "dtype" in odd and not odd.get("wide_ends") else np.float32
    # Of what a graph of fp16 computes, in parts of its size.
    rounding = 2e-3 if "dtype" in odd else 1e-5
    for batch, past, length, room in ((1, 0, 3, 0), (2, 5, 1, 0), (2, 4, 3, 6)):
        shape = (batch, odd.get("groups", HEADS), past)
        mask = np.ones((batch, past + length), np.int64)
        mask[-1, : (past + length) // 2] = batch == 1
        mask[:, -1] = 1
        x = random.standard_normal((batch, length, WIDTH), np.float32).astype(x_type)
        inputs = {"x": x, "attention_mask": mask}
        held, floats = dict[str, Any](), dict[str, Any]()
        for name in CACHES:
            values = random.integers(-127, 128, (*shape, SIZE)).astype(np.int8)
            scale = random.uniform(0.005, 0.02, (*shape, 1)).astype(np.float32)
            held |= {f"past.{name}": values, f"past.{name}.scale": scale}
            floats[f"past.{name}"] = (values * scale).astype(x_type)
        wanted = run(plain, {**inputs, **floats})
        found = run(rounded, {**inputs, **{name: _with_room(array, length + room) for name, array in held.items()}})
        for name in CACHES:
            values, scale = found[f"present.{name}"], found[f"present.{name}.scale"]
            assert (values.dtype, scale.dtype) == (np.int8, np.float32)
            for array, before in ((values, held[f"past.{name}"]), (scale, held[f"past.{name}.scale"])):
                np.testing.assert_array_equal(array[:, :, :past], before, err_msg="is never rounded again")
                assert not array[:, :, past + length :].any()
            new = wanted[f"present.{name}"][:, :, past:].astype(np.float32)
            peak = np.abs(new).max(axis=-1, keepdims=True)
            here = slice(past, past + length)
            np.testing.assert_allclose(scale[:, :, here], peak / 127, rtol=rounding)
            assert (np.abs(values[:, :, here] * scale[:, :, here] - new) <= peak * (0.501 / 127 + rounding)).all()
        # Each value is off by 1 / 254 of its head's largest at most, and a mean of them by less.
        assert np.abs(found["y"] - wanted["y"]).max() <= np.ptp(wanted["y"]) / 127


def test_a_text_in_pieces_has_the_answers_of_the_whole(tmp_path: Path) -> None:
    _, rounded = _int8_layer(tmp_path)
    x = np.random.default_rng(4).standard_normal((2, 9, WIDTH), np.float32)
    caches = {f"past.{name}": np.zeros((2, HEADS, 9, SIZE), np.int8) for name in CACHES}
    caches |= {f"past.{name}.scale": np.zeros((2, HEADS, 9, 1), np.float32) for name in CACHES}

    def answer(pieces: list[tuple[int, int]]) -> list[NDArray[Any]]:
        held, answers = dict(caches), list[NDArray[Any]]()
        for begin, end in pieces:
            mask = np.ones((2, end), np.int64)
            made = run(rounded, {"x": x[:, begin:end], "attention_mask": mask, **held})
            held = {name: made[name.replace("past", "present")] for name in held}
            answers.append(made["y"])
        return [answers[-1][:, -1], *held.values()]

    whole = answer([(0, 9)])
    assert whole[1].any()
    for pieces in ([(0, 4), (4, 9)], [(place, place + 1) for place in range(9)]):
        assert agree([whole], [answer(pieces)])


def test_heads_of_zeros_stay_zeros(tmp_path: Path) -> None:
    _, rounded = _int8_layer(tmp_path)
    held = {f"past.{name}": np.zeros((1, HEADS, 2, SIZE), np.int8) for name in CACHES}
    held |= {f"past.{name}.scale": np.zeros((1, HEADS, 2, 1), np.float32) for name in CACHES}
    made = run(rounded, {"x": np.zeros((1, 2, WIDTH), np.float32), "attention_mask": np.ones((1, 2), np.int64), **held})
    assert not made["y"].any()
    for name in CACHES:
        assert not made[f"present.{name}"].any()
        assert (made[f"present.{name}.scale"] > 0).all()


@pytest.mark.parametrize("odd", [{"looked_at": True}, {"dtype": TensorProto.DOUBLE}], ids=str)
def test_caches_that_are_not_written_in_place_are_refused(odd: dict[str, Any], tmp_path: Path) -> None:
    graph = graph_of(attention_layer(**odd), tmp_path)
    with pytest.raises(
        ExportError, match=r"no KV caches that could be int8.*Export it with the KV caches of the model"
    ):
        quantise_caches(graph, write_in_place(graph))


def test_a_model_without_caches_is_refused(tmp_path: Path) -> None:
    source = write_onnx(tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="no KV caches that could be int8"):
        export(source, tmp_path / "target", kv_cache="int8")
    assert not (tmp_path / "target").exists()
    wrong: Any = "int4"
    with pytest.raises(ConfigError, match="cannot be 'int4'; take one of model, int8"):
        export(source, tmp_path / "target", kv_cache=wrong)


@pytest.fixture(scope="module", params=DECODERS)
def both(
    request: pytest.FixtureRequest,
    architecture: Callable[[str], Path],
    sharded_architecture: Callable[[str], Sharded],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Sharded, Sharded]:
    """A decoder with its own caches, and with caches of int8."""
    folder = tmp_path_factory.mktemp("int8") / request.param
    return sharded_architecture(request.param), Sharded(architecture(request.param), folder, int8_caches=True)


def test_every_decoder_has_caches_of_int8(both: tuple[Sharded, Sharded]) -> None:
    plain, rounded = (sharded.manifest for sharded in both)
    assert len(rounded.caches) == 2 * len(plain.caches)
    assert all(cache.in_place for cache in rounded.caches)
    inputs = {spec.name: spec for spec in rounded.inputs}
    for cache in plain.caches:
        spec = next(spec for spec in plain.inputs if spec.name == cache.input)
        (found,) = (one for one in rounded.caches if one.input == cache.input)
        assert found.output == cache.output
        assert inputs[cache.input] == replace(spec, dtype="int8")
        assert found.scale is not None
        assert inputs[found.scale] == replace(spec, name=found.scale, shape=(*spec.shape[:-1], 1))
    for shard in rounded.shards:
        if shard.role == "block":
            graph = onnx.load(both[1].directory / shard.graph.path, load_external_data=False).graph
            kinds = [node.op_type for node in graph.node]
            counted = ("TensorScatter", "QuantizeLinear", "DequantizeLinear", "Attention")
            assert [kinds.count(kind) for kind in counted] == [4, 2, 2, 1]


def test_their_bytes_are_those_of_int8_and_a_scale(both: tuple[Sharded, Sharded]) -> None:
    plain, rounded = (sharded.manifest for sharded in both)
    dims = dict.fromkeys(plain.dims, 7)
    size = int(plain.outputs[1].shape[-1])
    assert cache_bytes(rounded, dims) * 4 * size == cache_bytes(plain, dims) * (size + 4)
    # Attention reads floats, for the time of one block.
    few, many = ({**dims, "sequence_length": 1, "past_sequence_length": past} for past in (1000, 2000))
    block = next(shard.structure for shard in rounded.shards if shard.role == "block")
    grown = rounded.structures[block].activation_bytes(many) - rounded.structures[block].activation_bytes(few)
    _, heads, _, size = (int(dim) if isinstance(dim, int) else 0 for dim in plain.outputs[1].shape)
    assert grown >= 2 * 1000 * dims["batch_size"] * heads * size * (4 + 1)


def test_answers_are_close_and_the_check_says_how_close(both: tuple[Sharded, Sharded]) -> None:
    _, rounded = both
    report = verify(rounded.directory, rounded.unsplit)
    assert report.checks[-1].endswith("but for the rounding of its int8 caches")
    assert {result.output for result in report.differences} == {spec.name for spec in both[0].manifest.outputs}
    for result in report.differences:
        # Three or four layers, each with values that are off by up to 1 / 254 of the largest: 0.004 was seen.
        assert 0 < result.max_rel_error < 0.01 < result.limit == 0.1


def test_merged_shards_compute_what_the_chain_computes(both: tuple[Sharded, Sharded], tmp_path: Path) -> None:
    _, rounded = both
    graph = merge(rounded.directory, tmp_path / "merged.onnx")
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(rounded.directory))
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    inputs = rounded.inputs({"batch_size": 2, "sequence_length": 7, "past_sequence_length": 5})
    wanted = rounded.run(inputs)
    assert agree([list(wanted.values())], [session.run(list(wanted), inputs)])


def test_scales_of_another_cache_are_found(both: tuple[Sharded, Sharded], tmp_path: Path) -> None:
    _, rounded = both
    directory = tmp_path / "swapped"
    shutil.copytree(rounded.directory, directory)
    caches = {cache.input: cache for cache in rounded.manifest.caches}
    one, two = [name for name, cache in caches.items() if cache.scale is None][:2]
    swapped = {
        one: replace(caches[one], output=caches[two].output),
        two: replace(caches[two], output=caches[one].output),
    }
    write(replace(rounded.manifest, caches=tuple((caches | swapped).values())), directory)
    with pytest.raises(ExportError, match="and the manifest pairs it with"):
        verify(directory, rounded.unsplit)
