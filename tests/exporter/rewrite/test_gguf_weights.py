"""A graph made of a GGUF file takes the file's own blocks: where its values are the file's, and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from tests.exporter.conftest import Sharded, assert_same_answers
from tests.exporter.gguf_files import floats_of, quantised, write_tensors
from tests.exporter.graphs import ROWS, WIDTH, Builder, encoder

from pipeload_export.check.cases import Case
from pipeload_export.check.chain import run_unsplit
from pipeload_export.rewrite import gguf_weights
from pipeload_export.rewrite.gguf_blocks import LAYOUTS
from pipeload_export.rewrite.gguf_weights import KeptBlocks, write_with_blocks

COLUMNS, OUTPUTS = 256, 48
Tensors = dict[str, tuple[NDArray[np.uint8], str]]
PLAIN = [kind for kind, layout in LAYOUTS.items() if not layout.has_minima]


def kept(model: onnx.ModelProto, tensors: Tensors, folder: Path) -> KeptBlocks:
    onnx.save(model, folder / "source.onnx")
    (folder / "made").mkdir()
    path = write_tensors(folder / "m.gguf", tensors)
    return write_with_blocks(folder / "source.onnx", None, path, folder / "made", lambda *_: None)


def product(weight: NDArray[np.float32], *, flat: bool = False) -> Builder:
    """x @ weight, where weight is `[outputs, columns]`; flat, with a bias, by Gemm."""
    build = Builder()
    sizes = ["batch"] if flat else ["batch", "length"]
    x = build.input("x", [*sizes, COLUMNS], TensorProto.FLOAT)
    if flat:
        made = build.op("Gemm", x, build.constant(weight), build.weight(len(weight)), transB=1)
    else:
        made = build.op("MatMul", x, build.constant(np.ascontiguousarray(weight.T)))
    build.output(made, "y", [*sizes, len(weight)])
    return build


def answer(path: Path, x: NDArray[np.float32]) -> NDArray[Any]:
    """Of the graph, nothing packed: packed products round activations too."""
    return run_unsplit(path, ["y"], [Case(name="test", inputs={"x": x})], lambda *_: None)[0]["y"]


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def assert_same_product(folder: Path, found: KeptBlocks, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    assert found.path
    wanted = answer(folder / "source.onnx", x)
    np.testing.assert_allclose(answer(found.path, x), wanted, atol=1e-5 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_products_have_the_values_of_the_file_in_whatever_order_of_rows(
    kind: str, flat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_weights, "_PIECE_BYTES", 7 * 4 * COLUMNS)  # pieces of a few rows, and a rest
    rows = quantised((OUTPUTS, COLUMNS), kind, seed=1)
    weight = floats_of(rows, kind)[np.random.default_rng(0).permutation(OUTPUTS)]
    found = kept(product(weight, flat=flat).model(), {"a": (rows, kind)}, tmp_path)
    assert (found.weights, found.floats) == ({kind: weight.size}, ())
    assert found.path
    assert operators(found.path)["MatMulNBits"] == 1
    assert not operators(found.path)["Gemm"]
    assert_same_product(tmp_path, found, (3, COLUMNS) if flat else (2, 5, COLUMNS))


def test_a_matrix_of_several_tensors_takes_the_blocks_of_each(tmp_path: Path) -> None:
    one, other = (quantised((OUTPUTS, COLUMNS), "Q4_1", seed=seed) for seed in (1, 2))
    weight = np.concatenate([floats_of(one, "Q4_1"), floats_of(other, "Q4_1")])
    found = kept(product(weight).model(), {"q": (one, "Q4_1"), "k": (other, "Q4_1")}, tmp_path)
    assert (found.weights, found.floats) == ({"Q4_1": weight.size}, ())
    assert_same_product(tmp_path, found, (2, 5, COLUMNS))


def test_products_with_one_input_share_what_is_made_of_it(tmp_path: Path) -> None:
    build = Builder()
    x = build.input("x", ["batch", COLUMNS], TensorProto.FLOAT)
    tensors = {name: (quantised((OUTPUTS, COLUMNS), "Q4_1", seed=seed), "Q4_1") for seed, name in enumerate("ab")}
    weights = [build.constant(floats_of(*tensor).T.copy()) for tensor in tensors.values()]
    build.output(build.op("Add", *(build.op("MatMul", x, weight) for weight in weights)), "y", ["batch", OUTPUTS])
    found = kept(build.model(), tensors, tmp_path)
    assert found.path
    counts = operators(found.path)
    assert (counts["MatMulNBits"], counts["Concat"], counts["Round"]) == (2, 1, 1)
    assert counts["ReduceSum"] == len(("the sums of the blocks", "the halves of one product", "those of the other"))
    assert_same_product(tmp_path, found, (3, COLUMNS))


@pytest.mark.parametrize("kinds", [("Q4_0", "Q8_0"), ("Q8_0", "TQ2_0")])
def test_a_matrix_of_several_types_stays_floats_and_its_tensors_are_named(
    kinds: tuple[str, str], tmp_path: Path
) -> None:
    tensors = {kind: (quantised((OUTPUTS, COLUMNS), kind, seed=1), kind) for kind in kinds}
    weight = np.concatenate([floats_of(*tensor) for tensor in tensors.values()])
    found = kept(product(weight).model(), tensors, tmp_path)
    assert (found.path, found.weights, found.floats) == (None, {}, kinds)


@pytest.mark.parametrize("change", ["one bit", "a row twice and none missing", "a column"])
def test_what_is_not_a_row_of_the_file_stays_floats(change: str, tmp_path: Path) -> None:
    rows = quantised((OUTPUTS, COLUMNS), "Q8_0", seed=1)
    weight = floats_of(rows, "Q8_0").copy()
    if change == "one bit":
        weight[7, 3] = np.nextafter(weight[7, 3], np.float32(9))
    elif change == "a column":
        weight = np.roll(weight, 1, axis=1)
    else:
        weight[7] = weight[8]  # still rows of the file, each with its own block
    found = kept(product(weight).model(), {"a": (rows, "Q8_0")}, tmp_path)
    if change == "a row twice and none missing":
        assert_same_product(tmp_path, found, (2, 5, COLUMNS))
    else:
        assert (found.path, found.weights, found.floats) == (None, {}, ("a",))


def layers_of(kind: str, table_kind: str, *, tied: bool) -> tuple[onnx.ModelProto, Tensors]:
    """Layers whose matrices have the values of types, and the file."""
    build = encoder(layers=3)
    table = next(tensor for tensor in build.initializers if tuple(tensor.dims) == (ROWS, WIDTH))
    if tied:
        state = build.nodes[-1].input[0]
        rows = build.op("Transpose", table.name, perm=[1, 0])
        build.output(build.op("MatMul", state, rows), "logits", ["batch", "length", table.dims[0]])
    model, tensors = build.model(), {}
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 2:
            is_table = tensor.name == table.name
            shape, mine = tuple(tensor.dims), table_kind if is_table else kind
            rows = quantised(shape if is_table else shape[::-1], mine, seed=len(tensors))
            values = floats_of(rows, mine)
            made = numpy_helper.from_array(values if is_table else np.ascontiguousarray(values.T), tensor.name)
            tensor.CopyFrom(made)
            tensors[tensor.name] = rows, mine
    return model, tensors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "table_kind"), [("Q4_1", "Q8_0"), ("Q5_0", "Q4_0"), ("Q8_0", "Q5_1")])
def test_shards_answer_as_the_graph_of_floats(
    kind: str, table_kind: str, tied: bool, shard: Callable[..., Sharded], tmp_path: Path
) -> None:
    model, tensors = layers_of(kind, table_kind, tied=tied)
    found = kept(model, tensors, tmp_path)
    assert found.path
    table = min(tensors, key=lambda name: tensors[name][1] != table_kind)
    assert found.floats == ((table,) if table_kind == "Q5_1" else ())  # lookups add no minima
    shards = shard(found.path)
    assert shards.blocks == 3
    inputs = shards.inputs({"batch": 2, "length": 7})
    names = [spec.name for spec in shards.model.outputs]
    wanted = run_unsplit(tmp_path / "source.onnx", names, [Case(name="t", inputs=inputs)], lambda *_: None)[0]
    assert_same_answers(wanted, shards.run(inputs), 1e-4)
    lookups = [lookup for item in shards.model.shards for lookup in item.lookups]
    assert next(lookup.table.dtype for lookup in lookups) == ("float32" if table_kind == "Q5_1" else "uint8")
    if tied:
        assert {lookup.path for lookup in lookups} >= {
            item.weights.path for item in shards.model.shards if item.role == "head" and item.weights
        }


@pytest.mark.parametrize("kind", LAYOUTS)
def test_packed_products_round_no_activations(kind: str, tmp_path: Path) -> None:
    """With the usual session, that packs: its kernel rounds what it is given to 8 bits, an error of 0.3 %."""
    rows = quantised((OUTPUTS, COLUMNS), kind, seed=1)
    found = kept(product(floats_of(rows, kind)).model(), {"a": (rows, kind)}, tmp_path)
    x = np.random.default_rng(2).standard_normal((2, 5, COLUMNS)).astype(np.float32)
    x[0, 1, :64] = 0  # whole blocks of zeros
    x[1, 2, 3] = 100
    x[1, 3] *= np.float32(1e-20)
    assert found.path
    made, wanted = (
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for path in (found.path, tmp_path / "source.onnx")
    )
    sizes = np.abs(wanted).max(axis=-1, keepdims=True)
    assert (np.abs(made - wanted) < 2e-4 * sizes).all()
