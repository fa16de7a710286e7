"""Files are opened in one place: regular ones, of bounded size; and every fault is one kind of error."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipeload.machine.files import open_file, read_file, read_stream, write_whole

MOST_BYTES = 1000


@pytest.mark.parametrize("size", [0, 1, MOST_BYTES - 1, MOST_BYTES])
def test_a_file_up_to_the_limit_is_read_whole(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert read_file(tmp_path / "file", most_bytes=MOST_BYTES) == data
    assert read_stream(tmp_path / "file", most_bytes=MOST_BYTES) == data


def test_a_file_that_says_that_it_is_empty_is_read_until_its_end() -> None:
    assert read_file(Path("/proc/self/status"), most_bytes=1 << 20).startswith(b"Name:")


@pytest.mark.parametrize("read", [read_file, read_stream])
def test_a_file_over_the_limit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[..., bytes]
) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(os, "read", pytest.fail)
    with pytest.raises(OSError, match=r"holds more than the 1\.0 kB") as caught:
        read(tmp_path / "file", most_bytes=MOST_BYTES)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "file"))


def test_a_file_that_grows_while_it_is_read_ends_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    asked: list[int] = []

    def grow(_: int, count: int) -> bytes:
        asked.append(count)
        return b"x" * min(count, 300)

    with monkeypatch.context() as patch:
        patch.setattr(os, "read", grow)
        with pytest.raises(OSError, match="holds more"):
            read_file(tmp_path / "file", most_bytes=MOST_BYTES)
    assert asked == [1001, 701, 401, 101]


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def _zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _under_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_bytes(b"")


def _closed(path: Path) -> None:
    path.write_bytes(b"")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")


@pytest.mark.parametrize(
    ("make", "code", "fact"),
    [
        (_pipe, errno.EINVAL, "it is a pipe, no regular file"),
        (_zeros, errno.EINVAL, "it is a device, no regular file"),
        (Path.mkdir, errno.EISDIR, "Is a directory"),
        (_socket, errno.ENXIO, "No such device or address"),
        (_loop, errno.ELOOP, "Too many levels of symbolic links"),
        (_under_a_file, errno.ENOTDIR, "Not a directory"),
        (_closed, errno.EACCES, "Permission denied"),
        (lambda _: None, errno.ENOENT, "No such file or directory"),
    ],
)
def test_all_but_regular_files_are_refused_with_the_fact_and_nothing_waits(
    tmp_path: Path, make: Callable[[Path], None], code: int, fact: str
) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    make(path)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - all of it is compared
        read_file(path, most_bytes=MOST_BYTES)
    assert (caught.value.errno, caught.value.strerror, caught.value.filename) == (code, fact, str(path))


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "x" * 5000])
@pytest.mark.parametrize(
    "use",
    [
        partial(read_file, most_bytes=MOST_BYTES),
        partial(read_stream, most_bytes=MOST_BYTES),
        partial(write_whole, data=b""),
    ],
    ids=["read_file", "read_stream", "write_whole"],
)
def test_a_name_that_no_file_can_have_is_an_os_error(tmp_path: Path, name: str, use: Callable[..., object]) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the code is compared
        use(tmp_path / name)
    assert caught.value.errno in (errno.EINVAL, errno.ENAMETOOLONG)
    assert caught.value.filename == str(tmp_path / name)
    assert caught.value.strerror


def test_a_disk_that_fails_is_named_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "read", fail)
        with pytest.raises(OSError, match="Input/output error") as caught:
            read_file(tmp_path / "file", most_bytes=MOST_BYTES)
    assert caught.value.filename == str(tmp_path / "file")


def test_a_pipe_that_the_user_named_is_read_to_its_end_or_limit(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for size in (0, 10, MOST_BYTES):
        writer = threading.Thread(target=path.write_bytes, args=(b"x" * size,))
        writer.start()
        assert read_stream(path, most_bytes=MOST_BYTES) == b"x" * size
        writer.join()
    with pytest.raises(OSError, match="holds more than"):
        read_stream(Path("/dev/zero"), most_bytes=MOST_BYTES)


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 2000)
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough
    for path in (tmp_path / "file", tmp_path, Path("/dev/null")):
        with pytest.raises(OSError, match=r"holds|regular|directory"):
            read_file(path, most_bytes=MOST_BYTES)
    with pytest.raises(RuntimeError), open_file(tmp_path / "file"):
        raise RuntimeError
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
