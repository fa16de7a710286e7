"""Weights that are stored in 16 bits give the answers of the same weights in 32, bit for bit, under every plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from tests.engine import toy as toys
from tests.engine.harness import assert_same, run_sequentially
from tests.engine.pipeline.rig import NAMES, rigged
from tests.models import TOYS

from pipeload.errors import ShardError
from pipeload.format import manifest as manifests
from pipeload.format.casts import without_casts
from pipeload.format.manifest import Manifest, Shard

onnx = pytest.importorskip("onnx")

BLOCKS = NAMES[1:-1]


@pytest.fixture(scope="module")
def narrow(made_toys: Callable[[str], Path]) -> Path:
    return made_toys("toy-narrow")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same values in float32."""
    options = {**TOYS["toy-narrow"], "narrow": False, "rounded": True}
    return toys.make_toy(tmp_path_factory.mktemp("wide") / "toy", **options)


def _ranges(shard: Shard) -> list[tuple[int, int]]:
    """Every way to stream a part of a shard: tensors next to each other, or nothing."""
    assert shard.weights is not None
    places = [*(spec.offset - shard.weights.offset for spec in shard.tensors), shard.nbytes]
    return [(0, 0), *((begin, end) for begin in places for end in places if begin < end)]


def test_half_the_bytes_are_stored_and_the_answers_stay(narrow: Path, wide: Path) -> None:
    few, many = manifests.read(narrow).weight_bytes, manifests.read(wide).weight_bytes
    assert few < 0.55 * many
    for batch, length in ((1, 1), (2, 5), (3, 40)):
        inputs = toys.inputs(batch, length)
        assert_same(run_sequentially(narrow, inputs, threads=1), run_sequentially(wide, inputs, threads=1))


@pytest.mark.parametrize("loaders", [1, 3])
def test_streamed_parts_of_every_kind(narrow: Path, wide: Path, loaders: int) -> None:
    manifest = manifests.read(narrow)
    expected = run_sequentially(wide, toys.inputs(), threads=1)
    for streamed in _ranges(manifest.shards[1]):
        partly = {name: streamed for name in BLOCKS if streamed != (0, manifest.shards[1].nbytes)}
        with rigged(narrow, partly=partly, loaders=loaders, buffers=2) as rig:
            for _ in range(3):
                assert_same(rig.run(), expected)
            steady = [nbytes for name, nbytes in rig.storage.read_bytes if name == "block.002"][1:]
            assert set(steady) == {streamed[1] - streamed[0]}


@pytest.mark.parametrize("packed", [False, True])
def test_resident_shards(narrow: Path, wide: Path, packed: bool) -> None:
    expected = run_sequentially(wide, toys.inputs(), threads=1)
    resident = ("prologue", "block.001", "block.004", "epilogue")
    with rigged(narrow, resident=resident, packed=packed, partly={"block.000": (0, 0)}) as rig:
        for _ in range(3):
            assert_same(rig.run(), expected)
            rig.wait(lambda: not rig.exchange.residents.packing)


def test_streamed_shards_that_are_packed(narrow: Path, wide: Path) -> None:
    with rigged(narrow, packed_streamed=True) as rig:
        for _ in range(3):
            assert_same(rig.run(), run_sequentially(wide, toys.inputs(), threads=1))


def test_a_decoder_with_a_tied_head(made_toys: Callable[[str], Path], tmp_path: Path) -> None:
    options = {**TOYS["toy-narrow-decoder"], "narrow": False, "rounded": True}
    wide = toys.make_toy(tmp_path / "wide", **options)
    few = run_sequentially(made_toys("toy-narrow-decoder"), toys.inputs(), threads=1)
    assert_same(few, run_sequentially(wide, toys.inputs(), threads=1))
    assert few["logits"].dtype == np.float32


