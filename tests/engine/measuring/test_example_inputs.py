"""Made-up inputs fit the model, whatever its sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.tasks import fakes

from pipeload.format import manifest as manifests
from pipeload.format.caches import past_symbols
from pipeload.format.manifest import TensorSpec
from pipeload.measuring.example_inputs import example_inputs

SIZES = {"batch_size": 2, "sequence_length": 3, "past_sequence_length": 4}


def test_inputs_have_the_shapes_and_dtypes_of_the_model(any_toy: Path) -> None:
    manifest = manifests.read(any_toy)
    made = example_inputs(manifest, SIZES)
    assert list(made) == [spec.name for spec in manifest.inputs]
    for spec in manifest.inputs:
        assert made[spec.name].dtype == spec.dtype
    dims = manifests.bind_dims(manifest.inputs, {name: array.shape for name, array in made.items()})
    assert dims == {name: SIZES[name] for name in manifest.dims}


def test_ids_are_rows_of_the_table_and_masks_let_all_through(toy: Path) -> None:
    made = example_inputs(manifests.read(toy), {"batch_size": 4, "sequence_length": 400})
    assert 0 <= made["input_ids"].min() < made["input_ids"].max() == toys.VOCABULARY - 1
    assert (made["attention_mask"] == 1).all()


def test_a_vocabulary_bounds_ids_where_it_is_smaller_or_no_table_says_it(toy: Path) -> None:
    sizes = {"batch_size": 4, "sequence_length": 400}
    assert example_inputs(manifests.read(toy), sizes, vocabulary=7)["input_ids"].max() == 6
    bare = fakes.manifest("fill-mask")
    assert example_inputs(bare, sizes, vocabulary=7)["input_ids"].max() == 6
    assert example_inputs(bare, sizes)["input_ids"].max() == 1


def test_positions_begin_behind_the_cached_tokens() -> None:
    manifest = fakes.manifest("text-generation", ("input_ids", "position_ids"), cached=True)
    assert past_symbols(manifest) == {"past_sequence_length"}
    assert example_inputs(manifest, SIZES)["position_ids"].tolist() == [[4, 5, 6]] * 2


def test_caches_of_one_shape_share_an_array(toy_decoder: Path) -> None:
    made = example_inputs(manifests.read(toy_decoder), SIZES)
    assert made["past.0"] is made["past.3"]
    assert made["past.0"].shape == (2, 4, 64)


def test_the_same_inputs_come_at_each_call(toy: Path) -> None:
    first, second = (example_inputs(manifests.read(toy), SIZES)["input_ids"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_bfloat16_appears_as_uint16() -> None:
    manifest = fakes.manifest("image-classification", ())
    spec = TensorSpec(name="pixels", dtype="bfloat16", shape=(2, 2))
    object.__setattr__(manifest, "inputs", (spec,))
    made = example_inputs(manifest, {})["pixels"]
    assert made.dtype == np.uint16
    widened = (made.astype(np.uint32) << 16).view(np.float32)
    expected = np.random.default_rng(0).standard_normal((2, 2), np.float32)
    assert widened == pytest.approx(expected, rel=2**-7)
