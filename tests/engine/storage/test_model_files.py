"""Every file that the manifest lists is checked when it is read; files that the user adds are read as they are."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeload.errors import LoadError, ShardError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import FileRecord
from pipeload.storage.model_files import ModelFiles, unreadable

NAME, TEXT = "1_Pooling/config.json", b'{"a": 1}'


@pytest.fixture
def open_files(toy_copy: Path) -> Callable[..., ModelFiles]:
    """A toy's files, of which the manifest lists one more."""
    (toy_copy / NAME).parent.mkdir()
    (toy_copy / NAME).write_bytes(TEXT)
    manifest = manifests.read(toy_copy)
    record = FileRecord(path=NAME, nbytes=len(TEXT), sha256=hashlib.sha256(TEXT).hexdigest())
    manifest = replace(manifest, files=(*manifest.files, record))
    return lambda *, verify=True: ModelFiles(toy_copy, manifest, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_listed_file_is_read(open_files: Callable[..., ModelFiles], verify: bool) -> None:
    files = open_files(verify=verify)
    for name in (NAME, f"./{NAME}", "1_Pooling//config.json"):
        assert files.read(name) == TEXT


@pytest.mark.parametrize("verify", [True, False])
def test_a_listed_file_that_is_missing_is_named(
    open_files: Callable[..., ModelFiles], toy_copy: Path, verify: bool
) -> None:
    (toy_copy / NAME).unlink()
    with pytest.raises(ShardError, match=rf"'{NAME}' cannot be read: No such file or directory\. Copy or export"):
        open_files(verify=verify).read(NAME)


@pytest.mark.parametrize("text", [b"", b'{"a": 2}', TEXT + b"\n"])
@pytest.mark.parametrize("name", [NAME, f"./{NAME}", "1_Pooling//config.json"])
def test_a_listed_file_that_changed_is_named_under_each_of_its_names(
    open_files: Callable[..., ModelFiles], toy_copy: Path, text: bytes, name: str
) -> None:
    (toy_copy / NAME).write_bytes(text)
    with pytest.raises(ShardError, match=rf"config\.json' is not the file that was exported: it has {len(text)} bytes"):
        open_files().read(name)
    assert open_files(verify=False).read(name) == text


def test_a_file_that_the_user_added_is_read_as_it_is(open_files: Callable[..., ModelFiles], toy_copy: Path) -> None:
    assert open_files().read("generation_config.json") is None
    (toy_copy / "generation_config.json").write_bytes(TEXT)
    assert open_files().read("generation_config.json") == TEXT


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (os.mkfifo, "it is a pipe, no regular file"),
        (Path.mkdir, "Is a directory"),
        (lambda path: path.symlink_to("/etc/hostname"), "leads out of the model directory"),
        (lambda path: path.symlink_to(path.name), "(Symlink loop|symbolic links)"),
        (lambda path: path.write_bytes(b"x" * 101), "holds more than the 100 B"),
    ],
)
@pytest.mark.parametrize("name", [NAME, "added.json"])
def test_what_is_no_small_regular_file_inside_is_refused(
    open_files: Callable[..., ModelFiles], toy_copy: Path, make: Callable[[Path], None], fact: str, name: str
) -> None:
    (toy_copy / name).unlink(missing_ok=True)
    make(toy_copy / name)
    with pytest.raises(ShardError, match=fact):
        open_files().read(name, most_bytes=100)


@pytest.mark.parametrize(
    "name", ["../other.json", "/etc/hostname", "a\0b", "x" * 5000, "", ".", "shards/..", f"shards/../{NAME}"]
)
def test_a_name_that_leads_out_or_cannot_be_is_refused(open_files: Callable[..., ModelFiles], name: str) -> None:
    with pytest.raises(ShardError):
        open_files().read(name)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_process_at_its_limits_is_not_told_to_export_again(number: int) -> None:
    error = unreadable("shards/block.000.onnx", OSError(number, os.strerror(number)))
    assert isinstance(error, LoadError)
    assert "ulimit" in str(error)
    assert isinstance(unreadable("shards/block.000.onnx", OSError(errno.EIO, os.strerror(errno.EIO))), ShardError)


def test_a_piece_of_a_listed_file_is_read(open_files: Callable[..., ModelFiles], toy_copy: Path) -> None:
    files = open_files()
    assert files.piece(NAME, 0, 3) + files.piece(NAME, 3, 100) == TEXT
    assert files.piece(NAME, len(TEXT), 3) == b""
    with pytest.raises(ShardError, match=r"lists no file 'other\.json'"):
        files.piece("other.json", 0, 3)
    (toy_copy / NAME).unlink()
    with pytest.raises(ShardError, match=r"1_Pooling/config\.json"):
        files.piece(NAME, 0, 3)
