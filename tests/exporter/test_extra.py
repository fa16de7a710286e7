"""Libraries that are missing, or too new for one another, are named before anything is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.models import REPOSITORY

from pipeload.errors import ExportError
from pipeload.notify import silent
from pipeload_export import extra
from pipeload_export.source.sources import find_source


def test_transformers_5_needs_the_exporter_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (tmp_path / "model.safetensors").write_bytes(b"no weights are read")
    monkeypatch.setattr(extra, "version", lambda _: "5.24.0")
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name in ("onnxscript", "optimum") else object())
    with pytest.raises(ExportError, match=r"^This needs onnxscript, which is not.*pip install '\.\[export-torch\]' in"):
        find_source(str(tmp_path), progress=silent)


def test_every_missing_library_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name in ("torch", "onnx") else object())
    with pytest.raises(ExportError, match=r"This needs onnx, torch, which are not installed"):
        extra.require_exporters()


@pytest.mark.parametrize("name", ["export", "export-torch"])
def test_the_command_that_installs_an_extra_is_that_of_the_readme(name: str) -> None:
    command, _, place = extra.how_to_install(name).partition(" in ")
    assert f"\n{command} " in (REPOSITORY / "README.md").read_text()
    assert place == "the folder of pipeload's source"


def test_nothing_tells_to_install_pipeload_by_its_name() -> None:
    """Whether an index has it, and under which name, is not known."""
    pages = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")), *(REPOSITORY / "docs").rglob("*.md")]
    code = [path for name in ("engine", "exporter", "examples") for path in (REPOSITORY / name).rglob("*.py")]
    told = [path for path in (*pages, *code) if re.search(r"pip install ['\"]?pipeload", path.read_text())]
    assert told == []


def test_a_library_without_metadata_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: str) -> str:
        raise extra.PackageNotFoundError

    monkeypatch.setattr(extra, "version", unknown)
    extra.require_exporters()
