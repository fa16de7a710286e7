"""The chain of shards computes the outputs of the unsplit graph, and every shard is a proper model of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.digests import expected_record
from tests.exporter.conftest import ARCHITECTURES, Sharded, assert_same_answers
from tests.exporter.graphs import (
    ROWS,
    WIDTH,
    Builder,
    backwards,
    encoder,
    grouped_decoder,
    renamed,
    reordered,
    run,
    with_hidden_states,
)

from pipeload.errors import ExportError
from pipeload.format.manifest import PAGE_BYTES, evaluate_dim
from pipeload.format.stages import cut_places
from pipeload_export.check.cases import sample_cases
from pipeload_export.split import split
from pipeload_export.write import narrow

DECODERS = {"gpt2", "gptj", "gptneo", "llama"}
SIZES = ({"batch": 1, "length": 1}, {"batch": 2, "length": 7}, {"batch": 3, "length": 12})


@pytest.fixture(params=ARCHITECTURES)
def sharded(request: pytest.FixtureRequest, sharded_architecture: Callable[[str], Sharded]) -> Sharded:
    return sharded_architecture(request.param)


def answers_agree(sharded: Sharded, *sizes: dict[str, int]) -> None:
    for dims in sizes or SIZES:
        inputs = sharded.inputs(dims)
        assert_same_answers(run(sharded.unsplit, inputs), sharded.run(inputs))


def test_every_architecture_gives_the_same_answers(sharded: Sharded) -> None:
    (sharded.directory / "config.json").write_text('{"image_size": 32}')
    for case in sample_cases(sharded.manifest, sharded.directory):
        assert_same_answers(run(sharded.unsplit, case.inputs), sharded.run(case.inputs))


def test_every_shard_is_valid_onnx(sharded: Sharded) -> None:
    for item in sharded.model.shards:
        path = sharded.directory / item.graph.path
        onnx.checker.check_model(str(path))
        graph = onnx.load(str(path), load_external_data=False).graph
        assert tuple(value.name for value in graph.input) == item.inputs
        assert tuple(value.name for value in graph.output) == item.outputs


def test_layers_share_one_structure(sharded: Sharded) -> None:
    assert len({item.structure for item in sharded.model.shards if item.role == "block"}) == 1


def test_no_shard_is_much_larger_than_a_block(sharded: Sharded) -> None:
    block = max(item.nbytes for item in sharded.model.shards if item.role == "block")
    assert all(item.nbytes <= 1.1 * block for item in sharded.model.shards)


def test_files_are_what_the_records_say(sharded: Sharded) -> None:
    on_disk = {f"shards/{path.name}" for path in (sharded.directory / "shards").iterdir()}
    assert {record.path for record in sharded.model.files} == on_disk
    for record in sharded.model.files:
        apart = record.path.endswith(".safetensors")
        assert record == expected_record(sharded.directory, record.path, sharded.model.shards, apart=apart)
    for item in sharded.model.shards:
        if item.weights:
            data = (sharded.directory / item.weights.path).read_bytes()
            part = data[item.weights.offset : item.weights.offset + item.weights.nbytes]
            assert hashlib.sha256(part).hexdigest() == item.weights.sha256


def test_edges_have_the_shapes_that_are_said(sharded: Sharded) -> None:
    (sharded.directory / "config.json").write_text('{"image_size": 32}')
    case = sample_cases(sharded.manifest, sharded.directory)[-1]
    dims: dict[str, int] = {}
    for spec in sharded.model.inputs:
        dims.update((d, n) for d, n in zip(spec.shape, case.inputs[spec.name].shape, strict=True) if isinstance(d, str))
    specs = {spec.name: spec for spec in sharded.model.edges}
    outputs = run(sharded.unsplit, case.inputs)
    for spec in sharded.model.outputs:
        assert tuple(evaluate_dim(dim, dims) for dim in spec.shape) == outputs[spec.name].shape
    activations = [name for item in sharded.model.shards if item.role == "block" for name in item.inputs[:1]]
    assert all(specs[name].dtype == "float32" and len(specs[name].shape) == 3 for name in activations)


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_caches_are_paired_in_their_order(name: str, sharded_architecture: Callable[[str], Sharded]) -> None:
    caches = sharded_architecture(name).model.caches
    assert len(caches) == (8 if name == "gptneo" else 6)
    for cache in caches:
        assert cache.output == cache.input.replace("past_key_values", "present")


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_stage_can_begin_at_every_block_but_the_first(
    name: str, sharded_architecture: Callable[[str], Sharded]
) -> None:
    """No shard before the blocks takes the caches of all of them for their lengths."""
    manifest = sharded_architecture(name).manifest
    blocks = [place for place, shard in enumerate(manifest.shards) if shard.role == "block"]
    assert set(blocks[1:]) <= set(cut_places(manifest))


@pytest.mark.parametrize("name", ["bert-masked", "gpt2", "gptneo", "llama"])
def test_tied_weights_are_stored_once(name: str, sharded_architecture: Callable[[str], Sharded]) -> None:
    model = sharded_architecture(name).model
    heads = [item for item in model.shards if item.role == "head"]
    assert len(heads) > 1
    tables = {lookup.table.name: lookup.path for item in model.shards for lookup in item.lookups}
    assert {item.weights.path for item in heads if item.weights} <= set(tables.values())
    assert not any(record.path.endswith("head.safetensors") for record in model.files)


@pytest.mark.slow
def test_an_untied_head_has_a_file_of_its_own(sharded_architecture: Callable[[str], Sharded]) -> None:
    model = sharded_architecture("gptj").model
    heads = [item for item in model.shards if item.role == "head"]
    assert {item.weights.path for item in heads if item.weights} == {"shards/head.safetensors"}
    assert sum(item.nbytes for item in heads) == 1000 * 64 * 4


def test_slices_of_a_head_begin_at_pages_and_take_one_input(sharded_architecture: Callable[[str], Sharded]) -> None:
    model = sharded_architecture("gpt2").model
    assert model.head is not None
    for item in model.shards:
        if item.role == "head":
            assert item.inputs == (model.head.input,)
            assert item.weights is not None
            assert item.weights.offset % PAGE_BYTES == 0


def test_large_tables_are_not_loaded(sharded: Sharded) -> None:
    for item in sharded.model.shards:
        for lookup in item.lookups:
            assert lookup.output in item.inputs
            assert lookup.table.name not in {tensor.name for tensor in item.tensors}


@pytest.mark.parametrize("change", [renamed, reordered, backwards])
def test_a_changed_but_equal_model_gives_the_same_answers(change: Any, shard: Callable[..., Sharded]) -> None:
    sharded = shard(change(encoder().model()))
    assert sharded.names == ["prologue", "block.000", "block.001", "block.002", "epilogue"]
    answers_agree(sharded)


def test_weights_in_external_files_at_odd_offsets(tmp_path: Path, shard: Callable[..., Sharded]) -> None:
    model = encoder().model()
    data = bytearray(b"odd")
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        if tensor.data_type != TensorProto.FLOAT:
            continue  # onnxruntime wants shapes inside the graph
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights.bin"), ("offset", str(len(data))), ("length", str(len(raw)))):
            tensor.external_data.add(key=key, value=value)
        data += raw + b"!"
    (tmp_path / "weights.bin").write_bytes(data)
    answers_agree(shard(model))


def test_a_missing_or_short_weights_file_is_named(tmp_path: Path) -> None:
    model = encoder().model()
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=64)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ExportError, match=r"weights\.bin ends at byte"):
        split(path, tmp_path)
    weights.unlink()
    with pytest.raises(ExportError, match=r"weights\.bin is missing"):
        split(path, tmp_path)


def test_no_onnx_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"this is no protobuf")
    with pytest.raises(ExportError, match="no ONNX"):
        split(path, tmp_path)


def test_a_model_without_blocks_stays_whole_on_demand(shard: Callable[..., Sharded]) -> None:
    model = encoder(1).model()
    with pytest.raises(ExportError, match="--whole"):
        shard(model)
    sharded = shard(model, "whole", whole=True)
    assert sharded.names == ["block.000"]
    assert len(sharded.model.shards[0].lookups) == 1
    answers_agree(sharded)


def test_a_heavy_stem_and_tail_are_cut_as_well(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))

    def chain(x: str, kind: str) -> str:
        for number in range(6):
            sizes = (WIDTH, WIDTH * (number + 2)) if number % 2 == 0 else (WIDTH * (number + 1), WIDTH)
            x = builder.op(kind, builder.op("MatMul", x, builder.weight(*sizes)))
        return x

    x = chain(x, "Tanh")
    for _ in range(3):
        x = builder.layer(x)
    builder.output(chain(x, "Sigmoid"), "hidden", ["batch", "length", WIDTH])
    sharded = shard(builder.model())
    assert {"prologue.000", "prologue.001", "epilogue.000", "epilogue.001"} <= set(sharded.names)
    block = max(item.nbytes for item in sharded.model.shards if item.role == "block")
    assert max(item.nbytes for item in sharded.model.shards) <= 1.1 * block
    answers_agree(sharded)


def test_hidden_states_leave_from_the_blocks_that_make_them(shard: Callable[..., Sharded]) -> None:
    sharded = shard(with_hidden_states(4).model())
    for number in range(4):
        block = next(item for item in sharded.model.shards if item.name == f"block.{number:03d}")
        assert f"hidden.{number}" in block.outputs
    answers_agree(sharded)


def test_branches_that_use_tensors_around_them(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    ids = builder.input("input_ids", ["batch", "length"])
    length = builder.op("Gather", builder.op("Shape", ids), builder.constant(1))
    condition = builder.op("Greater", length, builder.constant(5))
    x = builder.embed(ids)
    for _ in range(3):
        x = builder.layer(x)
        branches = {}
        for branch, kind in (("then_branch", "Tanh"), ("else_branch", "Neg")):
            node = helper.make_node(kind, [x], [f"{x}.{branch}"])
            value = helper.make_tensor_value_info(f"{x}.{branch}", TensorProto.FLOAT, None)
            branches[branch] = helper.make_graph([node], branch, [], [value])
        x = builder.op("If", condition, **branches)
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    sharded = shard(builder.model())
    assert sharded.blocks == 3
    answers_agree(sharded)


def test_scales_that_onnxruntime_reads_at_once_stay_in_the_graph(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    for _ in range(3):
        x = builder.layer(builder.op("Resize", x, "", builder.constant([1, 2, 1], np.float32), mode="nearest"))
    builder.output(x, "hidden", ["batch", "longer", WIDTH])
    sharded = shard(builder.model())
    assert sharded.blocks == 3
    answers_agree(sharded)


def test_a_length_that_is_the_sum_of_two_others_is_discovered(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    ids = builder.input("input_ids", ["batch", "length"])
    bias = builder.mask_bias(builder.input("attention_mask", ["batch", "total"]))
    x, presents = builder.embed(ids), []
    for number in range(3):
        past = builder.input(f"before.{number}", ["batch", "past", WIDTH], TensorProto.FLOAT)
        update, present = builder.attention(x, bias=bias, past=past)
        x = builder.op("Add", x, update)
        x = builder.op("Add", x, builder.feed_forward(x))
        presents.append(present)
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    for number, present in enumerate(presents):
        builder.output(present, f"after.{number}", ["batch", "total", WIDTH])
    sharded = shard(builder.model())
    assert [(cache.input, cache.output) for cache in sharded.model.caches] == [
        (f"before.{number}", f"after.{number}") for number in range(3)
    ]
    assert {spec.name: spec.shape[1] for spec in sharded.model.inputs}["attention_mask"] == "length + past"
    assert "total" not in sharded.model.dims
    answers_agree(
        sharded, {"batch": 2, "length": 3, "past": 4, "total": 7}, {"batch": 1, "length": 1, "past": 0, "total": 1}
    )


@pytest.mark.slow
def test_a_kernel_that_refuses_most_sizes_is_run_at_the_others(shard: Callable[..., Sharded]) -> None:
    sharded = shard(grouped_decoder().model())
    block = next(item for item in sharded.model.shards if item.role == "block")
    structure = sharded.model.structures[block.structure]
    dims = {"batch": 4, "length": 1, "past": 999, "total": 1000}
    presents = 2 * 4 * 1000 * 16 * 4
    assert presents < structure.activation_bytes(dims) < 10 * presents
    assert len(sharded.model.caches) == 6
    answers_agree(sharded, {"batch": 1, "length": 4, "past": 0, "total": 4})
    answers_agree(sharded, {"batch": 2, "length": 1, "past": 5, "total": 6})


@pytest.mark.parametrize("per_row", [True, False])
def test_a_quantised_table_is_read_by_row(per_row: bool, shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    ids = builder.input("input_ids", ["batch", "length"])
    table = builder.constant(builder.random.integers(-128, 128, (4 * ROWS, WIDTH)), np.int8)
    shape = (4 * ROWS,) if per_row else ()
    scale = builder.constant(builder.random.random(shape) / 100, np.float32)
    zero = builder.constant(builder.random.integers(-5, 5, shape), np.int8)
    x = builder.op("Gather", builder.op("DequantizeLinear", table, scale, zero, axis=0), ids)
    for _ in range(3):
        x = builder.layer(x)
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    sharded = shard(builder.model())
    lookups = sharded.model.shards[0].lookups
    assert len(lookups) == (3 if per_row else 1)
    assert lookups[0].table.dtype == "int8"
    answers_agree(sharded)


@pytest.mark.parametrize("packed", [True, False])
def test_a_table_of_four_bits_is_read_by_its_own_operator(packed: bool, shard: Callable[..., Sharded]) -> None:
    """As onnxruntime's 4-bit decoders have it: two numbers in a byte, or numbers of ONNX's own type."""
    builder = Builder(opset=21)
    ids = builder.input("input_ids", ["batch", "length"])
    values = builder.random.integers(0, 256, (4 * ROWS, WIDTH // 2))
    if packed:
        table = builder.constant(values, np.uint8)
    else:
        numbers = np.stack([values & 15, values >> 4], axis=-1).ravel()
        table = "table"
        builder.initializers.append(helper.make_tensor(table, TensorProto.UINT4, [4 * ROWS, WIDTH], numbers.tolist()))
    scales = builder.constant(builder.random.random((4 * ROWS, WIDTH // 16)) / 100, np.float32)
    options = {"gather_axis": 0, "quantize_axis": 1, "block_size": 16} | ({"bits": 4} if packed else {})
    x = builder.op("GatherBlockQuantized", table, ids, scales, domain="com.microsoft", **options)
    for _ in range(3):
        x = builder.layer(x)
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    sharded = shard(builder.model())
    assert sharded.blocks == 3
    answers_agree(sharded)


def test_compressed_weights_stay_compressed(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    for _ in range(3):
        values = builder.constant(builder.random.integers(-128, 128, (WIDTH, WIDTH)), np.int8)
        scale = builder.constant(builder.random.random((1, WIDTH)) / 100, np.float32)
        weight = builder.op("Mul", builder.op("Cast", values, to=TensorProto.FLOAT), scale)
        x = builder.op("Add", x, builder.op("MatMul", builder.norm(x), weight))
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    sharded = shard(builder.model())
    blocks = [item for item in sharded.model.shards if item.role == "block"]
    assert len(blocks) == 3
    assert all(item.nbytes < 1.5 * WIDTH * WIDTH for item in blocks)
    answers_agree(sharded)


def test_a_gemm_head_with_a_bias_is_cut(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    table = builder.weight(ROWS, WIDTH)
    x = builder.op("Gather", table, builder.input("input_ids", ["batch", "length"]))
    for _ in range(3):
        x = builder.layer(x)
    flat = builder.op("Reshape", x, builder.constant([-1, WIDTH]))
    builder.output(builder.op("Gemm", flat, table, builder.weight(ROWS), transB=1), "logits", [None, ROWS])
    sharded = shard(builder.model())
    assert sharded.model.head is not None
    assert sharded.model.outputs[0].shape == ()
    answers_agree(sharded)


def test_static_shapes_and_dimensions_without_names(shard: Callable[..., Sharded]) -> None:
    for name, dims, shape in (("static", {}, [2, 5]), ("unnamed", {"input_ids.0": 3, "input_ids.1": 4}, [None, None])):
        builder = Builder()
        x = builder.embed(builder.input("input_ids", shape))
        for _ in range(3):
            x = builder.layer(x)
        builder.output(x, "hidden", [*shape, WIDTH])
        answers_agree(shard(builder.model(), name), dims)


def test_progress_ends_at_the_total(shard: Callable[..., Sharded]) -> None:
    seen: list[tuple[str, int, int]] = []
    shard(encoder().model(), progress=lambda *what: seen.append(what))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2]


@pytest.mark.parametrize("exact", [False, True], ids=["32 bits", "16 bits"])
def test_the_total_is_known_from_the_first_file_on(
    exact: bool, shard: Callable[..., Sharded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "LEAST_BYTES", 0)
    model = encoder(8).model()
    for proto in model.graph.initializer if exact else ():
        array = numpy_helper.to_array(proto)
        if array.dtype == np.float32:
            proto.CopyFrom(numpy_helper.from_array(array.astype(ml_dtypes.bfloat16).astype(np.float32), proto.name))
    seen: list[tuple[str, int, int]] = []
    shard(model, progress=lambda *what: seen.append(what))
    assert max(total for _, _, total in seen) < 1.2 * seen[-1][2]
    assert min(total for _, _, total in seen) > 0.8 * seen[-1][2]


def test_a_model_that_draws_random_numbers_is_refused(tmp_path: Path) -> None:
    """Its answers cannot be compared: rounding seems to move them by more than their range."""
    builder = encoder()
    noisy = builder.op("Add", "hidden", builder.op("RandomUniformLike", "hidden", dtype=TensorProto.FLOAT))
    builder.output(noisy, "noisy", ["batch", "length", WIDTH])
    onnx.save(builder.model(), str(tmp_path / "model.onnx"))
    with pytest.raises(ExportError, match=r"draws random numbers while it runs \(RandomUniformLike\)"):
        split(tmp_path / "model.onnx", tmp_path)
    builder.outputs.pop()
    onnx.save(builder.model(), str(tmp_path / "model.onnx"))
    (tmp_path / "shards").mkdir()
    split(tmp_path / "model.onnx", tmp_path / "shards")
