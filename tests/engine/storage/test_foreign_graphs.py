"""A graph takes from files, and makes, the tensors that the manifest lists: nothing is loaded that is in no plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine import toy as toys
from tests.engine.storage.reading import BLOCK, open_graph

import pipeload
from pipeload.errors import ShardError
from pipeload.format import manifest as manifests
from pipeload.format.graphs import check_graph
from pipeload.format.manifest import MANIFEST_NAME
from pipeload.storage.weights import Storage

onnx = pytest.importorskip("onnx")


def _drop_tensor(content: Any) -> None:
    content["shards"][BLOCK]["tensors"].pop()


def _drop_output(content: Any) -> None:
    content["shards"][-1]["outputs"] = []
    content["outputs"] = []


@pytest.mark.parametrize("verify", [True, False])
def test_an_initializer_that_the_manifest_leaves_out_is_named(toy_copy: Path, verify: bool) -> None:
    _edit(toy_copy, _drop_tensor)
    with pytest.raises(
        ShardError, match=r"block\.001\.onnx' is not the graph .* takes 'block\.1\.b' from .* nothing of"
    ):
        with pipeload.load(toy_copy, "8GB", verify=verify) as model:
            model.run(toys.inputs())


def test_an_output_that_the_manifest_leaves_out_is_named(toy_copy: Path) -> None:
    _edit(toy_copy, _drop_output)
    manifest = manifests.read(toy_copy)
    with pytest.raises(
        ShardError, match=r"epilogue\.onnx' .* it makes \['last_hidden_state'\], the manifest says \[\]"
    ):
        open_graph(Storage(toy_copy, manifest), manifest.shards[-1])


def _other_name(model: Any) -> None:
    model.graph.initializer[0].name = "other"


def _other_shape(model: Any) -> None:
    model.graph.initializer[0].dims[:] = [1, 64]


def _other_dtype(model: Any) -> None:
    model.graph.initializer[0].data_type = onnx.TensorProto.INT32


def _set_entry(key: str, value: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        next(entry for entry in model.graph.initializer[0].external_data if entry.key == key).value = value

    return change


def _in_a_constant(model: Any) -> None:
    tensor = onnx.TensorProto()
    tensor.CopyFrom(model.graph.initializer[0])
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["more"], value=tensor))


def _in_a_branch(model: Any) -> None:
    tensor = onnx.TensorProto()
    tensor.CopyFrom(model.graph.initializer[0])
    branch = onnx.helper.make_graph([], "branch", [], [], [tensor])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["more"], then_branch=branch, else_branch=branch))


def _one_more_output(model: Any) -> None:
    model.graph.output.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_name, "takes 'other' from"),
        (_other_shape, r"the manifest says .*\(64, 64\)"),
        (_other_dtype, "'int32'.*the manifest says .*'float32'"),
        (_set_entry("location", "block.002.safetensors"), r"block\.002"),
        (_set_entry("location", "../../x"), r"\.\./\.\./x"),
        (_set_entry("location", "*/_ORT_MEM_ADDR_/*"), "_ORT_MEM_ADDR_"),
        (_set_entry("offset", "8192"), "'8192'"),
        (_set_entry("length", "1"), "'1'"),
        (_in_a_constant, "in the middle of the graph"),
        (_in_a_branch, "in the middle of the graph"),
        (_one_more_output, "it makes .*'more'"),
        (lambda model: model.graph.initializer.pop(0), "it does not take"),
    ],
)
def test_what_a_graph_takes_or_makes_otherwise_is_named(toy: Path, change: Callable[[Any], object], words: str) -> None:
    shard = manifests.read(toy).shards[BLOCK]
    data = (toy / shard.graph.path).read_bytes()
    check_graph(shard, data)
    model = onnx.load_from_string(data)
    change(model)
    with pytest.raises(ShardError, match=rf"block\.001\.onnx' is not the graph that the manifest describes: .*{words}"):
        check_graph(shard, model.SerializeToString())


def test_every_cut_or_garbled_graph_is_a_shard_error_or_means_the_same(toy: Path) -> None:
    shard = manifests.read(toy).shards[BLOCK]
    data = (toy / shard.graph.path).read_bytes()
    for at in range(0, len(data) - 1, 7):
        for garbled in (data[:at], data[:at] + b"\xff" + data[at + 1 :], data[:at] + b"\x0b" + data[at:]):
            try:
                check_graph(shard, garbled)
            except ShardError as error:
                assert "block.001.onnx' is no" in str(error)  # noqa: PT017 - either outcome is right


def test_a_graph_that_is_nested_without_end_is_a_shard_error(toy: Path) -> None:
    shard = manifests.read(toy).shards[BLOCK]
    graph = b""
    for _ in range(300):
        for number in (6, 5, 1):
            graph = bytes([number << 3 | 2]) + _varint(len(graph)) + graph
    with pytest.raises(ShardError, match="nested more than 100 deep"):
        check_graph(shard, bytes([7 << 3 | 2]) + _varint(len(graph)) + graph)


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _edit(directory: Path, change: Callable[[Any], object]) -> None:
    content = json.loads((directory / MANIFEST_NAME).read_bytes())
    change(content)
    (directory / MANIFEST_NAME).write_text(json.dumps(content))


def test_the_check_does_not_ask_for_the_working_directory(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host may change it at any moment, while a loader checks a graph."""
    manifest = manifests.read(toy)

    def asked() -> str:
        pytest.fail("the working directory was asked for")

    with monkeypatch.context() as patch:
        patch.setattr("os.getcwd", asked)
        for shard in manifest.shards:
            check_graph(shard, (toy / shard.graph.path).read_bytes())
