"""`--weights bf16` and `fp16` round what does not fit, say what that did, and store 16 bits."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tests.exporter.graphs import encoder

from pipeload.format.dtypes import NARROW
from pipeload.format.manifest import read
from pipeload_export import export
from pipeload_export.graph.load import load
from pipeload_export.rewrite.sixteen import LEAST_BYTES, round_to_16_bits

_KINDS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(encoder(3).model(), path)
    return path


@pytest.mark.parametrize("dtype", _KINDS)
def test_large_weights_have_values_of_the_type_and_others_stay(source: Path, dtype: str) -> None:
    before, after = load(source), load(source)
    assert round_to_16_bits(after, dtype)
    assert before.constants.keys() == after.constants.keys()
    changed = 0
    for name, constant in before.constants.items():
        wanted = constant.load()
        if constant.nbytes >= LEAST_BYTES and wanted.dtype == np.float32:
            wanted = wanted.astype(_KINDS[dtype]).astype(np.float32)
            changed += 1
        np.testing.assert_array_equal(after.constants[name].values(), wanted)
    assert changed


def test_a_tensor_beyond_float16_stays_as_it_is(source: Path) -> None:
    model = onnx.load(source)
    large = next(tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= LEAST_BYTES)
    values = numpy_helper.to_array(large).copy()
    values.flat[-1] = 1e6
    large.raw_data = values.tobytes()
    onnx.save(model, source)
    after = load(source)
    round_to_16_bits(after, "float16")
    np.testing.assert_array_equal(after.constants[large.name].values(), values)


@pytest.mark.parametrize(("weights", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_an_export_stores_16_bits_and_reports_the_error(source: Path, tmp_path: Path, weights: str, dtype: str) -> None:
    manifest = export(source, tmp_path / "target", task="feature-extraction", weights=weights)
    assert manifest == read(tmp_path / "target")
    small = manifest.small_weights
    assert small is not None
    assert (small.dtype, small.bits) == (dtype, 16)
    assert small.accuracy is not None
    assert 0 < small.accuracy.outputs[0].max_rel_error < 0.05
    specs = [lookup.table for shard in manifest.shards for lookup in shard.lookups]
    specs += [spec for shard in manifest.shards for spec in shard.tensors]
    assert any(spec.widened for spec in specs)
    assert all(spec.dtype in NARROW for spec in specs if spec.memory_bytes >= LEAST_BYTES)
    assert {result.limit for result in manifest.verification} == {1e-4}, "like is compared with like"
