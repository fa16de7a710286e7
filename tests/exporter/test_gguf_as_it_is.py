"""A GGUF file is exported with its own blocks: the answers are those of its floats, and the manifest says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.exporter.models import write_gguf
from tests.models import traced_here

import pipeload
from pipeload.cli.report import accuracy_report, summary
from pipeload.errors import ConfigError, ExportError
from pipeload.format.manifest import read
from pipeload_export import export
from pipeload_export.rewrite import gguf_weights
from pipeload_export.rewrite.gguf_blocks import Blocks, blocks_of
from pipeload_export.source import asking, gguf_places, hollow, tracer, tracing

pytest.importorskip("gguf")

KINDS = {"token_embd": "Q8_0", "ffn_down": "Q5_0", "norm": "F32", "": "Q4_1"}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same file with its blocks, and as floats."""
    folder = tmp_path_factory.mktemp("gguf")
    source = write_gguf(folder / "m.gguf", kinds=KINDS, more_tokens=1000)
    with traced_here():
        export(source, folder / "blocks", max_error=1e-3)
        export(source, folder / "floats", weights="fp32")
    return folder / "blocks", folder / "floats"


def test_answers_are_those_of_the_floats(directories: tuple[Path, Path]) -> None:
    inputs = {"input_ids": np.arange(3, 27).reshape(2, 12), "attention_mask": np.ones((2, 12), np.int64)}
    inputs["position_ids"] = np.tile(np.arange(12), (2, 1))
    found = []
    for directory in directories:
        with pipeload.load(directory) as model:
            found.append(model.run(inputs)["logits"])
    np.testing.assert_allclose(found[0], found[1], atol=2e-4 * float(np.ptp(found[1])))


def test_the_manifest_and_the_reports_say_which_blocks_there_are(directories: tuple[Path, Path]) -> None:
    blocks, floats = (read(directory) for directory in directories)
    assert floats.small_weights is None
    small = blocks.small_weights
    assert small
    layer = 4 * 32 * 32 + 2 * 64 * 32
    assert small.gguf == {"Q8_0": 1031 * 32, "Q4_1": 2 * layer, "Q5_0": 2 * 64 * 32}
    assert (small.bits, small.fine_bits, small.block_size, small.floats) == (4, 8, 32, ())
    assert small.accuracy
    assert small.accuracy.perplexity is not None
    assert summary(blocks)["weights"] == "Q8_0, Q4_1, Q5_0 of the GGUF file"
    assert "the GGUF file's own blocks: Q8_0 (62%)" in accuracy_report(small)


def test_the_layers_and_the_caches_are_cut_as_those_of_the_floats(directories: tuple[Path, Path]) -> None:
    blocks, floats = (read(directory) for directory in directories)
    assert [shard.role for shard in blocks.shards if shard.role != "head"] == [
        shard.role for shard in floats.shards if shard.role != "head"
    ]
    assert [(cache.input, cache.in_place) for cache in blocks.caches] == [
        (cache.input, cache.in_place) for cache in floats.caches
    ]
    assert all(shard.packed for shard in blocks.shards if shard.role in ("block", "head"))
    assert blocks.weight_bytes < floats.weight_bytes / 3


def test_a_largest_error_is_refused_where_floats_stay_floats(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match=r"only measured where weights are rounded .* or those of a GGUF file"):
        export(source, tmp_path / "made", weights="fp32", max_error=0.1)


def test_answers_that_are_not_those_of_the_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rows: NDArray[np.uint8], kind: str) -> Blocks:
        found = blocks_of(rows, kind)
        return replace(found, scales=found.scales * np.float32(1.1))

    monkeypatch.setattr(gguf_weights, "blocks_of", wrong)
    source = write_gguf(tmp_path / "m.gguf", kinds=KINDS, more_tokens=1000)
    with traced_here(), pytest.raises(ExportError, match=r"of its range, and the limit is 0\.01"):
        export(source, tmp_path / "made")


def test_a_file_is_exported_without_its_floats_in_memory(
    directories: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing.Request, "may_be_hollow", True)
    monkeypatch.setattr(hollow, "_FILLED_BYTES", 1 << 10)
    monkeypatch.setattr(gguf_places, "SMALL_BYTES", 1 << 10)
    monkeypatch.setattr(asking, "_RESIDENT_SHARE", 0)
    for whole in ("_gguf_model", "load_whole"):
        monkeypatch.setattr(tracer, whole, None)
    caplog.set_level("INFO", "pipeload_export")
    source = write_gguf(tmp_path / "m.gguf", kinds=KINDS, more_tokens=1000)
    with traced_here():
        made = [export(source, tmp_path / weights, weights=weights) for weights in ("auto", "fp32")]
    assert not [record for record in caplog.records if record.name == "pipeload_export"]
    for one, directory in zip(made, directories, strict=True):
        other = read(directory)
        assert (one.shards, one.small_weights) == (other.shards, other.small_weights)
        assert one.parity
