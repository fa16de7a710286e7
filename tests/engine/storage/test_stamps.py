"""A file that was checked once is not hashed again until it changes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.engine.storage.reading import open_graph

from pipeload.errors import ShardError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME
from pipeload.machine.user_cache import user_cache
from pipeload.storage import digests
from pipeload.storage import stamps as stamping
from pipeload.storage import weights as storages
from pipeload.storage.buffers import Buffer, Part
from pipeload.storage.stamps import Stamps, stamp_of, stamps_of
from pipeload.storage.weights import Storage

BLOCK = 2
BLOCK_FILE, GRAPH_FILE, TABLE_FILE = "block.001.safetensors", "block.001.onnx", "embeddings.safetensors"


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is an hour ahead: every file is old enough to be remembered."""
    real = stamping.time.time_ns
    monkeypatch.setattr(stamping, "time", SimpleNamespace(time_ns=lambda: real() + 3600 * 10**9))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were hashed for each sha256 that was begun since the list was cleared."""
    counts: list[int] = []

    class Counting:
        def __init__(self, data: Any = b"") -> None:
            self._digest = hashlib.sha256(data)
            counts.append(len(data))
            self._place = len(counts) - 1

        def update(self, data: Any) -> None:
            counts[self._place] += len(data)
            self._digest.update(data)

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    for module in (storages, digests):
        monkeypatch.setattr(module, "hashlib", SimpleNamespace(sha256=Counting))
    return counts


def _storage(directory: Path) -> Storage:
    """As another process would open it."""
    stamps = stamps_of(directory, (directory / MANIFEST_NAME).read_bytes())
    return Storage(directory, manifests.read(directory), stamps=stamps)


def _use(storage: Storage, directory: Path) -> None:
    """Read a block, its graph, and a row of the table."""
    manifest = manifests.read(directory)
    shard = manifest.shards[BLOCK]
    open_graph(storage, shard)
    assert storage.read_weights(shard, [Part(0, shard.nbytes, Buffer(shard.nbytes))], lambda: False)
    storage.read_rows(manifest.shards[0].lookups[0], np.array([1]), keep_cached=True)


def _check(directory: Path) -> None:
    storage = _storage(directory)
    _use(storage, directory)
    storage.save_stamps()


def _sizes(directory: Path) -> dict[str, int]:
    manifest = manifests.read(directory)
    shard = manifest.shards[BLOCK]
    return {
        BLOCK_FILE: shard.nbytes,
        GRAPH_FILE: shard.graph.nbytes,
        TABLE_FILE: (directory / "shards" / TABLE_FILE).stat().st_size,
    }


def test_a_file_that_was_checked_is_not_hashed_again_by_a_later_process(toy_copy: Path, hashed: list[int]) -> None:
    _check(toy_copy)
    assert sorted(hashed) == sorted(_sizes(toy_copy).values())
    hashed.clear()
    for _ in range(3):
        _check(toy_copy)
    assert hashed == []


def test_nothing_is_remembered_before_it_is_saved(toy_copy: Path, hashed: list[int]) -> None:
    _use(_storage(toy_copy), toy_copy)
    assert not user_cache("verified").exists()
    hashed.clear()
    _check(toy_copy)
    assert len(hashed) == 3


def _change(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content)


def _replace(path: Path) -> None:
    other = path.with_suffix(".other")
    shutil.copy2(path, other)
    other.replace(path)


def _touch(path: Path) -> None:
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))


def _touch_back(path: Path) -> None:
    """The time of the last change is set back to the old one: only the inode's own time tells."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=times)


def _link(path: Path) -> None:
    moved = path.with_suffix(".moved")
    shutil.copy2(path, moved)
    path.unlink()
    path.symlink_to(moved)


@pytest.mark.parametrize("name", [BLOCK_FILE, GRAPH_FILE, TABLE_FILE])
@pytest.mark.parametrize("change", [_change, _replace, _touch, _touch_back, _link], ids=lambda change: change.__name__)
def test_a_file_that_changed_in_any_way_is_hashed_again(
    toy_copy: Path, hashed: list[int], name: str, change: Callable[[Path], None]
) -> None:
    _check(toy_copy)
    hashed.clear()
    change(toy_copy / "shards" / name)
    _check(toy_copy)
    assert hashed == [_sizes(toy_copy)[name]]


@pytest.mark.parametrize("name", [BLOCK_FILE, GRAPH_FILE, TABLE_FILE])
@pytest.mark.parametrize("times", [True, False], ids=["old times", "new times"])
def test_damage_to_a_file_that_was_checked_is_found(toy_copy: Path, name: str, times: bool) -> None:
    _check(toy_copy)
    path = toy_copy / "shards" / name
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    if times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(ShardError, match=rf"{name}' is damaged"):
            _check(toy_copy)


