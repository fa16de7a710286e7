"""Shards of a toy read into memory, files that get in the way, and machines that refuse to read directly."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeload.format import manifest as manifests
from pipeload.format.manifest import Shard
from pipeload.format.pages import page_ceil, page_floor
from pipeload.storage.buffers import Buffer, Part
from pipeload.storage.weights import Storage

BLOCK = 2
"""A shard in the middle of the toy."""


def never() -> bool:
    return False


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def parts_of(shard: Shard, *cuts: int) -> list[Part]:
    """Parts of the shard that lie between the cuts, full of something else."""
    parts = []
    for begin, end in pairwise([0, *cuts, shard.nbytes]):
        buffer = Buffer(page_ceil(end) - page_floor(begin))
        buffer.piece(0, buffer.nbytes)[:] = b"\xaa" * buffer.nbytes
        parts.append(Part(begin, end, buffer))
    return parts


def content_of(parts: Sequence[Part]) -> bytes:
    return b"".join(
        bytes(part.buffer.piece(part.begin - page_floor(part.begin), part.end - page_floor(part.begin)))
        for part in parts
    )


def read_shard(storage: Storage, shard: Shard, *cuts: int, direct: bool = True) -> bytes:
    parts = parts_of(shard, *cuts)
    assert storage.read_weights(shard, parts, never, direct=direct)
    return content_of(parts)


def open_graph(storage: Storage, shard: Shard) -> bytes:
    """The bytes that onnxruntime gets."""
    return storage.graph(shard).data


def expected_of(directory: Path, shard: Shard) -> bytes:
    assert shard.weights is not None
    return (directory / shard.weights.path).read_bytes()[shard.weights.offset :][: shard.weights.nbytes]


def open_storage(directory: Path, **options: Any) -> tuple[Storage, Shard, Path]:
    """A storage, one shard of it, and the path of that shard's weights."""
    manifest = manifests.read(directory)
    shard = manifest.shards[BLOCK]
    assert shard.weights is not None
    return Storage(directory, manifest, **options), shard, directory / shard.weights.path


def as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def without_direct_io(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")


def _refusing_direct_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refuse(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)


def refusing_direct_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def refuse(descriptor: int, *rest: Any) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", refuse)


def note_direct_reads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each read from now on is direct."""
    real, seen = os.preadv, []

    def note(descriptor: int, *rest: Any) -> int:
        seen.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        return real(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", note)
    return seen


def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read brings a third of what it is asked for."""
    into, read = os.preadv, os.pread
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: into(fd, [views[0][: max(1, len(views[0]) // 3)]], at))
    monkeypatch.setattr(os, "pread", lambda fd, nbytes, at: read(fd, max(1, nbytes // 3), at))


def _without_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delattr(os, "O_DIRECT")


WAYS = [
    pytest.param(as_it_is, id="direct"),
    pytest.param(without_direct_io, id="no O_DIRECT"),
    pytest.param(_refusing_direct_mode, id="the file system refuses O_DIRECT"),
    pytest.param(refusing_direct_read, id="read refuses O_DIRECT"),
    pytest.param(short_reads, id="short reads"),
    pytest.param(_without_advice, id="no posix_fadvise"),
]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path: Path, nbytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-nbytes])


def edit_header(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite the JSON header in place, in the same number of bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(content[:8] + text.ljust(length) + content[8 + length :])


def edit_tensor(**changes: Any) -> Callable[[Path], None]:
    def change(header: Any) -> None:
        next(iter(header.values())).update(changes)

    return lambda path: edit_header(path, change)


def rename_tensor(path: Path) -> None:
    edit_header(path, lambda header: {f"x{name}": entry for name, entry in header.items()})


def replace_header(text: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        path.write_bytes(content[:8] + text.ljust(length) + content[8 + length :])

    return change


def write_at(at: int, data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at : at + len(data)] = data
        path.write_bytes(content)

    return change


HEADER_DAMAGE = [
    pytest.param(Path.unlink, "cannot be read: No such file", id="missing"),
    pytest.param(lambda p: (p.unlink(), p.mkdir()), "cannot be read|has .* bytes", id="a directory"),
    pytest.param(lambda p: p.write_bytes(b""), "has 0 bytes, the manifest says", id="empty"),
    pytest.param(lambda p: cut(p, 1), "bytes, the manifest says", id="one byte short"),
    pytest.param(lambda p: cut(p, 8000), "bytes, the manifest says", id="truncated"),
    pytest.param(lambda p: p.write_bytes(p.read_bytes() + b"\0"), "bytes, the manifest says", id="grown"),
    pytest.param(write_at(0, b"\xff" * 8), "no safetensors file", id="header of 2**64 bytes"),
    pytest.param(write_at(0, bytes(8)), "no safetensors file", id="header of 0 bytes"),
    pytest.param(replace_header(b"not json"), "damaged safetensors header", id="header is no JSON"),
    pytest.param(replace_header(b"[]"), "damaged safetensors header", id="header is a list"),
    pytest.param(replace_header(b'{"a": 1}'), "damaged safetensors header", id="entry is a number"),
    pytest.param(replace_header(b"\xff\xfe"), "damaged safetensors header", id="header is no text"),
    pytest.param(replace_header(b"[" * 4000), "damaged safetensors header", id="header is deep"),
    pytest.param(replace_header(b"{}"), "not the file that the manifest describes", id="header has no tensors"),
    pytest.param(edit_tensor(dtype="F8"), "damaged safetensors header", id="unknown dtype"),
    pytest.param(edit_tensor(dtype=[]), "damaged safetensors header", id="dtype is a list"),
    pytest.param(edit_tensor(data_offsets=[]), "damaged safetensors header", id="no offsets"),
    pytest.param(edit_tensor(data_offsets=["0", "1"]), "damaged safetensors header", id="offsets are texts"),
    pytest.param(edit_tensor(shape=["x", 1 << 62]), "damaged safetensors header", id="a shape of texts"),
    pytest.param(edit_tensor(data_offsets=[0.5, 10**400]), "damaged safetensors header", id="offsets are no numbers"),
    pytest.param(edit_tensor(shape=[1 << 62] * 65), "damaged safetensors header", id="a shape without end"),
    pytest.param(edit_tensor(dtype="I32"), "not the file that the manifest describes", id="other dtype"),
    pytest.param(edit_tensor(shape=[32, 128]), "not the file that the manifest describes", id="other shape"),
    pytest.param(edit_tensor(data_offsets=[256, 16640]), "not the file that the manifest describes", id="other place"),
    pytest.param(rename_tensor, "not the file that the manifest describes", id="other names"),
]
