"""Where the weights of a graph lie: in one file, in many, in sub-folders, behind links; never outside of its folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from tests.exporter.conftest import Sharded, assert_same_answers
from tests.exporter.graphs import WIDTH, Builder, encoder

from pipeload.errors import ExportError
from pipeload_export import export
from pipeload_export.check.chain import run_unsplit
from pipeload_export.split import split


def _in_one_file(source: Path, target: Path) -> None:
    onnx.save(onnx.load(source), target, save_as_external_data=True, location="weights.data", size_threshold=0)


def _in_many_files(source: Path, target: Path) -> None:
    onnx.save(onnx.load(source), target, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)


def _in_sub_folders(source: Path, target: Path) -> None:
    model = onnx.load(source)
    for place, tensor in enumerate(model.graph.initializer):
        location = f"weights/{place % 3}/{place}.bin"
        file = target.parent / location
        file.parent.mkdir(parents=True, exist_ok=True)
        data = numpy_helper.to_array(tensor).tobytes()
        file.write_bytes(data)
        tensor.raw_data = data
        set_external_data(tensor, location, offset=0, length=len(data))
        tensor.ClearField("raw_data")
        for field in ("float_data", "int32_data", "int64_data"):
            tensor.ClearField(field)
    onnx.save(model, target)


@pytest.mark.parametrize("layout", [_in_one_file, _in_many_files, _in_sub_folders])
def test_external_data(layout: Any, variant: Callable[..., Path], assert_right: Callable[..., Any]) -> None:
    manifest = assert_right(variant("bert", layout), "bert")
    assert sum(shard.role == "block" for shard in manifest.shards) == 3


def test_four_bit_weights_in_a_file(tmp_path: Path) -> None:
    builder = Builder(opset=21)
    x = builder.embed(builder.input("input_ids", ["batch", "length"]))
    for place in range(3):
        values = builder.random.integers(-8, 8, (WIDTH, WIDTH)).ravel().tolist()
        builder.initializers.append(helper.make_tensor(f"quarter.{place}", TensorProto.INT4, [WIDTH, WIDTH], values))
        weight = builder.op("DequantizeLinear", f"quarter.{place}", builder.constant(0.05, np.float32))
        x = builder.op("Add", x, builder.op("MatMul", builder.norm(x), weight))
    builder.output(x, "hidden", ["batch", "length", WIDTH])
    path = tmp_path / "model.onnx"
    onnx.save(builder.model(), path, save_as_external_data=True, location="weights.data", size_threshold=0)
    sharded = Sharded(path, tmp_path / "sharded")
    assert sharded.blocks == 3
    inputs = sharded.inputs({"batch": 2, "length": 5})
    wanted = onnxruntime.InferenceSession(path).run(["hidden"], inputs)
    assert_same_answers({"hidden": wanted[0]}, sharded.run(inputs))


def _external(name: str, location: str) -> TensorProto:
    tensor = numpy_helper.from_array(numpy_helper.to_array(encoder().model().graph.initializer[0]), name)
    set_external_data(tensor, location, offset=0, length=len(tensor.raw_data))
    tensor.ClearField("raw_data")
    return tensor


def _initializer(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.initializer.append(tensor)


def _constant(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["more"], value=tensor))


def _branch(model: ModelProto, tensor: TensorProto) -> None:
    value = helper.make_tensor_value_info("taken", TensorProto.FLOAT, None)
    inner = helper.make_graph([helper.make_node("Constant", [], ["taken"], value=tensor)], "branch", [], [value])
    branches = {"then_branch": inner, "else_branch": inner}
    model.graph.node.append(helper.make_node("If", ["condition"], ["chosen"], **branches))
    model.graph.initializer.append(helper.make_tensor("condition", TensorProto.BOOL, [], [True]))


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "link.bin"])
@pytest.mark.parametrize("hide", [_initializer, _constant, _branch])
def test_no_tensor_of_any_kind_is_read_from_outside(hide: Any, location: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = encoder().model()
    hide(model, _external("more", location))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="outside of its own folder"):
        split(folder / "model.onnx", tmp_path)
    with pytest.raises(ExportError, match="outside of its own folder"):
        export(folder / "model.onnx", tmp_path / "target")
    with pytest.raises(ExportError, match="outside of its own folder"):
        run_unsplit(folder / "model.onnx", [], [], lambda *_: None)


def test_a_model_and_its_data_may_both_be_links_into_one_store(variant: Callable[..., Path], tmp_path: Path) -> None:
    """As the hub's cache lays them."""
    model, store, folder = variant("bert", _in_one_file), tmp_path / "blobs", tmp_path / "snapshots" / "main"
    shutil.move(model.parent, store)
    folder.mkdir(parents=True)
    for name in ("model.onnx", "weights.data"):
        (folder / name).symlink_to(store / name)
    (tmp_path / "shards").mkdir()
    assert sum(shard.role == "block" for shard in split(folder / "model.onnx", tmp_path / "shards").shards) == 3