def test_plain_onnxruntime_runs_every_shard(narrow: Path) -> None:
    manifest = manifests.read(narrow)
    values: dict[str, Any] = dict(toys.inputs())
    table = onnx.load(narrow / manifest.shards[0].graph.path, load_external_data=False)
    assert {node.op_type for node in table.graph.node} >= {"Cast", "MatMul"}
    lookup = manifest.shards[0].lookups[0]
    rows = np.fromfile(narrow / lookup.path, np.uint16, offset=lookup.table.offset)
    rows = rows[: np.prod(lookup.table.shape)].reshape(lookup.table.shape)
    values[lookup.output] = (rows.astype(np.uint32) << 16).view(np.float32)[values[lookup.indices]]
    for shard in manifest.shards:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(narrow / shard.graph.path, options, providers=["CPUExecutionProvider"])
        made = session.run(list(shard.outputs), {name: values[name] for name in shard.inputs})
        values.update(zip(shard.outputs, made, strict=True))
    outputs = {spec.name: values[spec.name] for spec in manifest.outputs}
    assert_same(outputs, run_sequentially(narrow, toys.inputs(), threads=1))


# The graph without its casts


def _parsed(manifest: Manifest, directory: Path, shard: Shard) -> tuple[Any, Any]:
    data = (directory / shard.graph.path).read_bytes()
    changed = without_casts(shard, data)
    assert changed is not None
    return onnx.load_model_from_string(data), onnx.load_model_from_string(changed)


def test_only_casts_of_weights_leave_the_graph(narrow: Path) -> None:
    manifest = manifests.read(narrow)
    # The prologue casts its mask too.
    before, after = _parsed(manifest, narrow, manifest.shards[0])
    kinds = [node.op_type for node in before.graph.node]
    assert [node.op_type for node in after.graph.node] == kinds[1:]
    assert kinds.count("Cast") == 2
    for shard in manifest.shards:
        if any(spec.widened for spec in shard.tensors):
            before, after = _parsed(manifest, narrow, shard)
            found = {one.name: (one.data_type, tuple(one.dims)) for one in after.graph.initializer}
            for spec in shard.tensors:
                assert found[spec.widened or spec.name] == (onnx.TensorProto.FLOAT, spec.shape)
            assert (before.ir_version, before.opset_import) == (after.ir_version, after.opset_import)
            assert (before.graph.input, before.graph.output) == (after.graph.input, after.graph.output)


def test_a_graph_without_casts_stays_as_it_is(toy: Path) -> None:
    for shard in manifests.read(toy).shards:
        assert without_casts(shard, (toy / shard.graph.path).read_bytes()) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda node: setattr(node, "op_type", "Identity"),
        lambda node: node.input.__setitem__(0, "other"),
        lambda node: node.output.__setitem__(0, "other"),
        lambda node: node.attribute.pop(),
        lambda node: node.attribute.add(name="more", i=1, type=2),
    ],
)
def test_a_cast_that_is_not_the_manifests_is_named(narrow: Path, change: Callable[[Any], object]) -> None:
    shard = manifests.read(narrow).shards[1]
    model = onnx.load(narrow / shard.graph.path, load_external_data=False)
    change(model.graph.node[0])
    with pytest.raises(ShardError, match=r"it does not cast 'block.0.w' to 'block.0.w.wide'. Export the model again"):
        without_casts(shard, model.SerializeToString())


def test_a_cast_may_have_a_name_and_a_description(narrow: Path) -> None:
    shard = manifests.read(narrow).shards[1]
    plain = onnx.load(narrow / shard.graph.path, load_external_data=False)
    named = onnx.load(narrow / shard.graph.path, load_external_data=False)
    for node in named.graph.node:
        if node.op_type == "Cast":
            node.name, node.doc_string, node.domain = "widens", "to float32", ""
    assert without_casts(shard, named.SerializeToString()) == without_casts(shard, plain.SerializeToString())


def test_an_operator_whose_name_is_no_text_is_named(narrow: Path) -> None:
    shard = manifests.read(narrow).shards[1]
    data = (narrow / shard.graph.path).read_bytes()
    assert b"Tanh" in data
    with pytest.raises(ShardError, match=r"'shards/block\.000\.onnx' is no ONNX graph: .*export the model again"):
        without_casts(shard, data.replace(b"Tanh", b"T\xffnh"))
