"""An export is complete and verified when it appears, and nothing is left of one that failed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnxruntime
import pytest
from tests.digests import expected_record
from tests.exporter.models import ROWS, WIDTH, write_json, write_onnx
from tests.marks import slow

import pipeload
from pipeload.errors import ConfigError, ExportError, PipeloadError
from pipeload.format.manifest import MANIFEST_NAME, read
from pipeload_export import export, split, verify


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_json(tmp_path / "source" / "config.json", {"model_type": "toy", "architectures": ["ToyModel"]})
    return write_onnx(tmp_path / "source" / "model.onnx")


def test_manifest_tells_all(source: Path, tmp_path: Path) -> None:
    write_json(source.with_name("generation_config.json"), {"max_length": 20})
    manifest = export(source, tmp_path / "target")
    assert manifest == read(tmp_path / "target")
    assert (manifest.model_type, manifest.task) == ("toy", "feature-extraction")
    assert (manifest.source, manifest.exporter) == (str(source), f"pipeload {pipeload.__version__}")
    assert [shard.role for shard in manifest.shards].count("block") == 3
    assert [spec.name for spec in manifest.inputs] == ["input_ids", "attention_mask"]
    on_disk = {str(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*.*")}
    assert on_disk == {record.path for record in manifest.files} | {MANIFEST_NAME}
    for record in manifest.files:
        apart = record.path.endswith(".safetensors")
        assert record == expected_record(tmp_path / "target", record.path, manifest.shards, apart=apart)
    (checked,) = manifest.verification
    assert checked.output == "last_hidden_state"
    assert checked.max_rel_error < checked.limit == 1e-4
    assert names(tmp_path) == ["source", "target"]


def test_engine_runs_it(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "target")
    inputs = {"input_ids": np.arange(12).reshape(2, 6), "attention_mask": np.ones((2, 6), np.int64)}
    (expected,) = onnxruntime.InferenceSession(source).run(None, inputs)
    with pipeload.load(tmp_path / "target") as model:
        actual = model.run(inputs)["last_hidden_state"]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_what_the_engine_cannot_run_is_not_exported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs whose shards answered right in onnxruntime became directories that `load` or `run` refused."""

    def run(*_: object) -> None:
        raise pipeload.RunError("'block.000' does not run.")

    before = names(source.parent)
    monkeypatch.setattr(pipeload.Model, "run", run)
    with pytest.raises(ExportError, match=r"^The engine cannot run what was exported: 'block\.000' does not run\.$"):
        export(source, tmp_path / "target")
    assert names(source.parent) == before
    assert export(source, tmp_path / "target", verify=False)


def test_external_data(source: Path, tmp_path: Path) -> None:
    inline = export(source, tmp_path / "inline")
    external = export(write_onnx(tmp_path / "external.onnx", external=True), tmp_path / "target")
    assert [s.weights for s in external.shards] == [s.weights for s in inline.shards], "the weights are the same"


def test_source_is_left_alone(source: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in source.parent.iterdir()}
    export(source, tmp_path / "target")
    assert {path: path.stat().st_mtime_ns for path in source.parent.iterdir()} == before


def test_no_repetition_is_refused_or_becomes_one_shard(tmp_path: Path) -> None:
    source = write_onnx(tmp_path / "one.onnx", blocks=0)
    with pytest.raises(ExportError, match="--whole"):
        export(source, tmp_path / "target")
    assert names(tmp_path) == ["one.onnx"]
    assert [shard.role for shard in export(source, tmp_path / "target", whole=True).shards].count("block") == 1


