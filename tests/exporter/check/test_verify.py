"""Every kind of damage is found and named, and so is a model that computes something else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.digests import expected_record
from tests.engine.toy import make_toy
from tests.exporter.models import ROWS, write_gpt2, write_onnx
from tests.models import traced_here
from tests.shared import folder_of_the_run, made_by_one
from tests.variants.changes import half

from pipeload.errors import ConfigError, ExportError, ManifestError, PipeloadError, ShardError
from pipeload.format.manifest import Cache, Manifest, Shard, Verification, read, write
from pipeload_export import export, verify
from pipeload_export.check import cases as samples_module
from pipeload_export.check import compare as compare_module
from pipeload_export.check.cases import Case, index_limits, sample_cases
from pipeload_export.check.compare import _best, _difference, limit_of

WEIGHTS = "shards/block.001.safetensors"
GRAPH = "shards/block.001.onnx"


@pytest.fixture
def unsplit(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "model.onnx")


@pytest.fixture
def exported(unsplit: Path, tmp_path: Path) -> Path:
    export(unsplit, tmp_path / "exported")
    return tmp_path / "exported"


def spoil(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


def rehash(directory: Path) -> None:
    """Make the manifest agree with the files, as an attacker or a broken tool would."""
    manifest = read(directory)
    records = {
        record.path: expected_record(directory, record.path, manifest.shards, apart=record.ranges_apart)
        for record in manifest.files
    }

    def fresh(shard: Shard) -> Shard:
        weights = shard.weights
        if weights is not None:
            data = (directory / weights.path).read_bytes()[weights.offset : weights.offset + weights.nbytes]
            weights = replace(weights, sha256=hashlib.sha256(data).hexdigest())
        return replace(shard, graph=records[shard.graph.path], weights=weights)

    write(
        replace(manifest, files=tuple(records.values()), shards=tuple(map(fresh, manifest.shards))),
        directory,
    )


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


def change_graph(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def test_report(exported: Path, unsplit: Path) -> None:
    report = verify(exported, unsplit)
    manifest = read(exported)
    assert (report.shards, report.files) == (len(manifest.shards), len(manifest.files))
    assert report.nbytes == sum((exported / record.path).stat().st_size for record in manifest.files)
    assert report.differences == manifest.verification
    assert len(report.cases) >= 4
    assert (len(report.checks), report.skipped) == (5, ())


def test_without_the_unsplit_model(exported: Path, tmp_path: Path) -> None:
    report = verify(exported)
    assert report.differences == ()
    assert report.skipped == (
        "comparison with the unsplit model: pass it with --against",
        "comparison with the source: pass the checkpoint with --source",
    )
    with pytest.raises(ConfigError, match="no unsplit model at"):
        verify(exported, tmp_path / "nowhere.onnx")


def test_without_the_extra(exported: Path, unsplit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeload_export.extra.find_spec", lambda _: None)
    report = verify(exported)
    assert any("pip install '.[export]' in" in skipped for skipped in report.skipped)
    flip(exported / WEIGHTS, -1)
    with pytest.raises(ShardError, match=WEIGHTS):
        verify(exported)
    with pytest.raises(ExportError, match=r"'\.\[export\]' in the folder"):
        verify(exported, unsplit)


def test_engines_own_models_pass(tmp_path: Path) -> None:
    for decoder in (False, True):
        directory = make_toy(tmp_path / str(decoder), decoder=decoder)
        assert len(verify(directory).checks) == 4


class TestDamage:
    @pytest.mark.parametrize("path", [WEIGHTS, GRAPH, "shards/embeddings.safetensors"])
    def test_flipped_bit(self, exported: Path, path: str) -> None:
        flip(exported / path, -1)
        with pytest.raises(ShardError, match=f"'{path}' is damaged"):
            verify(exported)

    def test_truncated_missing_and_foreign_are_named_together(self, exported: Path, tmp_path: Path) -> None:
        os.truncate(exported / WEIGHTS, 5000)
        (exported / GRAPH).unlink()
        moved = tmp_path / "elsewhere"
        (exported / "shards/block.000.onnx").rename(moved)
        (exported / "shards/block.000.onnx").symlink_to(moved)
        with pytest.raises(ShardError) as caught:
            verify(exported)
        for text in (
            f"'{WEIGHTS}' has 5000 bytes",
            f"'{GRAPH}' cannot be read",
            "'shards/block.000.onnx' leads out of the model directory",
        ):
            assert text in str(caught.value)

    @pytest.mark.parametrize(
        "swap",
        [
            {"dtype": "F64"},
            {"shape": [4, 64]},
            {"data_offsets": [0, 8]},
        ],
    )
    def test_header_that_says_something_else(self, exported: Path, swap: dict[str, Any]) -> None:
        path = exported / WEIGHTS
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header[next(name for name in header if name != "__metadata__")] |= swap
        text = json.dumps(header).encode().ljust(length)
        path.write_bytes(data[:8] + text[:length] + data[8 + length :])
        rehash(exported)
        with pytest.raises(PipeloadError, match=r"block\.001"):
            verify(exported)

    def test_external_data_that_points_elsewhere(self, exported: Path) -> None:
        def shift(model: onnx.ModelProto) -> None:
            tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
            entry = next(e for e in tensor.external_data if e.key == "offset")
            entry.value = str(int(entry.value) + 64)

        change_graph(exported / GRAPH, shift)
        rehash(exported)
        with pytest.raises(ExportError, match=r"'block\.001'"):
            verify(exported)

    def test_graph_that_is_not_valid(self, exported: Path) -> None:
        change_graph(exported / GRAPH, spoil)
        rehash(exported)
        with pytest.raises(ExportError, match=r"onnx.checker refuses shard 'block\.001'.*NoSuchOperator"):
            verify(exported)

    def test_output_of_another_name(self, exported: Path) -> None:
        def rename(model: onnx.ModelProto) -> None:
            for node in model.graph.node:
                node.output[:] = ["other" if o == model.graph.output[0].name else o for o in node.output]
            model.graph.output[0].name = "other"

        change_graph(exported / GRAPH, rename)
        rehash(exported)
        with pytest.raises(ExportError, match=r"'block\.001' has the outputs \['other'\], the manifest says"):
            verify(exported)

    def test_graphs_of_several_shards_are_named_together(self, exported: Path) -> None:
        for name in ("block.000", "block.002"):
            change_graph(exported / GRAPH.replace("block.001", name), spoil)
        rehash(exported)
        with pytest.raises(ExportError, match=r"'block\.000'(?s:.*)'block\.002'"):
            verify(exported)

    def test_no_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(ManifestError, match="is not a sharded model directory"):
            verify(tmp_path)


class TestAnswers:
    def test_other_weights(self, exported: Path, unsplit: Path) -> None:
        path = exported / WEIGHTS
        flip(path, -1)
        rehash(exported)
        verify(exported)
        with pytest.raises(
            ExportError, match=r"Output 'last_hidden_state' .* differs .* by .* of its range; the limit"
        ):
            verify(exported, unsplit)

    def test_other_model(self, exported: Path, tmp_path: Path) -> None:
        def rename(model: onnx.ModelProto) -> None:
            model.graph.input[0].name = model.graph.node[0].input[1] = "ids"

        other = write_onnx(tmp_path / "other.onnx")
        change_graph(other, rename)
        with pytest.raises(ExportError, match=r"graph of another model than the shards: it takes 'ids', .* \(2 such"):
            verify(exported, other)
        (tmp_path / "text.onnx").write_text("no graph")
        with pytest.raises(ExportError, match=r"does not open the unsplit graph .*Fetch or export it again"):
            verify(exported, tmp_path / "text.onnx")
        with pytest.raises(ConfigError, match=r"no unsplit model at .*--keep-onnx"):
            verify(exported, tmp_path / "missing.onnx")

    def test_graph_without_an_output_of_the_shards(self, exported: Path, tmp_path: Path) -> None:
        def rename(model: onnx.ModelProto) -> None:
            for node in model.graph.node:
                node.output[:] = ["other" if o == "last_hidden_state" else o for o in node.output]
            model.graph.output[0].name = "other"

        other = write_onnx(tmp_path / "other.onnx")
        change_graph(other, rename)
        with pytest.raises(ExportError, match=r"another model than the shards: it makes no 'last_hidden_state'\. Pass"):
            verify(exported, other)

    def test_limits(self) -> None:
        assert limit_of("float32") == 1e-4
        assert limit_of("float32") < limit_of("float16") < limit_of("bfloat16")
        assert limit_of("int64") == 0

    def test_the_coarsest_type_inside_counts(self) -> None:
        assert limit_of("float32", {"int64", "float32", "float16"}) == limit_of("float16")
        assert limit_of("int64", {"float16"}) == 0

    def test_what_onnxruntimes_own_levels_change_is_allowed_up_to_a_tenth(self) -> None:
        def found(error: float) -> Verification:
            return Verification(output="logits", max_abs_error=error, max_rel_error=error, limit=1e-4)

        assert _best(found(0.5), found(0.0), found(0.5)) == replace(found(0.0), limit=0.1)
        assert _best(found(0.004), found(0.02), found(0.018)) == replace(found(0.004), limit=0.018)
        assert _best(found(0.5), found(0.4), found(1e-6)) == found(0.4)
        exact = Verification(output="ids", max_abs_error=1.0, max_rel_error=0.1, limit=0.0)
        assert _best(exact, exact, exact) == exact

    def test_range_is_that_of_all_cases(self) -> None:
        # One case alone may have next to no range, as a classifier's two logits for one text.
        wanted = [np.array([[1.0, 1.0]], np.float32), np.array([[1.0, 3.0]], np.float32)]
        found = [wanted[0] + np.float32(2**-20), wanted[1]]
        result = _difference("logits", wanted, found, [Case(name="", inputs={})] * 2, [0, 1], 1e-4)
        assert (result.max_abs_error, result.max_rel_error) == (2**-20, 2**-21)

    @pytest.mark.parametrize(("steps", "right"), [(4, True), (400, False)])
    def test_an_output_that_hardly_changes_may_be_rounded(self, steps: int, right: bool) -> None:
        # Boxes of an untrained DETR: all near 0.5, with a range of a few roundings.
        wanted = np.array([[0.5, 0.5 + 2**-21]], np.float32)
        found = wanted + np.float32(steps * 2**-24)
        result = _difference("boxes", [wanted], [found], [Case(name="", inputs={})], [0], limit_of("float32"))
        assert (result.max_rel_error <= result.limit) is right

    @pytest.mark.parametrize("wrong", [False, True])
    def test_16_bit_edges_allow_what_another_rounding_of_them_changes(
        self, unsplit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
    ) -> None:
        narrow, other = tmp_path / "narrow.onnx", tmp_path / "other.onnx"
        half(keep_io_types=False)(unsplit, narrow)
        half(keep_io_types=False)(write_onnx(other, seed=int(wrong)), other)
        export(narrow, tmp_path / "narrow")
        # As deep models have it: the usual limit is less than roundings add up to.
        monkeypatch.setitem(compare_module._LIMITS, "float16", 1e-6)
        with pytest.raises(ExportError, match=r"the limit is 0\.0") if wrong else nullcontext():
            report = verify(tmp_path / "narrow", other)
            assert 1e-6 < report.differences[0].max_rel_error < report.differences[0].limit < 0.01

    def test_nan_must_be_nan(self, exported: Path, tmp_path: Path) -> None:
        # A model that says NaN for everything: the shards, which do not, must not pass as equal.
        other = write_onnx(tmp_path / "nan.onnx")

        def spoil(model: onnx.ModelProto) -> None:
            scale = next(t for t in model.graph.initializer if t.name == "scale")
            scale.raw_data = np.full(16 * 16, np.nan, np.float32).tobytes()

        change_graph(other, spoil)
        with pytest.raises(ExportError, match="differs from the unsplit model by"):
            verify(exported, other)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def write(folder: Path) -> None:
        with traced_here():
            export(write_gpt2(folder / "checkpoint"), folder / "gpt2", keep_onnx=folder / "onnx")

    return made_by_one(folder_of_the_run(tmp_path_factory) / "decoder-to-verify", write)


class TestDecoder:
    def test_every_output_is_compared(self, decoder: Path) -> None:
        report = verify(decoder / "gpt2", decoder / "onnx" / "model.onnx")
        names = {f"present.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")}
        assert {result.output for result in report.differences} == {"logits", *names}

    @pytest.mark.slow
    def test_wrong_pair_of_caches(self, decoder: Path, tmp_path: Path) -> None:
        shutil.copytree(decoder / "gpt2", tmp_path / "gpt2")
        manifest = read(tmp_path / "gpt2")
        first, second, *others = manifest.caches
        swapped = (replace(first, output=second.output), replace(second, output=first.output), *others)
        write(replace(manifest, caches=swapped), tmp_path / "gpt2")
        with pytest.raises(ExportError, match=f"Output '{second.output}' continues the cache '{second.input}'"):
            verify(tmp_path / "gpt2", decoder / "onnx" / "model.onnx")

    def test_samples_fill_the_cache(self, decoder: Path) -> None:
        manifest = read(decoder / "gpt2")
        pasts = {case.inputs["past_key_values.0.key"].shape[2] for case in sample_cases(manifest, decoder / "gpt2")}
        batches = {len(case.inputs["input_ids"]) for case in sample_cases(manifest, decoder / "gpt2")}
        assert 0 in pasts
        assert len(pasts) > 2
        assert batches == {1, 2}


class TestSamples:
    def test_are_the_same_every_time(self, exported: Path) -> None:
        manifest = read(exported)
        for one, two in zip(sample_cases(manifest, exported), sample_cases(manifest, exported), strict=True):
            assert one.name == two.name
            for name, array in one.inputs.items():
                np.testing.assert_array_equal(array, two.inputs[name])

    def test_ids_stay_below_the_rows_of_the_table(self, exported: Path) -> None:
        manifest = read(exported)
        assert index_limits(manifest, exported) == {"input_ids": ROWS}
        for case in sample_cases(manifest, exported):
            assert case.inputs["input_ids"].max() < ROWS
            assert set(np.unique(case.inputs["attention_mask"])) <= {0, 1}
        masks = [case.inputs["attention_mask"] for case in sample_cases(manifest, exported)]
        assert any(mask[-1, 0] == 0 for mask in masks), "padded on the left"
        assert any(mask[-1, -1] == 0 for mask in masks), "padded on the right"

    def test_texts_fit_the_positions_of_the_model(self, exported: Path) -> None:
        manifest = read(exported)
        for positions, longest in ((512, 16), (12, 9), (1, 1)):
            (exported / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
            assert max(case.inputs["input_ids"].shape[1] for case in sample_cases(manifest, exported)) == longest

    def test_images_have_the_size_of_the_config(self, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        manifest = read(exported)
        shape = ("batch_size", "num_channels", "height", "width")
        image = replace(manifest.inputs[0], name="pixel_values", dtype="float32", shape=shape)
        (exported / "config.json").write_text('{"image_size": [32, 48], "num_channels": 1}')
        monkeypatch.setattr(samples_module, "_limits", lambda *_: {})
        cases = sample_cases(replace(manifest, inputs=(image,)), exported)
        assert {case.inputs["pixel_values"].shape[1:] for case in cases} == {(1, 32, 48)}

    def test_a_mask_of_its_own_length_covers_cache_and_text(self, exported: Path) -> None:
        manifest: Manifest = read(exported)
        ids, mask = manifest.inputs
        past = replace(ids, name="past", dtype="float32", shape=("batch_size", 2, "past", 4))
        mask = replace(mask, shape=("batch_size", "total"))
        present = replace(past, name="present", shape=("batch_size", 2, "total", 4))
        cache = Cache(input="past", output="present")
        decoder = replace(manifest, inputs=(ids, mask, past), outputs=(present,), caches=(cache,))
        for case in sample_cases(decoder, exported):
            length = case.inputs["input_ids"].shape[1] + case.inputs["past"].shape[2]
            assert case.inputs["attention_mask"].shape[1] == length
