"""Files that change while a model is open: the bytes are right, or a ShardError names the file."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine import toy as toys
from tests.engine.storage.reading import (
    content_of,
    expected_of,
    flip,
    never,
    open_graph,
    open_storage,
    parts_of,
    read_shard,
)

import pipeload
from pipeload.errors import ShardError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Shard
from pipeload.storage import stamps as stamping
from pipeload.storage.weights import Storage

CUT = 11_000
_TICKS = itertools.count(10**18)


@pytest.fixture(params=["old", "fresh"], autouse=True)
def age(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether files count as old enough for their stamps to tell of every change."""
    monkeypatch.setattr(stamping, "_FRESH_NS", -1 if request.param == "old" else 1 << 62)
    return str(request.param)


def _part(storage: Storage, shard: Shard) -> bytes:
    parts = parts_of(shard, CUT)[1:]
    assert storage.read_weights(shard, parts, never)
    return content_of(parts)


def _row(storage: Storage, shard: Shard) -> bytes:
    return storage.read_rows(shard.lookups[0], np.array([1]), keep_cached=True).tobytes()


USES = {
    "whole": (2, "block.001.safetensors", read_shard),
    "parts": (2, "block.001.safetensors", lambda storage, shard: read_shard(storage, shard, CUT)),
    "one part": (2, "block.001.safetensors", _part),
    "graph": (2, "block.001.onnx", open_graph),
    "row": (0, "embeddings.safetensors", _row),
}


@pytest.fixture(params=USES)
def use(request: pytest.FixtureRequest, toy_copy: Path) -> tuple[Callable[[], bytes], Path]:
    """(reads something of a file of an open model, the file)."""
    index, name, read = USES[request.param]
    manifest = manifests.read(toy_copy)
    storage = Storage(toy_copy, manifest)
    return lambda: read(storage, manifest.shards[index]), toy_copy / "shards" / name


def _in_place(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    _later(path)


def _later(path: Path) -> None:
    """As if the file had been written in another tick of the clock than before."""
    os.utime(path, ns=(0, next(_TICKS)))


def _replaced(path: Path, at: int) -> None:
    other = Path(shutil.copy2(path, path.with_suffix(".other")))
    _in_place(other, at)
    other.replace(path)


@pytest.mark.parametrize("change", [_in_place, _replaced], ids=["in place", "replaced"])
@pytest.mark.parametrize("at", [-1, "middle"])
def test_a_file_that_changed_since_it_was_found_right_is_named_and_right_again_when_it_is_back(
    use: tuple[Callable[[], bytes], Path], change: Callable[[Path, int], None], at: int | str
) -> None:
    read, path = use
    size = path.stat().st_size
    place = size // 2 if at == "middle" else size - 1
    good = Path(shutil.copy2(path, path.with_suffix(".good")))
    expected = read()
    for _ in range(2):
        change(path, place)
        for _ in range(3):
            with pytest.raises(ShardError, match=rf"'shards/{path.name}' is damaged"):
                read()
        shutil.copy2(good, path.with_suffix(".back")).replace(path)
        for _ in range(3):
            assert read() == expected
    _in_place(path, place)
    _in_place(path, place)
    assert read() == expected


def test_a_file_whose_damage_lies_before_the_part_that_is_read_is_named(toy_copy: Path) -> None:
    # The bytes in memory were right; only a hash of the whole changed file can tell whether its other bytes are.
    storage, shard, path = open_storage(toy_copy)
    read_shard(storage, shard, CUT)
    flip(path, -shard.nbytes)
    with pytest.raises(ShardError, match="is damaged"):
        _part(storage, shard)


def test_a_file_that_changes_while_it_is_read_is_right_or_named(
    use: tuple[Callable[[], bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, path = use
    expected = read()
    real, place = os.preadv, path.stat().st_size - 1

    def change(*arguments: Any) -> int:
        _in_place(path, place)
        return real(*arguments)

    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", change)
            with suppress(ShardError):
                assert read() == expected
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *arguments: (_later(path), real(*arguments))[1])
        with suppress(ShardError):
            assert read() == expected


def test_without_verify_a_changed_file_is_read_as_it_is(toy_copy: Path) -> None:
    storage, shard, path = open_storage(toy_copy, verify=False)
    before = read_shard(storage, shard)
    flip(path, -1)
    assert read_shard(storage, shard) == expected_of(toy_copy, shard) != before


@pytest.fixture
def tied(toy_decoder: Path, tmp_path: Path) -> tuple[Storage, list[Shard], Path]:
    """(storage, [prologue, head slices], file of the table)."""
    directory = Path(shutil.copytree(toy_decoder, tmp_path / "tied"))
    manifest = manifests.read(directory)
    shards = [manifest.shards[0], *(shard for shard in manifest.shards if shard.role == "head")]
    return Storage(directory, manifest), shards, directory / shards[0].lookups[0].path


def _pass(storage: Storage, shards: list[Shard]) -> bytes:
    return _row(storage, shards[0]) + b"".join(read_shard(storage, shard) for shard in shards[1:])


def test_rows_of_a_tied_table_that_changed_are_never_used(tied: tuple[Storage, list[Shard], Path]) -> None:
    storage, shards, path = tied
    good = Path(shutil.copy2(path, path.with_suffix(".good")))
    expected = _pass(storage, shards)
    # The head stays in memory: no later pass reads, and checks, its slices again.
    _in_place(path, path.stat().st_size - 1)
    for _ in range(2):
        with pytest.raises(ShardError, match="is damaged"):
            _row(storage, shards[0])
    shutil.copy2(good, path)
    assert _pass(storage, shards) == expected
    path.touch()
    assert _row(storage, shards[0]) == _row(storage, shards[0])


def test_rows_of_a_tied_table_that_changes_before_the_head_is_read_are_not_used(
    tied: tuple[Storage, list[Shard], Path],
) -> None:
    storage, shards, path = tied
    content = path.read_bytes()
    _in_place(path, len(content) - 1)
    with pytest.raises(ShardError, match=r"is damaged|changed while a pass read it"):
        _taking(storage, shards, lambda: path.write_bytes(content))
    path.write_bytes(content)
    assert _pass(storage, shards) == _pass(storage, shards)


def _taking(storage: Storage, shards: list[Shard], between: Callable[[], object]) -> None:
    _row(storage, shards[0])
    between()
    for shard in shards[1:]:
        read_shard(storage, shard)


@pytest.mark.parametrize("budget", ["8GB", None], ids=["resident", "streamed"])
def test_an_open_model_never_answers_from_a_changed_file(toy_copy: Path, budget: str | None) -> None:
    path = toy_copy / "shards" / "block.003.safetensors"
    good = Path(shutil.copy2(path, path.with_suffix(".good")))
    with pipeload.load(toy_copy, budget or _smallest(toy_copy)) as model:
        expected = {name: np.array(array) for name, array in model.run(toys.inputs()).items()}
        for _ in range(2):
            _in_place(path, path.stat().st_size - 1)
            for _ in range(3):
                _is_right_or_named(model, expected)
            shutil.copy2(good, path)
            for _ in range(3):
                _is_right_or_named(model, expected)
        np.testing.assert_equal(model.run(toys.inputs()), expected)


def _smallest(directory: Path) -> int:
    with pytest.raises(pipeload.BudgetError) as caught:
        pipeload.load(directory, "1MB")
    return int(caught.value.needed_bytes)


def _is_right_or_named(model: pipeload.Model, expected: dict[str, Any]) -> None:
    with suppress(ShardError):
        np.testing.assert_equal(model.run(toys.inputs()), expected)
