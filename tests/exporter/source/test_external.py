"""External data of any tensor of a graph lies in the graph's folder, or nothing is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper
from tests.exporter.models import write_json, write_onnx

from pipeload.errors import ExportError
from pipeload_export import export
from pipeload_export.source.external import external_files


def tensor(location: str, **place: str) -> TensorProto:
    proto = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **place}.items():
        proto.external_data.add(key=key, value=value)
    return proto


def graph(proto: TensorProto | None = None, node: onnx.NodeProto | None = None) -> GraphProto:
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    nodes = [node or helper.make_node("Identity", ["w"], ["y"])]
    return helper.make_graph(nodes, "g", [], [output], [proto] if proto else [])


def constant(proto: TensorProto) -> onnx.NodeProto:
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.append(AttributeProto(name="value", type=AttributeProto.TENSOR, t=proto))
    return node


def in_initializer(proto: TensorProto) -> ModelProto:
    return helper.make_model(graph(proto))


def in_constant(proto: TensorProto) -> ModelProto:
    return helper.make_model(graph(node=constant(proto)))


def in_subgraph(proto: TensorProto) -> ModelProto:
    branches = {"then_branch": graph(proto), "else_branch": graph(node=constant(proto))}
    return helper.make_model(graph(node=helper.make_node("If", ["c"], ["y"], **branches)))


def in_list(proto: TensorProto) -> ModelProto:
    node = helper.make_node("Custom", [], ["y"])
    node.attribute.append(AttributeProto(name="values", type=AttributeProto.TENSORS, tensors=[proto]))
    return helper.make_model(graph(node=node))


def in_sparse(proto: TensorProto) -> ModelProto:
    model = helper.make_model(graph())
    model.graph.sparse_initializer.add().values.CopyFrom(proto)
    return model


def in_function(proto: TensorProto) -> ModelProto:
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("own", "f", [], ["y"], [constant(proto)], opsets)
    return helper.make_model(graph(), functions=[function])


PLACES = [in_initializer, in_constant, in_subgraph, in_list, in_sparse, in_function]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link", "deep/../../secret"])
def test_data_outside_of_the_folder_is_refused(
    tmp_path: Path, place: Callable[[TensorProto], ModelProto], location: str
) -> None:
    (tmp_path / "secret").write_bytes(bytes(8))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ExportError, match=f"'m' has weights at '{location}', outside of its own folder"):
        external_files(place(tensor(location, length="8")), tmp_path / "m" / "m.onnx", "m")


@pytest.mark.parametrize("place", PLACES)
def test_data_that_is_missing_or_short_is_refused(tmp_path: Path, place: Callable[[TensorProto], ModelProto]) -> None:
    model = place(tensor("data", offset="4", length="8"))
    with pytest.raises(ExportError, match="'data', which is missing"):
        external_files(model, tmp_path / "m.onnx", "m")
    (tmp_path / "data").write_bytes(bytes(11))
    with pytest.raises(ExportError, match="'data', which has 11 of 12 bytes"):
        external_files(model, tmp_path / "m.onnx", "m")
    (tmp_path / "data").write_bytes(bytes(12))
    assert external_files(model, tmp_path / "m.onnx", "m") == (tmp_path / "data",)


def test_data_in_folders_below_is_found(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "data").write_bytes(bytes(8))
    found = external_files(in_initializer(tensor("a/b/data")), tmp_path / "m.onnx", "m")
    assert found == (tmp_path / "a" / "b" / "data",)


@pytest.mark.parametrize("place", [{"offset": "-8"}, {"length": "x"}, {"offset": "1.5"}])
def test_a_place_that_is_no_number_is_refused(tmp_path: Path, place: dict[str, str]) -> None:
    with pytest.raises(ExportError, match="has the tensor 'w' at no possible place of 'data'"):
        external_files(in_constant(tensor("data", **place)), tmp_path / "m.onnx", "m")


def hub_cache(folder: Path) -> Path:
    """A model as the hub's cache lays it: links to blobs, the graph one folder below config.json. Returns the graph."""
    repository, graph = folder / "models--a--b", folder / "plain" / "model.onnx"
    write_onnx(graph, external=True)
    write_json(folder / "plain" / "config.json", {"model_type": "bert"})
    snapshot = repository / "snapshots" / "c0ffee"
    places = {"onnx/model.onnx": "model.onnx", "onnx/model.onnx_data": "model.onnx_data", "config.json": "config.json"}
    (repository / "blobs").mkdir(parents=True)
    for number, (place, name) in enumerate(places.items()):
        blob = (folder / "plain" / name).rename(repository / "blobs" / f"{number:064x}")
        (snapshot / place).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / place).symlink_to(os.path.relpath(blob, (snapshot / place).parent))
    return snapshot / "onnx" / "model.onnx"


def test_a_graph_in_the_cache_of_the_hub_exports_with_the_config_above_it(tmp_path: Path) -> None:
    manifest = export(hub_cache(tmp_path), tmp_path / "out")
    assert manifest.model_type == "bert"
    assert "config.json" in {record.path for record in manifest.files}


def test_only_blobs_of_its_own_repository_are_inside(tmp_path: Path) -> None:
    path = hub_cache(tmp_path)
    (tmp_path / "models--x--y" / "blobs").mkdir(parents=True)
    (tmp_path / "models--x--y" / "blobs" / "data").write_bytes(bytes(8))
    (path.parent / "link").symlink_to(tmp_path / "models--x--y" / "blobs" / "data")
    for location in ("link", "../../../blobs/" + "1".zfill(64)):
        with pytest.raises(ExportError, match="outside of its own folder"):
            external_files(in_constant(tensor(location, length="8")), path, "m")
