"""Bytes come out of the files as they went in, however they are read, and damage is named before it is used."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeload.errors import LoadError, ShardError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import PAGE_BYTES, Lookup, Shard
from pipeload.format.pages import page_ceil, page_floor
from pipeload.storage import weights as storages
from pipeload.storage.buffers import Buffer, Part, tensor_in
from pipeload.storage.weights import Storage

BLOCK = 2
"""A shard in the middle of the toy."""


def _never() -> bool:
    return False


def _raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def _parts(shard: Shard, *cuts: int) -> list[Part]:
    """Parts of the shard that lie between the cuts, full of something else."""
    parts = []
    for begin, end in pairwise([0, *cuts, shard.nbytes]):
        buffer = Buffer(page_ceil(end) - page_floor(begin))
        buffer.piece(0, buffer.nbytes)[:] = b"\xaa" * buffer.nbytes
        parts.append(Part(begin, end, buffer))
    return parts


def _content(parts: Sequence[Part]) -> bytes:
    return b"".join(
        bytes(part.buffer.piece(part.begin - page_floor(part.begin), part.end - page_floor(part.begin)))
        for part in parts
    )


def _read(storage: Storage, shard: Shard, *cuts: int, direct: bool = True) -> bytes:
    parts = _parts(shard, *cuts)
    assert storage.read_weights(shard, parts, _never, direct=direct)
    return _content(parts)


def _expected(directory: Path, shard: Shard) -> bytes:
    assert shard.weights is not None
    return (directory / shard.weights.path).read_bytes()[shard.weights.offset :][: shard.weights.nbytes]


def _open(directory: Path, **options: Any) -> tuple[Storage, Shard, Path]:
    """A storage, one shard of it, and the path of that shard's weights."""
    manifest = manifests.read(directory)
    shard = manifest.shards[BLOCK]
    assert shard.weights is not None
    return Storage(directory, manifest, **options), shard, directory / shard.weights.path


def _as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def _without_direct_io(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")


def _refusing_direct_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)


