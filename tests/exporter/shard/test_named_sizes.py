"""Sizes that a model's files name are those that its inputs get: widths of features, and images beside texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto
from tests.exporter.graphs import WIDTH, Builder
from tests.exporter.models import write_json

from pipeload.errors import ExportError
from pipeload_export import export

_FEATURES = 12


def _of_features(folder: Path) -> Path:
    """Rows of features -> hidden states."""
    builder = Builder()
    features = builder.input("features", ["batch", "length", "feature_dim"], TensorProto.FLOAT)
    x = builder.op("MatMul", features, builder.weight(_FEATURES, WIDTH))
    for _ in range(3):
        x = builder.layer(x)
    builder.output(builder.norm(x), "hidden", ["batch", "length", WIDTH])
    return builder.save(folder / "model.onnx")


def _of_images_and_a_frozen_text(folder: Path) -> Path:
    """Images of 16 patches, and texts of one size: 2 x 16 ids."""
    builder = Builder()
    pixels = builder.input("pixel_values", ["batch", "channels", "height", "width"], TensorProto.FLOAT)
    ids = builder.input("input_ids", ["texts", "length"])
    patches = builder.op("Conv", pixels, builder.weight(WIDTH, 3, 8, 8), strides=[8, 8], kernel_shape=[8, 8])
    rows = builder.op("Transpose", builder.op("Reshape", patches, builder.constant([0, 0, -1])), perm=[0, 2, 1])
    words = builder.embed(builder.op("Reshape", ids, builder.constant([2, 16])))
    x = builder.op("Add", rows, builder.weight(1, 16, WIDTH))
    x = builder.op("Add", x, builder.op("ReduceMean", words, axes=[0, 1], keepdims=0))
    for _ in range(3):
        x = builder.layer(x)
    builder.output(builder.norm(x), "hidden", ["batch", 16, WIDTH])
    return builder.save(folder / "model.onnx")


def test_the_width_of_an_input_is_the_number_that_the_config_has_under_its_name(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"feature_dim": _FEATURES, "length": 7})
    manifest = export(_of_features(tmp_path), tmp_path / "target")
    assert manifest.inputs[0].shape == ("batch", "length", _FEATURES)
    assert manifest.dims == ("batch", "length")


def test_a_text_that_tracing_froze_is_found_beside_images(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"image_size": 32})
    sizes = "batch 2 and channels 3 and height 32 and width 32 and texts 2 and length 16"
    with pytest.raises(ExportError, match=f"runs with {sizes}, the sizes at which it was traced, and not with smaller"):
        export(_of_images_and_a_frozen_text(tmp_path), tmp_path / "target")
