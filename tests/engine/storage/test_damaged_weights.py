"""Damage to a weights file is named before its bytes are used."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine.storage.reading import (
    HEADER_DAMAGE,
    WAYS,
    as_it_is,
    expected_of,
    flip,
    open_storage,
    parts_of,
    raising,
    read_shard,
    refusing_direct_read,
    replace_header,
)

from pipeload.errors import LoadError, ShardError
from pipeload.format.manifest import PAGE_BYTES


@pytest.mark.parametrize(("damage", "words"), HEADER_DAMAGE)
@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_is_not_the_exported_one_is_named(
    toy_copy: Path, damage: Callable[[Path], Any], words: str, verify: bool
) -> None:
    storage, shard, path = open_storage(toy_copy, verify=verify)
    damage(path)
    for attempt in (lambda: read_shard(storage, shard), lambda: read_shard(storage, shard, 4096)):
        with pytest.raises(ShardError, match=words) as caught:
            attempt()
        assert "shards/block.001.safetensors" in str(caught.value)
        assert "xport the model again" in str(caught.value)


@pytest.mark.parametrize(("damage", "words"), HEADER_DAMAGE)
def test_damage_between_two_loads_is_named(toy_copy: Path, damage: Callable[[Path], Any], words: str) -> None:
    storage, shard, path = open_storage(toy_copy)
    read_shard(storage, shard)
    damage(path)
    with pytest.raises(ShardError, match=r"shards/block\.001\.safetensors"):
        read_shard(storage, shard)


@pytest.mark.parametrize("at", [-1, -16_640], ids=["last byte", "first byte"])
def test_a_flipped_bit_is_found_at_the_first_load(toy_copy: Path, at: int) -> None:
    storage, shard, path = open_storage(toy_copy)
    flip(path, at)
    for attempt in (lambda: read_shard(storage, shard), lambda: read_shard(storage, shard, 4096)):
        with pytest.raises(ShardError, match=r"'shards/block.001.safetensors' is damaged: its sha256"):
            attempt()


def test_without_verify_only_the_sha256_is_skipped(toy_copy: Path) -> None:
    storage, shard, path = open_storage(toy_copy, verify=False)
    flip(path, -1)
    assert read_shard(storage, shard) == expected_of(toy_copy, shard)


@pytest.mark.parametrize("verify", [True, False])
def test_another_block_in_its_place_is_named(toy_copy: Path, verify: bool) -> None:
    # Same size, same shapes, other names.
    storage, shard, path = open_storage(toy_copy, verify=verify)
    shutil.copy(path.with_name("block.002.safetensors"), path)
    with pytest.raises(ShardError, match=r"'shards/block.001.safetensors'"):
        read_shard(storage, shard)


def test_the_same_block_of_another_model_is_named(toy_copy: Path, made_toys: Callable[[str], Path]) -> None:
    # Same size, same header, other weights: only the hash can tell.
    storage, shard, path = open_storage(toy_copy)
    shutil.copy(made_toys("toy-other") / "shards" / path.name, path)
    with pytest.raises(ShardError, match=r"'shards/block.001.safetensors' is damaged"):
        read_shard(storage, shard)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("left", [0, 100, PAGE_BYTES, PAGE_BYTES + 100, 3 * PAGE_BYTES + 1])
def test_a_file_that_shrinks_while_it_is_read_is_named(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None], left: int
) -> None:
    way(monkeypatch)
    storage, shard, path = open_storage(toy_copy)
    assert shard.weights is not None
    begin = shard.weights.offset
    answers = iter([lambda: os.truncate(path, begin + left)])

    def shrink() -> bool:
        # Looked at after the header was checked, and before each piece.
        next(answers, lambda: None)()
        return False

    with pytest.raises(ShardError, match=r"'shards/block.001.safetensors' has .* bytes"):
        storage.read_weights(shard, parts_of(shard), shrink)


@pytest.mark.parametrize("way", [refusing_direct_read, as_it_is], ids=["fallback", "direct"])
def test_a_disk_that_fails_is_a_load_error(
    toy: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[[pytest.MonkeyPatch], None],
    descriptors: Callable[[], int],
) -> None:
    storage, shard, _ = open_storage(toy)
    before = descriptors()

    monkeypatch.setattr(os, "preadv", raising(OSError(errno.EIO, "Input/output error")))
    way(monkeypatch)
    with pytest.raises(LoadError, match=r"Reading 'shards/block.001.safetensors' at byte 4096 failed") as caught:
        read_shard(storage, shard)
    assert isinstance(caught.value.__cause__, OSError)
    assert descriptors() == before


def test_a_file_that_vanishes_when_direct_io_fails_is_named(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch, descriptors: Callable[[], int]
) -> None:
    storage, shard, path = open_storage(toy_copy)
    before = descriptors()

    def vanish(*_: Any) -> int:
        path.unlink(missing_ok=True)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", vanish)
    with pytest.raises((ShardError, LoadError), match=r"shards/block.001.safetensors"):
        read_shard(storage, shard)
    assert descriptors() == before


def test_a_file_that_vanishes_after_it_was_opened_fails_by_name_or_not_at_all(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch, descriptors: Callable[[], int]
) -> None:
    storage, shard, path = open_storage(toy_copy)
    before, real = descriptors(), os.preadv

    def vanish(*arguments: Any) -> int:
        path.unlink(missing_ok=True)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", vanish)
    # The bytes that were read are whole: only the next load can notice.
    assert len(read_shard(storage, shard)) == shard.nbytes
    with pytest.raises(ShardError, match="cannot be read: No such file"):
        read_shard(storage, shard)
    assert descriptors() == before


def test_a_header_with_a_name_twice_is_damaged(toy_copy: Path) -> None:
    """Readers differ in which of the two they take."""
    storage, shard, path = open_storage(toy_copy)
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    replace_header(f'{{"a":{entry},"a":{entry}}}'.encode())(path)
    with pytest.raises(ShardError, match=r"has a damaged safetensors header: .*a name occurs twice"):
        read_shard(storage, shard)
