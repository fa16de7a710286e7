"""Weights of products and tables become 8 or 4 bits: near the floats, stored once, the same in shards and unsplit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tests.exporter.conftest import Arrays, Sharded, assert_same_answers
from tests.exporter.graphs import ROWS, WIDTH, Builder, encoder, load_normalised, write_rounded_graph
from tests.marks import slow

from pipeload.errors import ConfigError, ExportError
from pipeload_export import export
from pipeload_export.check.cases import Case
from pipeload_export.check.chain import run_unsplit
from pipeload_export.cut.tables import lift_tables
from pipeload_export.graph.graph import known_constant
from pipeload_export.rewrite import rounding
from pipeload_export.rewrite.rounding import Rounding, round_rows

EIGHT, FOUR = Rounding(bits=8, block_size=32), Rounding(bits=4, block_size=32)
SIZES = {"batch": 2, "length": 7, "num_channels": 3, "height": 32, "width": 32}


def rounded(source: Path | onnx.ModelProto, folder: Path, coarse: Rounding, fine: Rounding = EIGHT) -> Path:
    return write_rounded_graph(source, folder, coarse, replace(fine, block_size=coarse.block_size))


def run(path: Path, found: Sharded, inputs: Arrays) -> Arrays:
    """The unsplit graph's outputs. Nothing is packed, as in `Sharded.run`: packed products round activations too."""
    names = [spec.name for spec in found.model.outputs]
    return run_unsplit(path, names, [Case(name="test", inputs=inputs)], lambda *_: None)[0]


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def floats(blobs: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any], bits: int) -> NDArray[Any]:
    """What MatMulNBits' documentation says that the parts mean."""

    def unpacked(array: NDArray[Any]) -> NDArray[Any]:
        halves = np.stack([array & 15, array >> 4], axis=-1).reshape(*array.shape[:-1], -1)
        return halves if bits == 4 else array

    middle = unpacked(zeros)[:, : scales.shape[1], None].astype(np.float32)
    return ((unpacked(blobs) - middle) * scales[:, :, None]).reshape(len(blobs), -1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 100])
def test_no_weight_moves_by_more_than_a_few_steps_of_its_block(
    columns: int, bits: int, symmetric: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "_PIECE_BYTES", 4 * columns * 7)  # pieces of 7 rows, and a rest
    weight = np.random.default_rng(0).standard_normal((40, columns)).astype(np.float32)
    how = Rounding(bits=bits, block_size=32, symmetric=symmetric)
    pieces = list(round_rows(known_constant(weight.T if transposed else weight), how, transposed=transposed))
    assert len(pieces) == 6
    blobs, scales, zeros = (np.concatenate([getattr(p, name) for p in pieces]) for name in ("blobs", "scales", "zeros"))
    if symmetric:
        zeros = np.full_like(zeros, 0x88 if bits == 4 else 0x80)
    error = np.abs(floats(blobs, scales, zeros, bits)[:, :columns] - weight)
    # A scale that fits the most values of 4 bits may cut the largest of its block.
    steps = 3 if symmetric and bits == 4 else 1.001
    assert (error <= np.repeat(np.abs(scales), 32, axis=1)[:, :columns] * steps).all()


@pytest.mark.parametrize("how", [EIGHT, FOUR, replace(FOUR, symmetric=False), replace(EIGHT, block_size=128)], ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2", slow("bert-masked"), slow("llama"), slow("vit"), slow("gptj")])
def test_shards_answer_as_the_unsplit_graph_with_the_same_weights(
    name: str, how: Rounding, architecture: Callable[[str], Path], shard: Callable[..., Sharded], tmp_path: Path
) -> None:
    path = rounded(architecture(name), tmp_path / "rounded", how)
    found = shard(path)
    assert found.blocks >= 3
    inputs = found.inputs({symbol: SIZES.get(symbol, 2) for symbol in found.model.dims})
    assert_same_answers(run(path, found, inputs), found.run(inputs), 1e-4)


def test_matrices_of_layers_are_rounded_and_vectors_are_not(
    architecture: Callable[[str], Path], tmp_path: Path
) -> None:
    path = rounded(architecture("bert"), tmp_path / "rounded", FOUR)
    assert operators(path)["MatMulNBits"] >= 3 * 6
    assert not operators(path)["Gemm"]
    model = onnx.load(path, load_external_data=False)
    matrices = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2]
    assert {t.name.rsplit(".", 1)[1] for t in matrices if np.prod(t.dims) >= 1024} <= {"scales", "weight"}
    assert any(t.name.endswith("LayerNorm.weight") for t in model.graph.initializer)


