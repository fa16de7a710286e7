"""Products of integers: near the floats, a row's answer is its own, the same bits packed and not, in any shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tests.engine.pipeline.rig import Scripted, plan_by_hand
from tests.exporter.conftest import Arrays, Sharded, assert_same_answers
from tests.exporter.graphs import Builder, write_rounded_graph
from tests.marks import slow

from pipeload.format import manifest as manifests
from pipeload.format.manifest import SmallWeights
from pipeload.pipeline.pipeline import Pipeline
from pipeload.pipeline.session import to_array, to_value
from pipeload.pipeline.sweep import Feed
from pipeload.planning.needs import Needs
from pipeload.storage.weights import Storage
from pipeload_export import export
from pipeload_export.convert.rounding import round_directory
from pipeload_export.rewrite.rounding import Rounding

EIGHT = Rounding(bits=8, block_size=32)
SIZES = {"batch": 2, "length": 7, "num_channels": 3, "height": 32, "width": 32}


def rounded(source: Path | onnx.ModelProto, folder: Path) -> Path:
    return write_rounded_graph(source, folder, EIGHT, EIGHT, integers=True)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def session(path: Path, *, packed: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "0" if packed else "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, inputs: Mapping[str, NDArray[Any]], *, packed: bool = False) -> Arrays:
    made = session(path, packed=packed)
    names = [value.name for value in made.get_outputs()]
    return dict(zip(names, made.run(names, dict(inputs)), strict=True))


def product(
    kind: str, weight: NDArray[np.float32], *, rank: int = 3, opset: int = 17, **attributes: int
) -> onnx.ModelProto:
    """A product, with a bias where it is a Gemm, and an operator behind it."""
    width, made = weight.shape[:: -1 if attributes.get("transB") else 1]
    build = Builder()
    sizes = ["batch", "length"][: rank - 1]
    given = build.input("x", [*sizes, width], TensorProto.FLOAT)
    bias = [build.constant(np.linspace(-1, 1, made, dtype=np.float32))] if kind == "Gemm" else []
    domain = {"domain": "com.microsoft"} if kind == "FusedMatMul" else {}
    result = build.op(kind, given, build.constant(weight), *bias, **domain, **attributes)
    build.output(build.op("Neg", build.op("Identity", result)), "y", [*sizes, made])
    model = build.model()
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)])
    return model


def weight_of(columns: int, rows: int, seed: int = 0) -> NDArray[np.float32]:
    weight = np.random.default_rng(seed).standard_normal((columns, rows)).astype(np.float32)
    # A column with weights a hundred times as large as the others, as the second products of feed-forwards have.
    weight[3] *= 100
    return weight


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize(
    ("kind", "rank", "transposed"),
    [
        ("MatMul", 3, False),
        ("MatMul", 2, False),
        ("Gemm", 2, False),
        ("Gemm", 2, True),
        ("FusedMatMul", 3, True),
    ],
)
def test_a_product_is_as_near_as_its_rounded_weights(
    kind: str, rank: int, transposed: bool, opset: int, tmp_path: Path
) -> None:
    weight = weight_of(128, 64)
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    model = product(kind, stored, rank=rank, opset=opset, **({"transB": 1} if transposed else {}))
    path = rounded(model, tmp_path / "rounded")
    assert operators(path)["MatMulIntegerToFloat"] == 1
    x = np.random.default_rng(1).standard_normal((2, 5, 128)[-rank:]).astype(np.float32)
    x[..., 7] *= 50  # an activation that takes most of the range
    x[0] = 0
    (found,) = run(path, {"x": x}).values()
    (wanted,) = run(tmp_path / "rounded" / "source.onnx", {"x": x}).values()
    # Half a step of a weight in each of 128, and of an activation.
    even = np.sqrt(np.abs(weight).max(axis=1))
    step = np.abs(weight / even[:, None]).max(axis=0) / 127
    most = np.abs(x) @ np.outer(even, step) * 0.51
    most += np.abs(x * even).max(axis=-1, keepdims=True) / 63 / 126 * np.abs(weight / even[:, None]).sum(axis=0) * 0.51
    assert (np.abs(found - wanted) <= most + 1e-5 * np.abs(wanted).max()).all()
    # A row of zeros is a product of zeros: only the bias is left.
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-6)


def test_large_columns_of_a_matrix_that_narrows_do_not_cost_the_others_their_bits(tmp_path: Path) -> None:
    errors = {}
    for rows in (64, 96):
        weight = weight_of(128, rows)
        path = rounded(product("MatMul", weight), tmp_path / str(rows))
        x = np.random.default_rng(1).standard_normal((1, 50, 128)).astype(np.float32)
        x[..., 3] = 0
        (found,) = run(path, {"x": x}).values()
        errors[rows] = np.abs(found + x @ weight).mean()
    assert errors[64] < errors[96] / 4


def test_the_largest_values_are_within_what_every_processor_adds_up(tmp_path: Path) -> None:
    # AVX2 adds two products of bytes in 16 bits, and cuts larger sums off.
    path = rounded(product("MatMul", weight_of(64, 64)), tmp_path / "rounded")
    model = onnx.load(path)
    (steps,) = (t for t in model.graph.initializer if t.name.endswith(".steps"))
    largest = int(np.abs(onnx.numpy_helper.to_array(steps).astype(int)).max())
    assert largest == 127
    (taken,) = (node.input[0] for node in model.graph.node if node.op_type == "MatMulIntegerToFloat")
    model.graph.output.append(helper.make_tensor_value_info(taken, TensorProto.UINT8, None))
    onnx.save(model, tmp_path / "shown.onnx")
    x = np.random.default_rng(0).standard_cauchy((4, 50, 64)).astype(np.float32)
    x[0, 0] = np.finfo(np.float32).max
    rows = run(tmp_path / "shown.onnx", {"x": x})[taken]
    assert rows.min() >= 1
    assert rows.max() <= 127


@pytest.mark.parametrize("name", ["bert", slow("bert-masked"), slow("distilbert"), slow("vit")])
def test_shards_answer_as_the_unsplit_graph_with_the_same_weights(
    name: str, architecture: Callable[[str], Path], shard: Callable[..., Sharded], tmp_path: Path
) -> None:
    path = rounded(architecture(name), tmp_path / "rounded")
    found = shard(path)
    assert found.blocks >= 3
    assert operators(path)["MatMulIntegerToFloat"] >= 3 * 6
    assert not any(item.packed for item in found.model.shards if item.role == "block")
    inputs = found.inputs({symbol: SIZES.get(symbol, 2) for symbol in found.model.dims})
    assert_same_answers(run(path, inputs), found.run(inputs), 1e-4)


def test_a_text_has_the_same_bits_in_any_batch_and_packed_or_not(
    architecture: Callable[[str], Path], shard: Callable[..., Sharded], tmp_path: Path
) -> None:
    path = rounded(architecture("bert"), tmp_path / "rounded")
    found = shard(path)
    inputs = found.inputs({symbol: SIZES.get(symbol, 4) for symbol in found.model.dims})
    wanted = run(path, inputs)
    products = [node.output[0] for node in onnx.load(path).graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert products
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(products[0], TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "first.onnx")
    first, packed = (run(tmp_path / "first.onnx", inputs, packed=packed)[products[0]] for packed in (False, True))
    np.testing.assert_array_equal(first, packed)
    alone = run(path, {name: array[:1] for name, array in inputs.items()})
    for name, array in alone.items():
        np.testing.assert_array_equal(array, wanted[name][:1], err_msg=name)


def test_products_share_the_rounding_of_what_they_all_take(architecture: Callable[[str], Path], tmp_path: Path) -> None:
    found = operators(rounded(architecture("bert"), tmp_path / "rounded"))
    # Of queries, keys and values, of attention's output, and of both products of the feed-forward.
    assert found["Abs"] <= found["MatMulIntegerToFloat"] - 3 * 2


@pytest.mark.parametrize(
    ("name", "bits", "symmetric"),
    [("gpt2", 8, True), ("bert", 4, True), ("bert", 8, False)],
    ids=["with caches: a pass has one row for each text", "4 bits", "asymmetric"],
)
def test_others_have_blocks(
    name: str, bits: int, symmetric: bool, sharded_architecture: Callable[[str], Sharded], tmp_path: Path
) -> None:
    small = SmallWeights(bits=bits, fine_bits=8, block_size=32, symmetric=symmetric)
    made = round_directory(sharded_architecture(name).directory, tmp_path, small, progress=lambda *_: None)
    found = sum((operators(tmp_path / item.graph.path) for item in made.shards), Counter[str]())
    assert found["MatMulNBits"]
    assert not found["MatMulIntegerToFloat"]
    assert made.small_weights
    assert not made.small_weights.integers


def test_a_vocabulary_head_and_its_table_keep_blocks(
    architecture: Callable[[str], Path], shard: Callable[..., Sharded], tmp_path: Path
) -> None:
    path = rounded(architecture("bert-masked"), tmp_path / "rounded")
    assert operators(path)["MatMulNBits"] == 1
    assert any(item.role == "head" for item in shard(path).model.shards)


def answers(directory: Path, inputs: Arrays, **plan: Any) -> Iterator[Arrays]:
    """Of the passes under a plan that is made by hand; resident shards are packed behind the first one."""
    manifest = manifests.read(directory)
    made = plan_by_hand(manifest, **plan)
    pipeline = Pipeline(manifest, Storage(directory, manifest), made, Scripted(manifest, lambda *_: made), None)
    try:
        for _ in range(3):
            call = pipeline.submit(Feed(pieces=[{name: to_value(array) for name, array in inputs.items()}]), Needs())
            yield {name: to_array(value).copy() for name, value in call.result().items()}
    finally:
        pipeline.close()


def test_every_plan_gives_the_same_bits_and_the_manifest_says_how(
    architecture: Callable[[str], Path], tmp_path: Path
) -> None:
    manifest = export(architecture("bert"), tmp_path / "target", weights="int8")
    assert manifest.small_weights is not None
    assert manifest.small_weights.integers
    assert manifest.small_weights.accuracy is not None
    assert not manifest.quantised_dynamically
    inputs = {"input_ids": np.arange(12).reshape(2, 6), "attention_mask": np.ones((2, 6), np.int64)}
    inputs |= {"token_type_ids": np.zeros((2, 6), np.int64)}
    names = [shard.name for shard in manifest.shards]
    block = next(shard for shard in manifest.shards if shard.role == "block")
    plans: list[dict[str, Any]] = [
        {"loaders": 1},
        {"resident": names[::2], "packed": True},
        {"resident": names, "packed": True},
        {"partly": {block.name: (0, block.tensors[0].nbytes)}},
    ]
    (first, *others) = (answer for plan in plans for answer in answers(tmp_path / "target", inputs, **plan))
    assert len(others) == len(plans) * 3 - 1
    for answer in others:
        assert answer.keys() == first.keys()
        for name, array in answer.items():
            np.testing.assert_array_equal(array, first[name], err_msg=name)
