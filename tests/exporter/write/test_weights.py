"""Weights files open with the safetensors library, begin at a page, and hold the given bytes, read piece by piece."""

from __future__ import annotations

import hashlib
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper
from safetensors import safe_open
from tests.exporter.conftest import Sharded

from pipeload.format.manifest import PAGE_BYTES
from pipeload.storage import digests
from pipeload_export.graph.graph import Constant, known_constant
from pipeload_export.write import weights
from pipeload_export.write.weights import in_order, write_weights


def constants() -> dict[str, Constant]:
    random = np.random.default_rng(0)
    arrays: dict[str, NDArray[np.generic]] = {
        "odd bytes": random.integers(0, 255, 7, np.uint8),
        "scalar": np.array(3.5, np.float32),
        "small": random.standard_normal((3, 5)).astype(np.float32),
        "half": random.standard_normal(3).astype(np.float16),
        "matrix": random.standard_normal((40, 64)).astype(np.float32),
        "large": random.standard_normal((64, 128)).astype(np.float32),
        "nothing": np.empty((0, 4), np.float32),
        "double": random.standard_normal(5),
        "ßlong/name::0": random.integers(-9, 9, (8, 8)),
    }
    return {name: known_constant(array) for name, array in arrays.items()}


def test_the_library_reads_back_what_was_written(tmp_path: Path) -> None:
    given = constants()
    write_weights(tmp_path / "w.safetensors", in_order(given))
    with safe_open(tmp_path / "w.safetensors", "np") as file:
        assert set(file.keys()) == set(given)
        for name, constant in given.items():
            np.testing.assert_array_equal(file.get_tensor(name), constant.load())


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("view", ["transpose", "columns", "column", "steps", "backwards"])
def test_a_view_is_written_as_its_copy_would_be(dtype: str, view: str, tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(-9, 9, (50, 83)).astype(dtype)
    array = {
        "transpose": whole.T,
        "columns": whole[:, 3:40].T,
        "column": whole[:, 7:8],
        "steps": whole[::3, ::5].T,
        "backwards": whole.T[:, ::-1],
    }[view]
    number = helper.np_dtype_to_tensor_dtype(array.dtype)
    write_weights(tmp_path / "w.safetensors", [("view", Constant(number, array.shape, lambda: array))])
    with safe_open(tmp_path / "w.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("view"), array)


def test_data_begins_at_a_page_and_tensors_are_aligned(tmp_path: Path) -> None:
    written = write_weights(tmp_path / "w.safetensors", in_order(constants()))
    assert written.range.offset % PAGE_BYTES == 0
    for spec in written.tensors:
        item_bytes = max(np.dtype(spec.dtype).itemsize, 1)
        assert spec.offset % (64 if spec.nbytes % 64 == 0 else item_bytes) == 0


def test_a_shards_file_has_one_hash_for_its_data_and_one_for_its_header(tmp_path: Path) -> None:
    written = write_weights(tmp_path / "w.safetensors", in_order(constants()))
    data, begin = (tmp_path / "w.safetensors").read_bytes(), written.range.offset
    assert (written.record.nbytes, written.record.ranges_apart) == (len(data), True)
    assert written.record.sha256 == hashlib.sha256(data[:begin]).hexdigest()
    assert written.range.sha256 == hashlib.sha256(data[begin:]).hexdigest()


def test_every_byte_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    class Counting:
        def update(self, piece: memoryview) -> None:
            hashed.append(len(piece))

        def hexdigest(self) -> str:
            return "0" * 64

    monkeypatch.setattr(digests, "hashlib", SimpleNamespace(sha256=Counting))
    rows = {"large": [(0, 10), (10, 64)], "matrix": [(3, 40)]}
    for kind in ({}, {"tables": True}, {"tables": True, "rows": rows}):
        hashed.clear()
        written = write_weights(tmp_path / "w.safetensors", in_order(constants()), **kind)
        assert sum(hashed) == written.record.nbytes


def test_slices_are_hashed_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_PIECE_BYTES", 1000)
    rows = {"large": [(0, 10), (10, 64)], "matrix": [(3, 40)]}
    written = write_weights(tmp_path / "w.safetensors", in_order(constants()), tables=True, rows=rows)
    data = (tmp_path / "w.safetensors").read_bytes()
    assert set(written.slices) == {("large", 0), ("large", 10), ("matrix", 3)}
    for (name, first), part in written.slices.items():
        spec = next(spec for spec in written.tensors if spec.name == name)
        assert part.offset == spec.offset + first * spec.nbytes // spec.shape[0]
        assert part.sha256 == hashlib.sha256(data[part.offset : part.offset + part.nbytes]).hexdigest()
    for part in sorted(written.slices.values(), key=lambda part: -part.offset):
        data = data[: part.offset] + data[part.offset + part.nbytes :]
    assert written.record.sha256 == hashlib.sha256(data).hexdigest()
    assert written.range is None


def test_views_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_PIECE_BYTES", 1000)
    array = np.arange(64 * 96, dtype=np.float32).reshape(64, 96)
    constant = Constant(1, (96, 64), lambda: array.T)
    pieces: list[int] = []
    write_weights(tmp_path / "w.safetensors", [("w", constant)], written=pieces.append)
    assert max(pieces) <= 1000
    assert sum(pieces) == array.nbytes
    with safe_open(tmp_path / "w.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("w"), array.T)


def test_an_error_of_the_disk_is_raised_and_no_thread_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_PIECE_BYTES", 1000)
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_weights(tmp_path / "w.safetensors", in_order(constants()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        signal.signal(signal.SIGXFSZ, handler)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pipeload-writer")]


def test_bfloat16_passes_through(tmp_path: Path) -> None:
    array = np.arange(32).astype(ml_dtypes.bfloat16)
    constant = Constant(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, lambda: array)
    written = write_weights(tmp_path / "w.safetensors", [("w", constant)])
    assert written.tensors[0].dtype == "bfloat16"
    data = (tmp_path / "w.safetensors").read_bytes()[written.range.offset :]
    assert data == array.tobytes()


@pytest.mark.parametrize("name", ["bert", "gpt2", "gptj"])
def test_every_weights_file_of_a_model_opens(name: str, sharded_architecture: Callable[[str], Sharded]) -> None:
    sharded = sharded_architecture(name)
    for path in (sharded.directory / "shards").glob("*.safetensors"):
        length = int.from_bytes(path.read_bytes()[:8], "little")
        assert (8 + length) % PAGE_BYTES == 0
        with safe_open(path, "np") as file:
            assert all(file.get_tensor(key).size for key in file.keys())  # noqa: SIM118 - it is no mapping