def _refusing_direct_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real_open, real_read, direct = os.open, os.preadv, set()

    def remember(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        descriptor = real_open(path, flags, *rest, **options)
        (direct.add if flags & os.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    def refuse(descriptor: int, *rest: Any) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_read(descriptor, *rest)

    monkeypatch.setattr(os, "open", remember)
    monkeypatch.setattr(os, "preadv", refuse)


def _short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][: max(1, len(views[0]) // 3)]], at))


def _without_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delattr(os, "O_DIRECT")


_WAYS = [
    pytest.param(_as_it_is, id="direct"),
    pytest.param(_without_direct_io, id="no O_DIRECT"),
    pytest.param(_refusing_direct_open, id="open refuses O_DIRECT"),
    pytest.param(_refusing_direct_read, id="read refuses O_DIRECT"),
    pytest.param(_short_reads, id="short reads"),
    pytest.param(_without_advice, id="no posix_fadvise"),
]


# The same bytes in every way


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("piece_bytes", [PAGE_BYTES, 8 << 20])
def test_every_way_to_read_gives_the_same_bytes(
    toy_decoder: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None], piece_bytes: int
) -> None:
    way(monkeypatch)
    monkeypatch.setattr(storages, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(storages, "_MOST_PIECE_BYTES", piece_bytes)
    manifest = manifests.read(toy_decoder)
    storage = Storage(toy_decoder, manifest)
    for direct in (True, False):
        for shard in manifest.shards:
            assert _read(storage, shard, direct=direct) == _expected(toy_decoder, shard)


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("piece_bytes", [PAGE_BYTES, 8 << 20])
@pytest.mark.parametrize("cuts", [(4096,), (2000,), (11_000,), (1, 11_000, 16_384), (8192, 8192)], ids=str)
def test_parts_hold_the_same_bytes_and_are_checked_together(
    toy_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[[pytest.MonkeyPatch], None],
    piece_bytes: int,
    cuts: tuple[int, ...],
) -> None:
    way(monkeypatch)
    monkeypatch.setattr(storages, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(storages, "_MOST_PIECE_BYTES", piece_bytes)
    storage, shard, path = _open(toy_copy)
    assert _read(storage, shard, *cuts) == _expected(toy_copy, shard)
    _flip(path, -shard.nbytes + cuts[0])
    storage, shard, path = _open(toy_copy)
    with pytest.raises(ShardError, match="is damaged"):
        _read(storage, shard, *cuts)


def test_one_part_alone_is_read_and_does_not_count_as_checked(toy_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, shard, path = _open(toy_copy)
    asked: list[tuple[int, int]] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: (asked.append((at, len(views[0]))), real(fd, views, at))[1])
    part = _parts(shard, 11_000)[1]
    assert storage.read_weights(shard, [part], _never)
    assert _content([part]) == _expected(toy_copy, shard)[11_000:]
    # Nothing but the part's own pages: the range begins at the file's second page.
    assert asked == [(4096 + 8192, page_ceil(shard.nbytes) - 8192)]
    _flip(path, -1)
    with pytest.raises(ShardError, match="is damaged"):
        _read(storage, shard)


@pytest.mark.parametrize("direct", [True, False])
def test_direct_says_how_files_are_opened(toy: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    storage, shard, _ = _open(toy)
    flags: list[int] = []
    real = os.open

    def note(name: Any, flag: int, *rest: Any, **options: Any) -> int:
        flags.append(flag & os.O_DIRECT)
        return real(name, flag, *rest, **options)

    monkeypatch.setattr(os, "open", note)
    _read(storage, shard, direct=direct)
    assert bool(flags[0]) is direct


def test_a_file_system_in_memory_gives_the_same_bytes(toy: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        pytest.skip("/dev/shm cannot be written")
    directory = memory / f"pipeload-test-{os.getpid()}"
    shutil.copytree(toy, directory)
    try:
        storage, shard, _ = _open(directory)
        assert _read(storage, shard) == _expected(toy, shard)
    finally:
        shutil.rmtree(directory)


def test_tensors_are_views_into_the_buffer(toy: Path) -> None:
    storage, shard, path = _open(toy)
    assert shard.weights is not None
    parts = _parts(shard, shard.tensors[1].offset - shard.weights.offset)
    storage.read_weights(shard, parts, _never)
    content = path.read_bytes()
    for spec in shard.tensors:
        array = tensor_in(parts, spec, shard.weights.offset)
        expected = np.frombuffer(content, spec.dtype, array.size, spec.offset).reshape(spec.shape)
        np.testing.assert_array_equal(array, expected)
        array[...] = 0
    assert not any(_content(parts))


def test_exported_weights_files_open_with_safetensors(exported: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    manifest = manifests.read(exported)
    storage = Storage(exported, manifest)
    for shard in manifest.shards:
        if shard.weights is None or shard.role == "head":
            continue
        parts = _parts(shard)
        storage.read_weights(shard, parts, _never)
        expected = numpy.load_file(exported / shard.weights.path)
        for spec in shard.tensors:
            np.testing.assert_array_equal(tensor_in(parts, spec, shard.weights.offset), expected[spec.name])


def test_a_shard_without_weights_reads_nothing(toy: Path) -> None:
    storage, shard, _ = _open(toy)
    bare = replace(shard, weights=None, tensors=())
    parts = _parts(bare)
    assert storage.read_weights(bare, parts, _never)
    assert _content(parts) == b""


def test_reading_leaves_no_descriptor_open(toy: Path, descriptors: Callable[[], int]) -> None:
    storage, shard, _ = _open(toy)
    before = descriptors()
    for _ in range(3):
        _read(storage, shard)
        _read(storage, shard, 11_000, direct=False)
        storage.graph(shard)
    assert descriptors() == before


# Cancelling


def test_reads_grow_where_they_are_fast_and_not_where_they_are_slow(
    toy_large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storages, "_PIECE_BYTES", PAGE_BYTES)
    manifest = manifests.read(toy_large)
    shard = max(manifest.shards, key=lambda shard: shard.nbytes)
    sizes: dict[float, list[int]] = {}
    preadv = os.preadv
    for seconds in (1e-6, 1.0):
        clock = itertools.count(step=seconds)
        monkeypatch.setattr(storages.time, "perf_counter", lambda clock=clock: next(clock))
        seen = sizes.setdefault(seconds, [])

        def noting(descriptor: int, buffers: list[memoryview], offset: int, seen: list[int] = seen) -> int:
            seen.append(buffers[0].nbytes)
            return preadv(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", noting)
        buffer = Buffer(shard.nbytes)
        assert Storage(toy_large, manifest).read_weights(shard, [Part(0, shard.nbytes, buffer)], lambda: False)
    assert set(sizes[1.0]) == {PAGE_BYTES}
    assert sizes[1e-6][:2] == [PAGE_BYTES, page_ceil(shard.nbytes) - PAGE_BYTES]


def test_a_cancelled_read_stops_at_the_next_piece(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "_PIECE_BYTES", PAGE_BYTES)
    monkeypatch.setattr(storages, "_MOST_PIECE_BYTES", PAGE_BYTES)
    storage, shard, _ = _open(toy)
    for cuts in ((), (11_000,)):
        answers = iter([False, False, True])
        parts = _parts(shard, *cuts)
        assert not storage.read_weights(shard, parts, answers.__next__)
        # The first piece was there, and the one on the way when it was cancelled.
        assert _content(parts)[2 * PAGE_BYTES :] == b"\xaa" * (shard.nbytes - 2 * PAGE_BYTES)
        assert next(answers, None) is None
    # What was not read to the end does not count as verified.
    assert _read(storage, shard) == _expected(toy, shard)


def test_a_cancelled_read_does_not_count_as_verified(toy_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "_PIECE_BYTES", PAGE_BYTES)
    monkeypatch.setattr(storages, "_MOST_PIECE_BYTES", PAGE_BYTES)
    storage, shard, path = _open(toy_copy)
    answers = iter([False, True])
    assert not storage.read_weights(shard, _parts(shard), lambda: next(answers))
    _flip(path, -1)
    with pytest.raises(ShardError, match="is damaged"):
        _read(storage, shard)


# Damage. Each is a change to a weights file, and words of the message


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _cut(path: Path, nbytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-nbytes])


def _header(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite the JSON header in place, in the same number of bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(content[:8] + text.ljust(length) + content[8 + length :])


def _edit_tensor(**changes: Any) -> Callable[[Path], None]:
    def change(header: Any) -> None:
        next(iter(header.values())).update(changes)

    return lambda path: _header(path, change)


def _rename_tensor(path: Path) -> None:
    _header(path, lambda header: {f"x{name}": entry for name, entry in header.items()})


def _replace_header(text: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        path.write_bytes(content[:8] + text.ljust(length) + content[8 + length :])

    return change


def _write_at(at: int, data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at : at + len(data)] = data
        path.write_bytes(content)

    return change


_HEADER_DAMAGE = [
    pytest.param(Path.unlink, "cannot be read: No such file", id="missing"),
    pytest.param(lambda p: (p.unlink(), p.mkdir()), "cannot be read|has .* bytes", id="a directory"),
    pytest.param(lambda p: p.write_bytes(b""), "has 0 bytes, the manifest says", id="empty"),
    pytest.param(lambda p: _cut(p, 1), "bytes, the manifest says", id="one byte short"),
    pytest.param(lambda p: _cut(p, 8000), "bytes, the manifest says", id="truncated"),
    pytest.param(lambda p: p.write_bytes(p.read_bytes() + b"\0"), "bytes, the manifest says", id="grown"),
    pytest.param(_write_at(0, b"\xff" * 8), "no safetensors file", id="header of 2**64 bytes"),
    pytest.param(_write_at(0, bytes(8)), "no safetensors file", id="header of 0 bytes"),
    pytest.param(_replace_header(b"not json"), "damaged safetensors header", id="header is no JSON"),
    pytest.param(_replace_header(b"[]"), "damaged safetensors header", id="header is a list"),
    pytest.param(_replace_header(b'{"a": 1}'), "damaged safetensors header", id="entry is a number"),
    pytest.param(_replace_header(b"\xff\xfe"), "damaged safetensors header", id="header is no text"),
    pytest.param(_replace_header(b"[" * 4000), "damaged safetensors header", id="header is deep"),
    pytest.param(_replace_header(b"{}"), "not the file that the manifest describes", id="header has no tensors"),
    pytest.param(_edit_tensor(dtype="F8"), "damaged safetensors header", id="unknown dtype"),
    pytest.param(_edit_tensor(dtype=[]), "damaged safetensors header", id="dtype is a list"),
    pytest.param(_edit_tensor(data_offsets=[]), "damaged safetensors header", id="no offsets"),
    pytest.param(_edit_tensor(data_offsets=["0", "1"]), "damaged safetensors header", id="offsets are texts"),
    pytest.param(_edit_tensor(dtype="I32"), "not the file that the manifest describes", id="other dtype"),
    pytest.param(_edit_tensor(shape=[32, 128]), "not the file that the manifest describes", id="other shape"),
    pytest.param(_edit_tensor(data_offsets=[256, 16640]), "not the file that the manifest describes", id="other place"),
    pytest.param(_rename_tensor, "not the file that the manifest describes", id="other names"),
]


@pytest.mark.parametrize(("damage", "words"), _HEADER_DAMAGE)
@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_is_not_the_exported_one_is_named(
    toy_copy: Path, damage: Callable[[Path], Any], words: str, verify: bool
) -> None:
    storage, shard, path = _open(toy_copy, verify=verify)
    damage(path)
    for attempt in (lambda: _read(storage, shard), lambda: _read(storage, shard, 4096)):
        with pytest.raises(ShardError, match=words) as caught:
            attempt()
        assert "shards/block.001.safetensors" in str(caught.value)
        assert "xport the model again" in str(caught.value)


@pytest.mark.parametrize(("damage", "words"), _HEADER_DAMAGE)
def test_damage_between_two_loads_is_named(toy_copy: Path, damage: Callable[[Path], Any], words: str) -> None:
    storage, shard, path = _open(toy_copy)
    _read(storage, shard)
    damage(path)
    with pytest.raises(ShardError, match=r"shards/block\.001\.safetensors"):
        _read(storage, shard)


@pytest.mark.parametrize("at", [-1, -16_640], ids=["last byte", "first byte"])
def test_a_flipped_bit_is_found_at_the_first_load(toy_copy: Path, at: int) -> None:
    storage, shard, path = _open(toy_copy)
    _flip(path, at)
    for attempt in (lambda: _read(storage, shard), lambda: _read(storage, shard, 4096)):
        with pytest.raises(ShardError, match=r"'shards/block.001.safetensors' is damaged: its sha256"):
            attempt()


def test_without_verify_only_the_sha256_is_skipped(toy_copy: Path) -> None:
    storage, shard, path = _open(toy_copy, verify=False)
    _flip(path, -1)
    assert _read(storage, shard) == _expected(toy_copy, shard)


@pytest.mark.parametrize("verify", [True, False])
def test_another_block_in_its_place_is_named(toy_copy: Path, verify: bool) -> None:
    # Same size, same shapes, other names.
    storage, shard, path = _open(toy_copy, verify=verify)
    shutil.copy(path.with_name("block.002.safetensors"), path)
    with pytest.raises(ShardError, match=r"'shards/block.001.safetensors'"):
        _read(storage, shard)


def test_the_same_block_of_another_model_is_named(toy_copy: Path, made_toys: Callable[[str], Path]) -> None:
    # Same size, same header, other weights: only the hash can tell.
    storage, shard, path = _open(toy_copy)
    shutil.copy(made_toys("toy-other") / "shards" / path.name, path)
    with pytest.raises(ShardError, match=r"'shards/block.001.safetensors' is damaged"):
        _read(storage, shard)


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("left", [0, 100, PAGE_BYTES, PAGE_BYTES + 100, 3 * PAGE_BYTES + 1])
def test_a_file_that_shrinks_while_it_is_read_is_named(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None], left: int
) -> None:
    way(monkeypatch)
    storage, shard, path = _open(toy_copy)
    assert shard.weights is not None
    begin = shard.weights.offset
    answers = iter([lambda: os.truncate(path, begin + left)])

    def shrink() -> bool:
        # Looked at after the header was checked, and before each piece.
        next(answers, lambda: None)()
        return False

    with pytest.raises(ShardError, match=r"'shards/block.001.safetensors' has .* bytes"):
        storage.read_weights(shard, _parts(shard), shrink)


@pytest.mark.parametrize("way", [_refusing_direct_read, _as_it_is], ids=["fallback", "direct"])
def test_a_disk_that_fails_is_a_load_error(
    toy: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[[pytest.MonkeyPatch], None],
    descriptors: Callable[[], int],
) -> None:
    storage, shard, _ = _open(toy)
    before = descriptors()

    monkeypatch.setattr(os, "preadv", _raising(OSError(errno.EIO, "Input/output error")))
    way(monkeypatch)
    with pytest.raises(LoadError, match=r"Reading 'shards/block.001.safetensors' at byte 4096 failed") as caught:
        _read(storage, shard)
    assert isinstance(caught.value.__cause__, OSError)
    assert descriptors() == before


def test_a_file_that_vanishes_when_direct_io_fails_is_named(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch, descriptors: Callable[[], int]
) -> None:
    storage, shard, path = _open(toy_copy)
    before = descriptors()

    def vanish(*_: Any) -> int:
        path.unlink(missing_ok=True)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", vanish)
    with pytest.raises((ShardError, LoadError), match=r"shards/block.001.safetensors"):
        _read(storage, shard)
    assert descriptors() == before


def test_a_file_that_vanishes_after_it_was_opened_fails_by_name_or_not_at_all(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch, descriptors: Callable[[], int]
) -> None:
    storage, shard, path = _open(toy_copy)
    before, real = descriptors(), os.preadv

    def vanish(*arguments: Any) -> int:
        path.unlink(missing_ok=True)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", vanish)
    # What was read is whole: only the next load can notice.
    assert len(_read(storage, shard)) == shard.nbytes
    with pytest.raises(ShardError, match="cannot be read: No such file"):
        _read(storage, shard)
    assert descriptors() == before


# Graphs


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "cannot be read"),
        (lambda p: _cut(p, 1), "bytes, the manifest says"),
        (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "bytes, the manifest says"),
        (lambda p: _flip(p, 20), "is damaged"),
    ],
    ids=["missing", "truncated", "grown", "flipped"],
)
def test_a_damaged_graph_is_named(toy_copy: Path, damage: Callable[[Path], None], words: str) -> None:
    storage, shard, _ = _open(toy_copy)
    damage(toy_copy / shard.graph.path)
    with pytest.raises(ShardError, match=words) as caught:
        storage.graph(shard)
    assert "shards/block.001.onnx" in str(caught.value)


def test_a_graph_that_changes_size_later_is_named(toy_copy: Path) -> None:
    storage, shard, _ = _open(toy_copy)
    assert storage.graph(shard) == toy_copy / shard.graph.path
    _cut(toy_copy / shard.graph.path, 1)
    with pytest.raises(ShardError, match="bytes, the manifest says"):
        storage.graph(shard)


# Nothing outside the directory


@pytest.mark.parametrize("relative", ["shards/block.001.safetensors", "shards/block.001.onnx"])
def test_a_link_out_of_the_directory_is_refused(toy_copy: Path, toy: Path, relative: str) -> None:
    storage, shard, _ = _open(toy_copy)
    (toy_copy / relative).unlink()
    (toy_copy / relative).symlink_to(toy / relative)
    with pytest.raises(ShardError, match=f"'{relative}' leads out of the model directory"):
        storage.graph(shard) if relative.endswith(".onnx") else _read(storage, shard)


def test_a_linked_folder_out_of_the_directory_is_refused(toy_copy: Path, toy: Path) -> None:
    storage, shard, _ = _open(toy_copy)
    shutil.rmtree(toy_copy / "shards")
    (toy_copy / "shards").symlink_to(toy / "shards")
    with pytest.raises(ShardError, match="leads out of the model directory"):
        _read(storage, shard)


def test_a_link_to_the_directory_itself_works(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(toy)
    storage, shard, _ = _open(tmp_path / "link")
    assert _read(storage, shard) == _expected(toy, shard)


def test_a_link_inside_the_directory_works(toy_copy: Path) -> None:
    storage, shard, path = _open(toy_copy)
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))
    assert _read(storage, shard) == _expected(toy_copy, shard)


# Rows


@pytest.fixture
def table(toy: Path) -> tuple[Storage, Lookup, Any]:
    manifest = manifests.read(toy)
    (lookup,) = manifest.shards[0].lookups
    content = (toy / lookup.path).read_bytes()
    size = int(np.prod(lookup.table.shape))
    whole = np.frombuffer(content, lookup.table.dtype, size, lookup.table.offset).reshape(lookup.table.shape)
    return Storage(toy, manifest), lookup, whole


_INDICES = [
    np.array([[3, 1, 3], [0, 95, 1]]),
    np.array([-1, 0, -96, 95]),
    np.array(7),
    np.array([], np.int64),
    np.zeros((2, 0, 3), np.int32),
    np.array([5, 5, 5], np.int32),
    np.array([[250], [1]], np.uint8) % 96,
    np.array([3, -3], np.int8),
    np.array([95], np.uint64),
    np.arange(96)[::-1].reshape(4, 24),
]


@pytest.mark.parametrize("indices", _INDICES, ids=lambda indices: f"{indices.dtype}{list(indices.shape)}")
@pytest.mark.parametrize("keep_cached", [True, False])
def test_rows_are_what_numpy_would_index(table: Any, indices: Any, keep_cached: bool) -> None:
    storage, lookup, whole = table
    rows = storage.read_rows(lookup, indices, keep_cached=keep_cached)
    assert rows.dtype == whole.dtype
    np.testing.assert_array_equal(rows, whole[indices])


def test_random_rows_are_what_numpy_would_index(table: Any) -> None:
    storage, lookup, whole = table
    random = np.random.default_rng(0)
    for _ in range(50):
        shape = random.integers(0, 6, random.integers(0, 4))
        indices = random.integers(-96, 96, shape)
        np.testing.assert_array_equal(storage.read_rows(lookup, indices, keep_cached=True), whole[indices])


@pytest.mark.parametrize("indices", [[96], [-97], [0, 1, 10**12], [[5], [-(10**12)]]])
def test_rows_beyond_the_table_are_an_index_error(table: Any, indices: Any) -> None:
    storage, lookup, _ = table
    with pytest.raises(IndexError, match=r"is no row of 'embeddings\.table', which has 96"):
        storage.read_rows(lookup, np.array(indices), keep_cached=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_rows_of_every_element_type_are_read(toy: Path, dtype: str) -> None:
    manifest = manifests.read(toy)
    (lookup,) = manifest.shards[0].lookups
    width = 256 // manifests.dtype_bytes(dtype)
    # The same bytes as another type: the header would not agree, so the manifest lists none of its tensors.
    other = replace(lookup, table=replace(lookup.table, name="other", dtype=dtype, shape=(96, width)))
    storage = Storage(toy, replace(manifest, shards=(replace(manifest.shards[0], lookups=()),)))
    rows = storage.read_rows(other, np.array([4, 2]), keep_cached=True)
    assert rows.dtype == ("uint16" if dtype == "bfloat16" else dtype)
    expected = storage.read_rows(
        replace(lookup, table=replace(lookup.table, name="other")), np.array([4, 2]), keep_cached=True
    )
    assert rows.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("damage", "words"), _HEADER_DAMAGE)
@pytest.mark.parametrize("again", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_table_file_that_is_not_the_exported_one_is_named(
    toy_copy: Path, damage: Callable[[Path], Any], words: str, again: bool, verify: bool
) -> None:
    manifest = manifests.read(toy_copy)
    (lookup,) = manifest.shards[0].lookups
    storage = Storage(toy_copy, manifest, verify=verify)
    if again:
        storage.read_rows(lookup, np.array([1]), keep_cached=True)
    damage(toy_copy / lookup.path)
    with pytest.raises(ShardError, match=r"shards/embeddings\.safetensors"):
        storage.read_rows(lookup, np.array([1]), keep_cached=True)


def test_a_foreign_table_file_is_named(toy_copy: Path, made_toys: Callable[[str], Path]) -> None:
    manifest = manifests.read(toy_copy)
    (lookup,) = manifest.shards[0].lookups
    shutil.copy(made_toys("toy-other") / lookup.path, toy_copy / lookup.path)
    with pytest.raises(ShardError, match=r"'shards/embeddings\.safetensors' is damaged"):
        Storage(toy_copy, manifest).read_rows(lookup, np.array([1]), keep_cached=True)


@pytest.mark.parametrize(
    "damage",
    [
        _replace_header(b"{}"),
        _edit_tensor(dtype="I32"),
        _edit_tensor(shape=[16, 64]),
        _edit_tensor(data_offsets=[64, 0]),
    ],
    ids=["none", "other dtype", "smaller", "other place"],
)
def test_a_slice_of_a_head_lies_within_a_tensor_of_its_file(
    toy_decoder: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    directory = Path(shutil.copytree(toy_decoder, tmp_path / "model"))
    manifest = manifests.read(directory)
    # Not tied: nothing else speaks of the file.
    manifest = replace(manifest, shards=tuple(replace(shard, lookups=()) for shard in manifest.shards))
    storage, head = Storage(directory, manifest, verify=False), manifest.shards[-2]
    assert _read(storage, head) == _expected(directory, head)
    assert head.weights is not None
    damage(directory / head.weights.path)
    with pytest.raises(ShardError, match=r"'shards/embeddings\.safetensors' is not the file"):
        _read(Storage(directory, manifest, verify=False), head)


def test_a_tied_table_is_checked_by_the_slices_of_its_head(toy_decoder: Path, tmp_path: Path) -> None:
    # Each slice is loaded and checked before a pass has an answer: to read all of the table for it would be a waste.
    directory = Path(shutil.copytree(toy_decoder, tmp_path / "model"))
    manifest = manifests.read(directory)
    (lookup,) = manifest.shards[0].lookups
    _flip(directory / lookup.path, -1)
    storage = Storage(directory, manifest)
    storage.read_rows(lookup, np.array([1]), keep_cached=True)
    _read(storage, manifest.shards[-2])
    with pytest.raises(ShardError, match=r"'shards/embeddings\.safetensors' is damaged"):
        _read(storage, manifest.shards[-1])


def test_a_table_beside_a_tied_head_is_checked(exported: Path, tmp_path: Path) -> None:
    manifest = manifests.read(exported)
    heads = {shard.weights.path for shard in manifest.shards if shard.role == "head" and shard.weights}
    tied = [lookup for shard in manifest.shards for lookup in shard.lookups if lookup.path in heads]
    if len({lookup.table.name for lookup in tied}) < 2:
        pytest.skip("no second table in the file of a tied head")
    copy = Path(shutil.copytree(exported, tmp_path / "model"))
    table = min((lookup.table for lookup in tied), key=lambda table: table.nbytes)
    with (copy / tied[0].path).open("r+b") as file:
        file.seek(table.offset)
        file.write(b"\x55" * 64)
    with pytest.raises(ShardError, match=r"embeddings\.safetensors' is damaged"):
        Storage(copy, manifest).read_rows(tied[0], np.array([1]), keep_cached=True)


def test_a_disk_that_fails_for_a_row_is_named(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, lookup, _ = table
    storage.read_rows(lookup, np.array([1]), keep_cached=True)
    monkeypatch.setattr(os, "preadv", _raising(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(ShardError, match=r"'shards/embeddings\.safetensors' cannot be read: Input/output error"):
        storage.read_rows(lookup, np.array([1]), keep_cached=True)


# Reading without keeping


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("direct", [True, False])
def test_a_stream_reads_all_of_a_shard_into_the_same_memory(
    toy: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None], direct: bool
) -> None:
    way(monkeypatch)
    storage, shard, _ = _open(toy)
    scratch, seen = Buffer(PAGE_BYTES), bytearray()
    for nbytes in storage.stream_weights(shard, scratch, direct=direct):
        assert 0 < nbytes <= PAGE_BYTES
        seen += scratch.piece(0, nbytes)
    assert bytes(seen) == _expected(toy, shard)


def test_only_a_direct_stream_asks_for_direct_io(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, flags_seen = os.open, []

    def note(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        flags_seen.append(bool(flags & os.O_DIRECT))
        return real(path, flags, *rest, **options)

    storage, shard, _ = _open(toy)
    monkeypatch.setattr(os, "open", note)
    for direct in (True, False):
        assert sum(storage.stream_weights(shard, Buffer(1 << 20), direct=direct)) == shard.nbytes
    assert flags_seen == [True, False]


def test_a_stream_that_is_left_closes_its_file(toy: Path, descriptors: Callable[[], int]) -> None:
    storage, shard, _ = _open(toy)
    before = descriptors()
    stream = storage.stream_weights(shard, Buffer(PAGE_BYTES))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert descriptors() == before


def test_a_stream_of_a_shard_without_weights_is_empty(toy: Path) -> None:
    storage, shard, _ = _open(toy)
    assert list(storage.stream_weights(replace(shard, weights=None, tensors=()), Buffer(1))) == []


def test_a_stream_of_a_file_that_is_cut_is_named(toy_copy: Path) -> None:
    storage, shard, path = _open(toy_copy)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ShardError, match="bytes, the manifest says"):
        list(storage.stream_weights(shard, Buffer(PAGE_BYTES)))
