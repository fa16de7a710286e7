"""A file is there whole, or as it was; whatever goes wrong."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeload.machine.files import write_whole


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"one, the longer", b"two"):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_a_relative_path_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_whole(Path("file"), b"one")
    assert (tmp_path / "file").read_bytes() == b"one"


@pytest.mark.parametrize("length", [1, 255])
def test_any_name_will_do(tmp_path: Path, length: int) -> None:
    write_whole(tmp_path / ("x" * length), b"one")
    assert (tmp_path / ("x" * length)).read_bytes() == b"one"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_others_may_read_it_as_far_as_the_umask_says(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "file", b"one")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_write_that_fails_leaves_what_was_there_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    with monkeypatch.context() as context:
        context.setattr(Path, step, fail)
        with pytest.raises(OSError, match="No space left") as caught:
            write_whole(path, b"two")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"one")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_or_none_or_in_the_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one")
    for path, kind in (
        (tmp_path / "missing" / "file", FileNotFoundError),
        (tmp_path / "file" / "file", NotADirectoryError),
        (tmp_path, IsADirectoryError),
    ):
        with pytest.raises(kind) as caught:
            write_whole(path, b"two")
        assert caught.value.filename == str(path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(path, b"one")
        assert os.read(reader, 10) == b"one"
    finally:
        os.close(reader)
    assert path.is_fifo()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors have no names here")
def test_an_open_descriptor_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    """`--output /dev/stdout > file`: the shell's other commands write there too."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"before ")
        file.flush()
        write_whole(Path(f"/proc/self/fd/{file.fileno()}"), b"one")
        file.seek(0, os.SEEK_END)
        file.write(b" after")
    assert path.read_bytes() == b"before one after"
