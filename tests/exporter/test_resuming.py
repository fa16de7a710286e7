"""A killed export goes on where it stopped, and its result is the one of an export that nothing disturbed."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.exporter.models import write_gpt2, write_json, write_onnx
from tests.marks import survey

from pipeload.errors import ExportError
from pipeload.format.manifest import MANIFEST_NAME
from pipeload_export import convert, export
from pipeload_export.source.tracing import Request
from pipeload_export.write import journal, weights

BLOCKS = [f"block.{number:03d}" for number in range(3)]


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_LEAST_BYTES", 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_json(tmp_path / "source" / "config.json", {"model_type": "toy", "architectures": ["ToyModel"]})
    return write_onnx(tmp_path / "source" / "model.onnx")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights files that were written, and not taken over."""
    names: list[str] = []
    write = weights._write

    def noted(path: Path, *rest: object) -> None:
        names.append(path.stem)
        write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(weights, "_write", noted)
    return names


GATES = {
    "before a file is begun": "weights._write = gate(lambda path, *_: path.stem == 'block.001', weights._write)",
    "in the middle of a file": (
        "weights._pieces = gate(lambda one: one.load().nbytes > 1000 and len(begun) > 6, weights._pieces)"
    ),
    "before a file is on the disk": (
        "journal.Journal._note = gate(lambda _, path, __: path.stem == 'block.001', journal.Journal._note)"
    ),
    "when all are written": "padding.takes_left_padding = gate(lambda *_: True, None)",
    "before the target is put in place": "staging.Staging.commit = gate(lambda _: True, None)",
}
"""Where the process is killed."""


HOLLOW = (
    "from pipeload_export.source.tracing import Request\n"
    "Request.may_be_hollow = property(lambda request: bool(request.folder))"
)
"""Also a small checkpoint is traced without its weights."""


