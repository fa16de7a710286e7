"""A dimension that takes one size only has that size in the manifest, and one that takes several stays free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from tests.exporter.graphs import Builder, run
from tests.exporter.models import write_json

import pipeload
from pipeload.errors import ConfigError
from pipeload.format.manifest import ByteTerm, Manifest, Structure, TensorSpec
from pipeload_export import export
from pipeload_export.check.cases import sample_cases
from pipeload_export.shard.alignment import related_inputs, related_structure

_STEP, _CHANNELS = 8, 6
_FREE = ("batch", 3, "height", "width")


def _net(folder: Path, *, rows: int | None = None, columns: int | None = None, channels: int | str = 3) -> Path:
    """A small convolutional net, which mixes the patches of each column, or row, or both by a matrix of one size."""
    builder = Builder()
    pixels = builder.input("pixels", ["batch", channels, "height", "width"], TensorProto.FLOAT)
    x = builder.op("Conv", pixels, builder.weight(_CHANNELS, 3, 4, 4), kernel_shape=[4, 4], strides=[4, 4])
    x = builder.op("Conv", builder.op("Relu", x), builder.weight(_CHANNELS, _CHANNELS, 2, 2), strides=[2, 2])
    if columns:
        x = builder.op("MatMul", x, builder.weight(columns, columns))
    if rows:
        x = builder.op("MatMul", builder.weight(rows, rows), x)
    builder.output(x, "mixed", ["batch", _CHANNELS, "rows", "columns"])
    return builder.save(folder / "model.onnx")


def _line_reader(folder: Path) -> Path:
    """A net that takes the one row of patches away, as a reader of lines of text does."""
    builder = Builder()
    pixels = builder.input("pixels", list(_FREE), TensorProto.FLOAT)
    x = builder.op("Conv", pixels, builder.weight(_CHANNELS, 3, 8, 8), kernel_shape=[8, 8], strides=[8, 8])
    builder.output(builder.op("Squeeze", x, builder.constant([2])), "line", ["batch", _CHANNELS, "columns"])
    return builder.save(folder / "model.onnx")


def _answer(directory: Path, pixels: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, Any]:
    with pipeload.load(directory, memory_budget="1 GB") as model:
        return model.run({"pixels": pixels})


@pytest.mark.parametrize(
    ("rows", "columns", "shape"),
    [
        (3, None, ("batch", 3, 3 * _STEP, "width")),
        (None, 5, ("batch", 3, "height", 5 * _STEP)),
        (4, 7, ("batch", 3, 4 * _STEP, 7 * _STEP)),
        (None, None, _FREE),
    ],
    ids=["one height", "one width", "one of both, in the config", "both free"],
)
def test_the_manifest_has_the_one_size_of_a_dimension(
    rows: int | None, columns: int | None, shape: tuple[int | str, ...], tmp_path: Path
) -> None:
    if rows and columns:
        write_json(tmp_path / "config.json", {"image_size": [rows * _STEP, columns * _STEP]})
    source, directory = _net(tmp_path, rows=rows, columns=columns), tmp_path / "target"
    manifest = export(source, directory, whole=True)
    assert manifest.inputs[0].shape == shape
    assert manifest.dims == tuple(dim for dim in shape if isinstance(dim, str))
    sizes = {"batch": 2, "height": 6 * _STEP, "width": 9 * _STEP}
    right = tuple(sizes.get(str(dim), dim) for dim in shape)
    pixels = np.random.default_rng(0).standard_normal(right).astype(np.float32)
    wanted = run(source, {"pixels": pixels})
    np.testing.assert_allclose(_answer(directory, pixels)["mixed"], wanted["mixed"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [6 * _STEP, 4 * _STEP])
def test_one_size_of_both_that_no_file_names_is_found(size: int, tmp_path: Path) -> None:
    patches = size // _STEP
    manifest = export(_net(tmp_path, rows=patches, columns=patches), tmp_path / "target", whole=True)
    assert manifest.inputs[0].shape == ("batch", 3, size, size)


def test_one_row_of_patches_is_a_size_as_any_other(tmp_path: Path) -> None:
    manifest = export(_line_reader(tmp_path), tmp_path / "target", whole=True)
    assert manifest.inputs[0].shape == ("batch", 3, 8, "width")


def test_channels_have_the_one_size_that_the_convolution_takes(tmp_path: Path) -> None:
    manifest = export(_net(tmp_path, channels="channels"), tmp_path / "target", whole=True)
    assert manifest.inputs[0].shape == _FREE


def test_a_call_with_another_size_is_refused_with_the_one_that_works(tmp_path: Path) -> None:
    export(_net(tmp_path, rows=3), tmp_path / "target", whole=True)
    with pytest.raises(ConfigError, match=f"'pixels' has size 16 where the model takes {3 * _STEP}"):
        _answer(tmp_path / "target", np.zeros((1, 3, 16, 64), np.float32))


@pytest.mark.parametrize(("columns", "width"), [(None, 224), (3, 3 * _STEP)])
def test_images_are_compared_at_the_size_of_the_fixed_edges(columns: int | None, width: int, tmp_path: Path) -> None:
    manifest: Manifest = export(_net(tmp_path, rows=3, columns=columns), tmp_path / "target", whole=True)
    cases = sample_cases(manifest, tmp_path / "target")
    assert [case.inputs["pixels"].shape for case in cases] == [(n, 3, 3 * _STEP, width) for n in (1, 2, 3)]
    assert [case.name for case in cases] == [f"{n} x {3 * _STEP} x {width} pixels" for n in (1, 2, 3)]


def test_memory_grows_with_the_free_edge_and_holds_the_fixed_one(tmp_path: Path) -> None:
    one_height = export(_net(tmp_path, rows=3), tmp_path / "one", whole=True)
    free = export(_net(tmp_path), tmp_path / "free", whole=True)
    for width in (64, 640):
        fixed, either = (
            sum(
                each.activation_bytes({"batch": 2, "height": 3 * _STEP, "width": width})
                for each in m.structures.values()
            )
            for m in (one_height, free)
        )
        assert fixed >= either


def test_a_size_takes_the_place_of_its_symbol_in_sums_and_bytes() -> None:
    spec = TensorSpec(name="mask", dtype="int64", shape=("batch", "total", "rows + 1", 7))
    (found,) = related_inputs([spec], {"total": ("rows", "past")}, {"rows": 48})
    assert found.shape == ("batch", "past + 48", 49, 7)
    term = ByteTerm(nbytes=10, dims=("batch", "rows", "past"), steps=(1, 32, 8))
    structure = Structure(activations=((term, ByteTerm(nbytes=3, dims=("rows",))),))
    (terms,) = related_structure(structure, {}, {"rows": 48}).activations
    assert terms == (ByteTerm(nbytes=20, dims=("batch", "past"), steps=(1, 8)), ByteTerm(nbytes=3 * 48))