def test_four_bits_are_nearer_than_the_scale_of_the_largest_value_brings_them() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    (piece,) = round_rows(known_constant(weight), FOUR, transposed=False)
    middle = np.full((64, 4), 0x88, np.uint8)
    blocks = weight.reshape(64, 8, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    usual = np.clip(np.rint(blocks / (largest / -8)), -8, 7) * (largest / -8)
    error = floats(piece.blobs, piece.scales, middle, 4) - weight
    assert np.square(error).sum() < 0.9 * np.square(usual - blocks).sum()


def test_products_that_narrow_have_the_finer_rounding(tmp_path: Path) -> None:
    path = rounded(encoder(layers=3).model(), tmp_path / "rounded", FOUR)
    found: Counter[tuple[bool, int]] = Counter()
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {item.name: item.i for item in node.attribute}
            found[sizes["K"] >= 2 * sizes["N"], sizes["bits"]] += 1
    assert set(found) == {(True, 8), (False, 4)}


@pytest.mark.parametrize("name", ["gpt2", slow("llama")])
def test_a_tied_table_is_stored_once_and_read_by_row(
    name: str, architecture: Callable[[str], Path], shard: Callable[..., Sharded], tmp_path: Path
) -> None:
    found = shard(rounded(architecture(name), tmp_path / "rounded", FOUR))
    slices = [item for item in found.model.shards if item.role == "head"]
    lookups = [lookup for item in found.model.shards for lookup in item.lookups if lookup.parts]
    assert slices
    assert {lookup.path for lookup in lookups} == {item.weights.path for item in slices if item.weights}
    assert [lookup.table.shape[0] for lookup in lookups] == [1000, 1000]
    for lookup in lookups:
        assert [part.shape[0] for part in lookup.parts] == [item.tensors[0].shape[0] for item in slices]
    whole = 1000 * (64 + 2 * 4)
    tables = (found.directory / lookups[0].path).stat().st_size
    others = sum(
        lookup.table.nbytes
        for item in found.model.shards
        for lookup in item.lookups
        if not lookup.parts and lookup.path == lookups[0].path
    )
    assert tables - others - whole <= 2 * 4096


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_a_table_that_others_rounded_are_looked_up(
    bits: int, shard: Callable[..., Sharded], tmp_path: Path
) -> None:
    model = encoder(layers=3).model()
    table = next(t for t in model.graph.initializer if tuple(t.dims) == (ROWS, WIDTH))
    (piece,) = round_rows(
        known_constant(onnx.numpy_helper.to_array(table)), Rounding(bits=bits, block_size=16), transposed=False
    )
    node = next(n for n in model.graph.node if n.op_type == "Gather" and n.input[0] == table.name)
    made = helper.make_node(
        "GatherBlockQuantized",
        ["bytes", node.input[1], "scales"],
        node.output,
        domain="com.microsoft",
        bits=bits,
        block_size=16,
        gather_axis=0,
        quantize_axis=1,
    )
    node.CopyFrom(made)
    model.graph.initializer.remove(table)
    model.graph.initializer.append(onnx.numpy_helper.from_array(piece.blobs.reshape(ROWS, -1), "bytes"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(piece.scales, "scales"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    found = shard(model)
    tables = {lookup.table.name: lookup.table.shape for item in found.model.shards for lookup in item.lookups}
    assert tables == {"bytes": (ROWS, WIDTH * bits // 8), "scales": (ROWS, WIDTH // 16)}
    inputs = found.inputs({symbol: SIZES.get(symbol, 3) for symbol in found.model.dims})
    assert_same_answers(run(found.unsplit, found, inputs), found.run(inputs))


def test_weights_that_stay_floats_anyway_are_not_rounded(tmp_path: Path) -> None:
    build = encoder(layers=3)
    name = next(t.name for t in build.initializers if tuple(t.dims) == (WIDTH, 2 * WIDTH))
    scale = build.op("ReduceMax", build.op("Cast", "attention_mask", to=TensorProto.FLOAT), keepdims=0)
    build.output(build.op("Mul", name, scale), "weight", [WIDTH, 2 * WIDTH])
    assert f"{name}.columns.blobs" not in names_of(rounded(build.model(), tmp_path / "with", FOUR))
    assert f"{name}.columns.blobs" in names_of(rounded(encoder(layers=3).model(), tmp_path / "without", FOUR))


def names_of(path: Path) -> set[str]:
    return {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer}


@pytest.mark.parametrize(
    ("weights", "remedy"),
    [("int8", r"could be rounded.*--weights fp32"), ("bf16", r"could be rounded.*--weights auto")],
)
def test_a_graph_without_floats_to_round_is_refused_with_the_remedy(weights: Any, remedy: str, tmp_path: Path) -> None:
    build = Builder()
    weight = build.constant(np.ones((8, 8), np.float32))
    build.output(build.op("MatMul", build.input("x", ["batch", 8], TensorProto.FLOAT), weight), "y", ["batch", 8])
    with pytest.raises(ExportError, match=remedy):
        export(build.save(tmp_path / "model.onnx"), tmp_path / "target", whole=True, weights=weights)


@pytest.mark.parametrize("options", [{"weights": "int3"}, {"weights": "int8", "block_size": 24}], ids=str)
def test_unknown_roundings_are_refused_before_anything_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be .*; take one of"):
        export(tmp_path / "absent.onnx", tmp_path / "target", **options)


@pytest.mark.parametrize(("blocks", "lifted"), [(3, 2), (5, 0)])
def test_a_rounded_table_is_compared_with_a_block_by_the_bytes_that_it_has(
    blocks: int, lifted: int, tmp_path: Path
) -> None:
    # A table whose indices the graph computes needs a shard more: that pays from a quarter of a block on.
    build = Builder()
    ids = build.op("Add", build.input("ids", ["batch", "length"]), build.constant(np.array(1)))
    build.output(build.op("Tanh", build.embed(ids)), "rows", ["batch", "length", WIDTH])
    graph = load_normalised(rounded(build.model(), tmp_path / "rounded", EIGHT))
    assert len(lift_tables(graph, block_bytes=blocks * ROWS * WIDTH, activation=())) == lifted
