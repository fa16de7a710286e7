"""Merged shards are one valid graph over the same files, and compute the outputs of the chain of shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tests.exporter.conftest import ARCHITECTURES, Arrays, Sharded, assert_same_answers

from pipeload.errors import ExportError
from pipeload_export.check.merge import merge

DIMS = {"batch_size": 2, "sequence_length": 7, "num_channels": 3, "height": 32, "width": 32}


def _run(graph: Path, folder: Path, inputs: Arrays) -> Arrays:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_shards_compute_what_the_chain_computes(
    name: str, sharded_architecture: Callable[[str], Sharded], tmp_path: Path
) -> None:
    sharded = sharded_architecture(name)
    graph = merge(sharded.directory, tmp_path / "merged.onnx")
    dims = {symbol: DIMS.get(symbol, 5) for symbol in sharded.manifest.dims}
    inputs = sharded.inputs(dims)
    assert_same_answers(sharded.run(inputs), _run(graph, sharded.directory, inputs))


def test_no_weight_is_copied(sharded_architecture: Callable[[str], Sharded], tmp_path: Path) -> None:
    sharded = sharded_architecture("gpt2")
    graph = onnx.load(merge(sharded.directory, tmp_path / "merged.onnx"), load_external_data=False).graph
    places = {}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            places[tensor.name] = entries["location"], int(entries["offset"]), int(entries["length"])
        else:
            assert len(tensor.raw_data) < 4096
    manifest = sharded.manifest
    wanted = {(s.weights.path, t.offset, t.nbytes) for s in manifest.shards if s.weights for t in s.tensors}
    wanted |= {(look.path, look.table.offset, look.table.nbytes) for s in manifest.shards for look in s.lookups}
    assert set(places.values()) == wanted


def test_the_graph_is_valid_and_has_the_models_inputs_and_outputs(
    sharded_architecture: Callable[[str], Sharded], tmp_path: Path
) -> None:
    sharded = sharded_architecture("llama")
    model = onnx.load(merge(sharded.directory, tmp_path / "merged.onnx"), load_external_data=False)
    assert [value.name for value in model.graph.input] == [spec.name for spec in sharded.manifest.inputs]
    assert [value.name for value in model.graph.output] == [spec.name for spec in sharded.manifest.outputs]
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    made = [name for node in model.graph.node for name in node.output if name]
    made += [tensor.name for tensor in model.graph.initializer]
    assert len(set(made)) == len(made)


def test_shards_with_different_opsets_are_refused(
    sharded_architecture: Callable[[str], Sharded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = sharded_architecture("bert")
    load = onnx.load

    def older(path: Path, **options: object) -> onnx.ModelProto:
        model = load(path, **options)
        if path.name == "block.001.onnx":
            model.opset_import[0].version -= 1
        return model

    monkeypatch.setattr(onnx, "load", older)
    with pytest.raises(ExportError, match=r"block\.001.*opset"):
        merge(sharded.directory, tmp_path / "merged.onnx")


def test_answers_are_those_of_the_original_graph(
    sharded_architecture: Callable[[str], Sharded], tmp_path: Path
) -> None:
    sharded = sharded_architecture("vit")
    graph = merge(sharded.directory, tmp_path / "merged.onnx")
    inputs = {"pixel_values": np.random.default_rng(1).standard_normal((1, 3, 32, 32), dtype=np.float32)}
    assert_same_answers(_run(sharded.unsplit, sharded.unsplit.parent, inputs), _run(graph, sharded.directory, inputs))
