"""Only PipeloadErrors come out of export and verify; temporary work lies beside the target and goes with it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import onnx
import onnxruntime
import pytest
from tests.exporter.models import write_onnx

from pipeload.errors import ConfigError, ExportError, PipeloadError
from pipeload_export import export, verify

MOMENTS = {
    "reading the graph": "pipeload_export.graph.load.onnx.load",
    "inferring types": "pipeload_export.graph.normalise.infer_types",
    "finding blocks": "pipeload_export.split.find_cuts",
    "fusing a shard": "pipeload_export.shard.fuse._optimise",
    "trying a shard": "pipeload_export.shard.trial._add_weights",
    "writing weights": "pipeload_export.write.weights._pieces",
    "copying side files": "shutil.copyfile",
    "checking files": "pipeload_export.check.verify._file_faults",
    "comparing": "pipeload_export.check.verify.compare",
    "beginning the folder": "pipeload_export.staging.Staging._acquire",
    "moving it into place": "pipeload_export.staging._sync",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    return write_onnx(tmp_path / "source" / "model.onnx")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Make room there"),
        (errno.EDQUOT, "Make room there"),
        (errno.EROFS, "Name a folder on a disk that can be written"),
        (errno.EACCES, "Name a folder in which this user may"),
        (errno.EIO, "Check the disk"),
    ],
)
def test_what_the_system_refuses_is_one_error_with_path_and_remedy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: int, remedy: str
) -> None:
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(MOMENTS[moment], raising(error))
    with pytest.raises(ExportError) as caught:
        export(source, tmp_path / "target", keep_onnx=tmp_path / "kept")
    cause = caught.value.__cause__
    assert cause is error or (cause and cause.__cause__ is error)
    assert os.strerror(number) in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert moment == "reading the graph" or remedy in str(caught.value)
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("moment", [m for m in MOMENTS if m not in ("beginning the folder", "moving it into place")])
@pytest.mark.parametrize(
    "error",
    [
        KeyError("weights"),
        IndexError("list index out of range"),
        StopIteration(),
        RecursionError("maximum recursion depth exceeded"),
        MemoryError(),
        RuntimeError("of a library"),
        onnx.checker.ValidationError("of onnx"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_libraries_raise_is_an_error_of_pipeload_with_its_cause(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: Exception
) -> None:
    monkeypatch.setattr(MOMENTS[moment], raising(error))
    with pytest.raises(ExportError) as caught:
        export(source, tmp_path / "target")
    causes = [caught.value.__cause__, getattr(caught.value.__cause__, "__cause__", None)]
    assert error in causes
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_signals_pass_as_they_are(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    monkeypatch.setattr("pipeload_export.shard.fuse._optimise", raising(error()))
    with pytest.raises(error):
        export(source, tmp_path / "target")
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("error", [ValueError("mine"), OSError(errno.ENOSPC, "mine"), KeyError("mine")])
def test_what_the_callers_own_function_raises_passes_as_it_is(source: Path, tmp_path: Path, error: Exception) -> None:
    for work in (
        lambda: export(source, tmp_path / "target", progress=raising(error)),
        lambda: verify(tmp_path / "exported", progress=raising(error)),
    ):
        if not (tmp_path / "exported").exists():
            export(source, tmp_path / "exported")
        with pytest.raises(type(error)) as caught:
            work()
        assert caught.value is error
    assert names(tmp_path) == ["exported", "source"]


@pytest.mark.parametrize(
    "name", ["x" * 300, "loop/model", "loop", "file/model", "nul\0", "~nobody-of-that-name/model"], ids=repr
)
@pytest.mark.parametrize("which", ["target", "keep_onnx"])
def test_folders_that_cannot_be(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, which: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    folders = {"target": "target", "keep_onnx": "kept"} | {which: name}
    with pytest.raises((ExportError, ConfigError)) as caught:
        export(source, **folders)
    first = Path(name).parts[0][:20]
    assert first in str(caught.value) or repr(name) in str(caught.value)
    assert names(tmp_path) == ["file", "loop", "source"]


def test_the_systems_folder_for_temporary_files_is_not_used(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "no such folder"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    export(source, tmp_path / "target")
    verify(tmp_path / "target", source)
    assert names(tmp_path) == ["source", "target"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("moment", ["fuse._optimise", "trial._events"])
def test_an_export_that_is_ended_leaves_nothing_that_the_next_one_does_not_remove(
    source: Path, tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    (tmp_path / "temporary").mkdir()
    module, name = moment.split(".")
    code = (
        f"import os\nfrom pipeload_export import export\nfrom pipeload_export.shard import {module}\n"
        f"{module}.{name} = lambda *_: os.kill(os.getpid(), {number.value})\n"
        f"export({str(source)!r}, {str(tmp_path / 'target')!r})\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path / "temporary")}
    # onnxruntime itself keeps a number of the session there, in builds with telemetry.
    environment["ORT_DISABLE_TELEMETRY"] = "1"
    done = subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, check=False)
    assert done.returncode == -number, done.stderr.decode()
    assert names(tmp_path / "temporary") == []
    export(source, tmp_path / "target")
    assert names(tmp_path) == ["source", "target", "temporary"]


def test_a_graph_that_onnxruntime_refuses_is_one_clear_line(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(source)
    next(node for node in model.graph.node if node.op_type == "Tanh").domain = "of.nobody"
    model.opset_import.append(onnx.helper.make_opsetid("of.nobody", 1))
    onnx.save(model, source)
    with pytest.raises(ExportError, match=r"^onnxruntime does not open .*of\.nobody.* again\.$") as caught:
        export(source, tmp_path / "target", whole=True)
    assert "\n" not in str(caught.value)
    assert ".fuse-" not in str(caught.value), "it names no folder that is gone"
    assert capfd.readouterr() == ("", "")


def test_onnxruntimes_second_attempt_prints_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    export(source, tmp_path / "target")
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "_create_inference_session", raising(RuntimeError("a provider failed"))
    )
    for work in (lambda: verify(tmp_path / "target"), lambda: export(source, tmp_path / "other")):
        with pytest.raises(PipeloadError, match="a provider failed"):
            work()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [-1, -7])
def test_a_negative_size_is_one_that_varies(source: Path, tmp_path: Path, size: int) -> None:
    """Older exporters write one where newer ones give a name."""
    model = onnx.load(source)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    onnx.save(model, source)
    assert isinstance(export(source, tmp_path / "target").inputs[0].shape[0], str)


def test_the_boundary_keeps_errors_of_pipeload(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = PipeloadError("as it is")
    monkeypatch.setattr("pipeload_export.split.find_cuts", raising(error))
    with pytest.raises(PipeloadError) as caught:
        export(source, tmp_path / "target")
    assert caught.value is error
