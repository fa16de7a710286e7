"""`-q` and `-v`, shell completion, the list of models, and systems that pipeload does not run on."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engine.cli.toy_models import Call, encoder_in
from typer.testing import CliRunner

import pipeload
from pipeload import errors
from pipeload.cli import app
from pipeload.cli.loudness import LOUDNESS, WARNINGS

pytest.importorskip("tokenizers")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    LOUDNESS.set(quiet=False, verbose=False)
    logging.getLogger("pipeload_export").setLevel(logging.NOTSET)


@pytest.fixture
def loud(call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call` with options before the command."""
    invoke = CliRunner.invoke

    def run(option: str, *arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(
            CliRunner, "invoke", lambda self, app, args, **more: invoke(self, app, [option, *args], **more)
        )
        return call(*arguments, **options)

    return run


def test_quiet_prints_no_warnings(tmp_path: Path, call: Call, loud: Call) -> None:
    assert call(encoder_in(tmp_path), "embed", "dog " * 90).stderr.startswith("warning: Texts")
    result = loud("-q", encoder_in(tmp_path), "embed", "dog " * 90)
    assert (result.exit_code, result.stderr) == (0, "")


def test_quiet_silences_every_warning_of_pipeload() -> None:
    assert {kind.__name__ for kind in WARNINGS} == {name for name in errors.__all__ if name.endswith("Warning")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        LOUDNESS.set(quiet=True, verbose=False)
        for kind in WARNINGS:
            warnings.warn("a text", kind, stacklevel=1)
    assert caught == []


def test_verbose_prints_what_passes_took(tmp_path: Path, loud: Call) -> None:
    assert loud("-v", encoder_in(tmp_path), "embed", "dog").stderr.startswith("2 passes, 0 B read, ")


def test_quiet_and_verbose_contradict_each_other() -> None:
    result = CliRunner().invoke(app, ["-q", "-v", "catalog"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--quiet and --verbose are both given" in result.stderr


def test_the_catalog_is_listed_without_the_extra_export() -> None:
    hidden = "import sys; sys.modules.update(dict.fromkeys(['onnx', 'optimum', 'torch', 'transformers']));"
    done = _python(f"{hidden} sys.argv = ['pipeload', 'catalog', '--json']; from pipeload.__main__ import main; main()")
    assert done.returncode == 0, done.stderr
    entries = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert entries["minilm"]["task"] == "feature-extraction"
    assert entries["bert-large"]["weights"] == "seeded"
    assert "minilm" in CliRunner().invoke(app, ["catalog"]).stdout


def test_shells_complete_commands() -> None:
    shell = {"_PIPELOAD_COMPLETE": "complete_bash", "COMP_WORDS": "pipeload cla", "COMP_CWORD": "1"}
    done = _python("import sys; sys.argv = ['pipeload']; from pipeload.__main__ import main; main()", **shell)
    assert done.stdout.split() == ["classify"]


def test_windows_gets_one_line() -> None:
    """Even `--version` died with `ModuleNotFoundError: No module named 'resource'`."""
    windows = "import sys; sys.platform = 'win32'; sys.argv = ['pipeload', '--version'];"
    done = _python(f"{windows} from pipeload.__main__ import main; main()")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: pipeload runs on Linux, whose memory it measures by /proc and cgroups. On Windows, use WSL 2."
    ]
    done = _python(f"{windows} import pipeload; pipeload.load('model')")
    assert done.stderr.splitlines()[-1].startswith("ImportError: pipeload runs on Linux")


def _python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    root = Path(pipeload.__file__).parents[1]
    roots = os.pathsep.join(str(path) for path in (root, root.parent / "exporter"))
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": roots} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