def test_damage_is_never_remembered_as_right(toy_copy: Path, hashed: list[int]) -> None:
    path = toy_copy / "shards" / BLOCK_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x7f")
    for _ in range(2):
        storage = _storage(toy_copy)
        with pytest.raises(ShardError, match="is damaged"):
            _use(storage, toy_copy)
        storage.save_stamps()
    path.write_bytes(whole)
    hashed.clear()
    _check(toy_copy)
    assert _sizes(toy_copy)[BLOCK_FILE] in hashed


def test_another_directory_has_stamps_of_its_own(toy_copy: Path, tmp_path: Path, hashed: list[int]) -> None:
    _check(toy_copy)
    copied = Path(shutil.copytree(toy_copy, tmp_path / "copied"))
    hashed.clear()
    _check(copied)
    assert len(hashed) == 3


def test_stamps_of_another_manifest_are_not_used(toy_copy: Path, hashed: list[int]) -> None:
    _check(toy_copy)
    manifest = toy_copy / MANIFEST_NAME
    text = manifest.read_text()
    manifest.write_text(text.replace('"toy"', '"other"', 1))
    assert manifest.read_text() != text
    hashed.clear()
    _check(toy_copy)
    assert len(hashed) == 3


def test_a_file_that_changed_a_moment_ago_is_hashed_at_every_read(
    toy_copy: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # It could change again in the same tick of the file system's clock, and its stamp would not tell.
    newest = max(stamp_of(path)[4] for path in (toy_copy / "shards").iterdir())
    monkeypatch.setattr(stamping, "time", SimpleNamespace(time_ns=lambda: newest + 10**9))
    storage = _storage(toy_copy)
    for count in (3, 6):
        _use(storage, toy_copy)
        assert len(hashed) == count
    monkeypatch.setattr(stamping, "time", SimpleNamespace(time_ns=lambda: newest + 3 * 10**9))
    for count in (9, 9):
        _use(storage, toy_copy)
        assert len(hashed) == count


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    toy_copy: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy_copy / "shards" / BLOCK_FILE
    real = os.preadv

    def touch(*arguments: Any) -> int:
        _touch(path)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", touch)
        _check(toy_copy)
    hashed.clear()
    _check(toy_copy)
    assert _sizes(toy_copy)[BLOCK_FILE] in hashed


@pytest.mark.parametrize(
    "content",
    [b"", b"no json", b"[]", b'{"a": 1}', b'{"a": [1, 2]}', b'{"a": ["x", 1, 1, 1, 1]}', b"\xff\xfe", b"[" * 10_000],
    ids=lambda content: repr(content[:12]),
)
def test_damaged_stamps_are_ignored_and_replaced(toy_copy: Path, hashed: list[int], content: bytes) -> None:
    _check(toy_copy)
    (kept,) = user_cache("verified").iterdir()
    kept.write_bytes(content)
    hashed.clear()
    _check(toy_copy)
    assert len(hashed) == 3
    hashed.clear()
    _check(toy_copy)
    assert hashed == []


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name)]
)
def test_stamps_that_cannot_be_read_are_ignored(
    toy_copy: Path, hashed: list[int], make: Callable[[Path], None]
) -> None:
    _check(toy_copy)
    (kept,) = user_cache("verified").iterdir()
    kept.unlink()
    make(kept)
    hashed.clear()
    _check(toy_copy)
    assert len(hashed) == 3


def test_a_cache_that_cannot_be_written_does_no_harm(
    toy_copy: Path, tmp_path: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("PIPELOAD_CACHE", str(blocker))
    for _ in range(2):
        hashed.clear()
        _check(toy_copy)
        assert len(hashed) == 3


def test_without_a_file_nothing_is_kept(toy_copy: Path, hashed: list[int]) -> None:
    for _ in range(2):
        hashed.clear()
        storage = Storage(toy_copy, manifests.read(toy_copy))
        for _ in range(2):
            _use(storage, toy_copy)
        storage.save_stamps()
        assert len(hashed) == 3
    assert not user_cache("verified").exists()


def test_only_a_file_that_stayed_the_same_while_it_was_read_has_a_stamp(toy_copy: Path) -> None:
    path = toy_copy / "shards" / BLOCK_FILE
    stamps, before = Stamps(None), stamp_of(path)
    _touch(path)
    after = stamp_of(path)
    stamps.add("key", before, after)
    assert not stamps.has("key", before)
    assert not stamps.has("key", after)
    stamps.add("key", after, after)
    assert stamps.has("key", after)
    assert not stamps.has("key", before)
    assert not stamps.has("other", after)