def test_progress_reaches_the_end_of_every_step(source: Path, tmp_path: Path) -> None:
    last: dict[str, tuple[int, int]] = {}

    def progress(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        last[what] = (done, total)

    export(source, tmp_path / "target", progress=progress)
    assert {
        "write the shards",
        "check the files",
        "check the graphs",
        "run the unsplit model",
        "run the shards",
        "run the engine",
    } <= set(last)
    assert all(done == total for done, total in last.values()), last


def test_keeps_the_unsplit_model(source: Path, tmp_path: Path) -> None:
    external = write_onnx(tmp_path / "source" / "named.onnx", external=True)
    export(external, tmp_path / "target", keep_onnx=tmp_path / "kept")
    assert names(tmp_path / "kept") == ["config.json", "model.onnx", "named.onnx_data"]
    assert verify(tmp_path / "target", tmp_path / "kept" / "model.onnx").differences
    with pytest.raises(ConfigError, match="overlap"):
        export(source, tmp_path / "new", keep_onnx=tmp_path / "new" / "onnx")
    with pytest.raises(ConfigError, match="kept exists"):
        export(source, tmp_path / "new", keep_onnx=tmp_path / "kept")
    export(source, tmp_path / "new", keep_onnx=tmp_path / "kept", force=True)
    assert names(tmp_path / "kept") == ["config.json", "model.onnx"]


def test_keeps_the_unsplit_model_of_a_relative_path(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export("source/model.onnx", "target", keep_onnx="kept")
    assert names(tmp_path / "kept") == ["config.json", "model.onnx"]


def fail_with(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (ExportError("no repetition"), ExportError, "no repetition"),
        (OSError(errno.ENOSPC, "No space"), ExportError, r"failed, and was undone: No space \(.*\)\. Make room there"),
        (OSError(errno.EIO, "Input/output error"), ExportError, "failed, and was undone: Input/output error"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_failure_undoes_all(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    message: str | None,
) -> None:
    export(source, tmp_path / "old")
    before = read(tmp_path / "old")
    monkeypatch.setattr(sys.modules["pipeload_export.build"], "verify_made", fail_with(error))
    for target in ("old", "new"):
        with pytest.raises(raised, match=message):
            export(source, tmp_path / target, force=True, keep_onnx=tmp_path / "kept")
    assert names(tmp_path) == ["old", "source"]
    assert read(tmp_path / "old") == before


def test_wrong_shards_never_appear(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_onnx(tmp_path / "other.onnx", seed=1)
    right = split.split
    monkeypatch.setattr(split, "split", lambda _, *args, **options: right(other, *args, **options))
    with pytest.raises(ExportError, match="'last_hidden_state' of the shards differs from the unsplit model by"):
        export(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    export(source, tmp_path / "target", verify=False)


def test_too_little_disk_is_refused_before_the_start(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(split, "split", fail_with(AssertionError("began")))
    with pytest.raises(ExportError, match=r"takes about .* of disk, and 1\.0 kB are free"):
        export(source, tmp_path / "target")
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("existing", ["file", "foreign folder", "export"])
def test_existing_target(source: Path, tmp_path: Path, existing: str) -> None:
    target = tmp_path / "target"
    if existing == "file":
        target.touch()
    elif existing == "foreign folder":
        target.mkdir()
        (target / "thesis.txt").touch()
    else:
        export(source, target)
    with pytest.raises(ConfigError, match="exists"):
        export(source, target)
    if existing == "export":
        export(source, target, force=True)
    else:
        with pytest.raises(ConfigError, match=r"exists and is a file|was not made by this command"):
            export(source, target, force=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGTERM), slow(signal.SIGINT)])
@pytest.mark.parametrize("step", ["write the shards", "check the files", "run the shards"])
def test_ended_by_a_signal(source: Path, tmp_path: Path, number: signal.Signals, step: str) -> None:
    code = (
        "import os, sys\nfrom pipeload_export import export\n"
        "def progress(what, done, total):\n"
        f"    if what == {step!r}:\n"
        f"        os.kill(os.getpid(), {number.value})\n"
        f"export({str(source)!r}, {str(tmp_path / 'target')!r}, progress=progress)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        check=False,
    )
    assert done.returncode == -number, done.stderr.decode()
    assert not (tmp_path / "target").exists()
    export(source, tmp_path / "target")
    assert names(tmp_path) == ["source", "target"], "the next export cleans up"


def test_errors_are_ours(tmp_path: Path) -> None:
    with pytest.raises(PipeloadError):
        export(tmp_path / "nothing.onnx", tmp_path / "target")


def test_table_is_lifted(source: Path, tmp_path: Path) -> None:
    lookups = [lookup for shard in export(source, tmp_path / "target").shards for lookup in shard.lookups]
    assert [lookup.table.shape for lookup in lookups] == [(ROWS, WIDTH)]


@pytest.mark.parametrize(("kind", "refused"), [("Normalize", False), ("StaticEmbedding", True)])
def test_a_module_that_embed_refuses_is_named_by_a_warning(
    source: Path, tmp_path: Path, kind: str, refused: bool
) -> None:
    listed = [{"type": f"sentence_transformers.models.{name}", "path": ""} for name in ("Transformer", kind)]
    (source.parent / "modules.json").write_text(json.dumps(listed))
    said = "was exported, and embed refuses it: .* module 'StaticEmbedding'.* from model.run"
    with pytest.warns(pipeload.EmbeddingWarning, match=said) if refused else nullcontext():
        export(source, tmp_path / "target")
    assert (tmp_path / "target" / MANIFEST_NAME).is_file()


def test_modules_say_nothing_about_other_tasks(source: Path, tmp_path: Path) -> None:
    (source.parent / "modules.json").write_text('[{"type": "own.StaticEmbedding", "path": ""}]')
    export(source, tmp_path / "target", task="fill-mask")
