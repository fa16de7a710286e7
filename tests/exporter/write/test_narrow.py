"""Weights whose values all fit into 16 bits are stored in 16, and the answers stay, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from tests.exporter.conftest import Sharded
from tests.exporter.graphs import Builder, encoder, run

import pipeload
from pipeload.format.dtypes import NARROW
from pipeload_export.check.cases import sample_cases
from pipeload_export.check.merge import merge
from pipeload_export.graph.graph import known_constant
from pipeload_export.write.narrow import stored_type

SIZES = ({"batch": 1, "length": 1}, {"batch": 2, "length": 7}, {"batch": 3, "length": 12})
_LARGE = 16 << 10
_TINY = np.float32(2.0**-30)


def rounded(model: onnx.ModelProto, kind: Any) -> onnx.ModelProto:
    """The model with large weights that have values of this type only."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.raw_data) >= _LARGE:
            values = numpy_helper.to_array(tensor).astype(kind).astype(np.float32)
            tensor.raw_data = values.tobytes()
    return model


def of_16_bits(sharded: Sharded) -> dict[str, str]:
    """Names and types of tensors that are stored in 16 bits."""
    tables = (lookup.table for shard in sharded.model.shards for lookup in shard.lookups)
    specs = [*tables, *(spec for shard in sharded.model.shards for spec in shard.tensors)]
    assert all((spec.dtype in NARROW) == (spec.widened is not None) for spec in specs)
    return {spec.name: spec.dtype for spec in specs if spec.widened}


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_real_architectures(
    name: str, kind: Any, architecture: Callable[[str], Path], shard: Callable[..., Sharded]
) -> None:
    model = rounded(onnx.load(architecture(name)), kind)
    narrow = shard(model)
    wide = shard(model, "wide", exact_16_bits=False)
    assert set(of_16_bits(narrow).values()) == {np.dtype(kind).name}
    assert not of_16_bits(wide)
    left = [spec for one in narrow.model.shards for spec in one.tensors if spec.dtype == "float32"]
    assert all(spec.nbytes < _LARGE for spec in left)
    large = sum(spec.nbytes for one in wide.model.shards for spec in one.tensors if spec.nbytes >= _LARGE)
    assert narrow.manifest.weight_bytes <= wide.manifest.weight_bytes - large // 2
    for folder in (narrow, wide):
        (folder.directory / "config.json").write_text('{"image_size": 32}')
    cases = sample_cases(narrow.manifest, narrow.directory)
    same = sample_cases(wide.manifest, wide.directory)
    for case, other in zip(cases, same, strict=True):
        assert case.name == other.name
        for key, array in case.inputs.items():
            np.testing.assert_array_equal(array, other.inputs[key])
        found, wanted = narrow.run(case.inputs), wide.run(case.inputs)
        for key, array in wanted.items():
            np.testing.assert_array_equal(found[key], array)
    with pipeload.load(narrow.directory, 8_000_000_000) as one, pipeload.load(wide.directory, 8_000_000_000) as other:
        inputs = cases[-1].inputs
        found, wanted = one.run(inputs), other.run(inputs)
        for key, array in wanted.items():
            np.testing.assert_array_equal(found[key], array)


def test_shards_of_one_structure_are_stored_alike(shard: Callable[..., Sharded]) -> None:
    builder = encoder(4)
    model = builder.model()
    matrices = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= 4096]
    # One block keeps 32 bits in one of its matrices.
    odd = matrices[-1].name
    rounded(model, ml_dtypes.bfloat16)
    for tensor in model.graph.initializer:
        if tensor.name == odd:
            tensor.raw_data = (numpy_helper.to_array(tensor) + _TINY).tobytes()
    sharded = shard(model)
    kinds: dict[str, set[tuple[str, ...]]] = {}
    for one in sharded.manifest.shards:
        kinds.setdefault(one.structure, set()).add(tuple(sorted(spec.dtype for spec in one.tensors)))
    assert all(len(found) == 1 for found in kinds.values())


def _constant(values: Any) -> Any:
    return known_constant(np.resize(np.asarray(values, np.float32), 1 << 13))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -2.5, 0.0, -0.0], TensorProto.BFLOAT16),
        ([1.0 + 2**-10], TensorProto.FLOAT16),
        ([1.0 + 2**-10, 2.0**-24], TensorProto.FLOAT16),
        ([1.0 + 2**-10, 2.0**-25], TensorProto.FLOAT),
        ([1.0 + 2**-10, 65504.0], TensorProto.FLOAT16),
        ([1.0 + 2**-10, 65536.0], TensorProto.FLOAT),
        ([1.0 + 2**-10, np.inf], TensorProto.FLOAT),
        ([1.0 + 2**-10, np.nan], TensorProto.FLOAT),
        ([np.inf, np.nan, 3e38 * 0], TensorProto.BFLOAT16),
        ([1.0 + 2**-11], TensorProto.FLOAT),
        ([1.0 + 2**-20], TensorProto.FLOAT),
    ],
)
def test_a_tensor_is_stored_in_16_bits_if_no_bit_of_it_is_lost(values: list[float], expected: int) -> None:
    constant = _constant(values)
    assert stored_type(constant) == expected


def test_one_value_at_the_end_of_a_large_tensor_counts() -> None:
    array = np.ones((3, (1 << 22) + 5), np.float32)
    assert stored_type(known_constant(array)) == TensorProto.BFLOAT16
    array[-1, -1] += _TINY * 1e6
    assert stored_type(known_constant(array)) == TensorProto.FLOAT


def test_small_tensors_and_other_types_stay() -> None:
    assert stored_type(known_constant(np.ones(100, np.float32))) == TensorProto.FLOAT
    for dtype in (np.float64, np.int64, np.float16):
        constant = known_constant(np.ones(1 << 14, dtype))
        assert stored_type(constant) == constant.dtype


def test_the_merged_graph_gives_the_same_answers(
    architecture: Callable[[str], Path], shard: Callable[..., Sharded]
) -> None:
    sharded = shard(rounded(onnx.load(architecture("gpt2")), ml_dtypes.bfloat16))
    merged = merge(sharded.directory, sharded.directory / "merged.onnx")
    (case, *_) = sample_cases(sharded.manifest, sharded.directory)
    found, wanted = run(merged, case.inputs), sharded.run(case.inputs)
    for key, array in wanted.items():
        np.testing.assert_array_equal(found[key], array)


def test_a_name_that_is_taken_keeps_its_tensor(shard: Callable[..., Sharded]) -> None:
    builder = Builder()
    ids = builder.input("input_ids", ["batch", "length"])
    x = builder.embed(ids)
    for _ in range(3):
        x = builder.layer(x)
    builder.output(builder.norm(x), "hidden", ["batch", "length", 32])
    model = rounded(builder.model(), ml_dtypes.bfloat16)
    first = of_16_bits(shard(model))
    taken = next(name for name in first if name in {one.name for one in model.graph.initializer})
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            old, node.output[0] = node.output[0], f"{taken}.float32"
            for other in model.graph.node:
                other.input[:] = [f"{taken}.float32" if name == old else name for name in other.input]
            break
    wide = shard(model, "wide", exact_16_bits=False)
    again = shard(model, "again")
    for dims in SIZES:
        inputs = wide.inputs(dims)
        for key, array in wide.run(inputs).items():
            np.testing.assert_array_equal(again.run(inputs)[key], array)