def kill(source: Path, target: Path, gate: str, call: str = "export({!r}, {!r})") -> None:
    """Export in a process that is killed at the gate."""
    code = (
        "import os\n"
        "from pipeload_export import convert, export, staging\n"
        "from pipeload_export.check import padding\n"
        "from pipeload_export.write import journal, weights\n"
        "journal._LEAST_BYTES = 0\n"
        "begun = []\n"
        "def gate(closes, real):\n"
        "    def passed(*arguments):\n"
        "        begun.append(1)\n"
        f"        if closes(*arguments): os.kill(os.getpid(), {signal.SIGKILL.value})\n"
        "        return real(*arguments)\n"
        "    return passed\n"
        f"{HOLLOW}\n"
        f"{gate}\n"
        f"{call.format(str(source), str(target))}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def content(directory: Path) -> dict[str, str]:
    """The sha256 of every file."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("gate", GATES)
def test_the_result_is_that_of_an_undisturbed_export(
    gate: str, source: Path, tmp_path: Path, written: list[str]
) -> None:
    export(source, tmp_path / "undisturbed")
    every = list(written)
    assert {*BLOCKS, "embeddings"} <= set(every)
    written.clear()
    kill(source, tmp_path / "target", GATES[gate])
    assert not (tmp_path / "target").exists()
    export(source, tmp_path / "target")
    assert content(tmp_path / "target") == content(tmp_path / "undisturbed")
    assert len(written) < len(every), "what was finished is not written again"
    if gate == "before the target is put in place":
        assert written == []
    assert names(tmp_path) == ["source", "target", "undisturbed"]


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["in the middle of a file", survey("before the target is put in place")])
def test_a_checkpoint_whose_weights_stay_in_it(
    gate: str, tmp_path: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Request, "may_be_hollow", property(lambda request: bool(request.folder)))
    source = write_gpt2(tmp_path / "source")
    export(source, tmp_path / "undisturbed")
    every = list(written)
    written.clear()
    kill(source, tmp_path / "target", GATES[gate])
    export(source, tmp_path / "target")
    assert content(tmp_path / "target") == content(tmp_path / "undisturbed")
    assert len(written) < len(every)
    assert names(tmp_path) == ["source", "target", "undisturbed"]


def test_an_export_that_is_killed_twice_keeps_what_both_made(source: Path, tmp_path: Path, written: list[str]) -> None:
    export(source, tmp_path / "undisturbed")
    written.clear()
    at = "weights._write = gate(lambda path, *_: path.stem == '{}', weights._write)"
    for name in BLOCKS[1:]:
        kill(source, tmp_path / "target", at.format(name))
    export(source, tmp_path / "target")
    assert content(tmp_path / "target") == content(tmp_path / "undisturbed")
    # Of the file before the one that is begun it is not known whether it is on the disk.
    assert {"embeddings", *BLOCKS[:1]}.isdisjoint(written)
    assert names(tmp_path) == ["source", "target", "undisturbed"]


ROUNDING = "weights._write = gate(lambda path, *_: '{}' in str(path) and path.stem == 'block.002', weights._write)"


@pytest.mark.parametrize("folder", ["floats", "result"])
def test_rounding_goes_on_where_it_stopped(folder: str, source: Path, tmp_path: Path, written: list[str]) -> None:
    """A file of floats is never taken for a rounded one: both have the same name, and may have one size."""
    export(source, tmp_path / "undisturbed", weights="fp16")
    every = len(written)
    kill(source, tmp_path / "target", ROUNDING.format(folder), "export({!r}, {!r}, weights='fp16')")
    written.clear()
    export(source, tmp_path / "target", weights="fp16")
    assert content(tmp_path / "target") == content(tmp_path / "undisturbed")
    assert len(written) < every
    assert written.count("block.000") == (0 if folder == "result" else 1)
    assert names(tmp_path) == ["source", "target", "undisturbed"]


def test_a_conversion_goes_on_where_it_stopped(source: Path, tmp_path: Path, written: list[str]) -> None:
    export(source, tmp_path / "floats", verify=False)
    convert(tmp_path / "floats", tmp_path / "undisturbed", weights="int8", verify=False)
    call = "convert({!r}, {!r}, weights='int8', verify=False)"
    kill(tmp_path / "floats", tmp_path / "target", ROUNDING.format("result"), call)
    written.clear()
    convert(tmp_path / "floats", tmp_path / "target", weights="int8", verify=False)
    assert content(tmp_path / "target") == content(tmp_path / "undisturbed")
    assert "block.000" not in written
    assert "block.002" in written


@pytest.mark.slow
def test_the_rounding_of_a_draft_goes_on_where_it_stopped(tmp_path: Path, written: list[str]) -> None:
    source, options = write_gpt2(tmp_path / "source"), {"draft": "int4", "verify": False}
    export(source, tmp_path / "undisturbed", **options)  # type: ignore[arg-type]
    every = len(written)
    last = "weights._write = gate(lambda path, *_: 'draft' in path.parts and path.stem == 'block.001', weights._write)"
    kill(source, tmp_path / "target", last, "export({!r}, {!r}, draft='int4', verify=False)")
    written.clear()
    export(source, tmp_path / "target", **options)  # type: ignore[arg-type]
    assert content(tmp_path / "target") == content(tmp_path / "undisturbed")
    # Of the file before the one that is begun it is not known whether it is on the disk.
    assert len(written) <= every // 2
    assert written.count("block.001") == 1
    assert names(tmp_path) == ["source", "target", "undisturbed"]


def touch(source: Path) -> None:
    os.utime(source, ns=(1, 1))


def change(source: Path) -> None:
    write_onnx(source, seed=1)


@pytest.mark.parametrize(
    ("happens", "options"), [(touch, {}), (change, {}), (str, {"weights": "fp32"}), (str, {"whole": True})]
)
def test_another_export_begins_anew(
    happens: Callable[[Path], object], options: dict[str, Any], source: Path, tmp_path: Path, written: list[str]
) -> None:
    kill(source, tmp_path / "target", GATES["before the target is put in place"])
    happens(source)
    export(source, tmp_path / "target", **options)
    assert set(BLOCKS) <= set(written)
    assert names(tmp_path) == ["source", "target"]


def damage(folder: Path) -> None:
    for line in (folder / "journal").read_bytes().splitlines():
        assert line.startswith(b"{")
    (folder / "journal").write_bytes((folder / "journal").read_bytes()[:-40])


def shorten(folder: Path) -> None:
    for file in (folder / "result" / "shards").glob("*.safetensors"):
        os.truncate(file, file.stat().st_size - 1)


def forget(folder: Path) -> None:
    (folder / "journal").unlink()


@pytest.mark.parametrize("happens", [damage, shorten, forget])
def test_only_what_is_known_to_be_whole_is_taken(
    happens: Callable[[Path], None], source: Path, tmp_path: Path, written: list[str]
) -> None:
    export(source, tmp_path / "undisturbed")
    every = len(written)
    written.clear()
    kill(source, tmp_path / "target", GATES["before the target is put in place"])
    (folder,) = tmp_path.glob(".target.staging-*")
    happens(folder)
    export(source, tmp_path / "target")
    assert content(tmp_path / "target") == content(tmp_path / "undisturbed")
    assert len(written) == (1 if happens is damage else every)


def test_what_is_taken_over_needs_no_more_room(
    source: Path, tmp_path: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(source, tmp_path / "target", GATES["before the target is put in place"])
    room = int(3.05 * source.stat().st_size) + (32 << 20)
    usage = shutil.disk_usage(tmp_path)._replace(free=room - source.stat().st_size // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    export(source, tmp_path / "target")
    assert written == []
    with pytest.raises(ExportError, match="of disk"):
        export(source, tmp_path / "other")


def test_an_export_that_failed_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill(source, tmp_path / "target", GATES["when all are written"])

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "_write", fail)
    monkeypatch.setattr(journal.Journal, "take", lambda *_: None)
    with pytest.raises(ExportError, match="No space left"):
        export(source, tmp_path / "target")
    assert names(tmp_path) == ["source"]


def test_an_error_of_the_disk_after_a_file_was_written_is_raised(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(journal.Journal, "_note", fail)
    with pytest.raises(ExportError, match="Input/output error"):
        export(source, tmp_path / "target")
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("made", ["export", "convert"])
def test_the_last_error_of_the_journal_comes_before_the_target(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    def make(name: str) -> None:
        if made == "export":
            export(source, tmp_path / name, verify=False)
        else:
            convert(tmp_path / "floats", tmp_path / name, weights="int8", block_size=32, verify=False)

    note, noted, failing = journal.Journal._note, [0], 0

    def count(*arguments: Any) -> None:
        noted[0] += 1
        if noted[0] == failing:
            raise OSError(5, "Input/output error")
        note(*arguments)

    export(source, tmp_path / "floats", verify=False)
    monkeypatch.setattr(journal.Journal, "_note", count)
    make("whole")
    noted, failing = [0], noted[0]
    assert failing > 1
    with pytest.raises(ExportError, match="Input/output error"):
        make("target")
    assert names(tmp_path) == ["floats", "source", "whole"]


def test_a_manifest_is_only_in_a_whole_target(source: Path, tmp_path: Path) -> None:
    kill(source, tmp_path / "target", GATES["in the middle of a file"])
    export(source, tmp_path / "target", verify=False)
    assert (tmp_path / "target" / MANIFEST_NAME).is_file()


def test_a_target_in_a_folder_that_does_not_exist(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "new" / "folder" / "target", verify=False)
    assert names(tmp_path / "new" / "folder") == ["target"]
