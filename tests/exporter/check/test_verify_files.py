"""How verify reads the files: hard-linked ones as load does, each byte once, and nothing but regular files."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.exporter.models import write_onnx

import pipeload
from pipeload.errors import ShardError
from pipeload.format.manifest import read, write
from pipeload_export import export, verify
from pipeload_export.check import verify as module


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export(write_onnx(tmp_path / "model.onnx"), tmp_path / "exported")
    return tmp_path / "exported"


def test_hard_linked_files_pass_as_they_load(exported: Path, tmp_path: Path) -> None:
    for path in list((exported / "shards").iterdir()):
        os.link(path, tmp_path / f"second name of {path.name}")
    verify(exported, tmp_path / "model.onnx")
    with pipeload.load(exported) as model:
        model.run({"input_ids": np.zeros((1, 3), np.int64), "attention_mask": np.ones((1, 3), np.int64)})


def test_links_within_the_directory_pass_as_they_load(exported: Path, tmp_path: Path) -> None:
    (exported / "blobs").mkdir()
    for path in list((exported / "shards").iterdir()):
        path.rename(exported / "blobs" / path.name)
        path.symlink_to(Path("..", "blobs", path.name))
    with pipeload.load(exported) as model:
        model.run({"input_ids": np.zeros((1, 3), np.int64), "attention_mask": np.ones((1, 3), np.int64)})
    verify(exported, tmp_path / "model.onnx")


def test_every_byte_is_read_once_for_all_its_hashes(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, counts = read(exported), dict[str, int]()
    pieces = module._pieces

    def counted(directory: Path, record: pipeload.format.manifest.FileRecord):  # type: ignore[no-untyped-def]
        for piece in pieces(directory, record):
            counts[record.path] = counts.get(record.path, 0) + len(piece)
            yield piece

    monkeypatch.setattr(module, "_pieces", counted)
    verify(exported)
    assert counts == {record.path: record.nbytes for record in manifest.files}


def test_the_sha256_of_a_shards_part_counts(exported: Path) -> None:
    manifest = read(exported)
    name = "block.001"

    def other(shard: pipeload.format.manifest.Shard) -> pipeload.format.manifest.Shard:
        return replace(shard, weights=shard.weights and replace(shard.weights, sha256="0" * 64))

    write(replace(manifest, shards=tuple(other(s) if s.name == name else s for s in manifest.shards)), exported)
    with pytest.raises(ShardError, match=rf"'shards/{name}\.safetensors' is damaged"):
        verify(exported)


@pytest.mark.parametrize("kind", ["pipe", "loop", "folder", "device"])
def test_what_is_no_regular_file_is_named(exported: Path, kind: str) -> None:
    path = exported / "shards" / "block.000.safetensors"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    with pytest.raises(ShardError, match=r"'shards/block\.000\.safetensors' (cannot be read|leads out)"):
        verify(exported)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_directories_whose_files_have_digests_of_all_bytes_are_checked_as_before(name: str, tmp_path: Path) -> None:
    directory = shutil.copytree(Path(__file__).parents[2] / "data" / "format-1" / name, tmp_path / name)
    assert not any(record.ranges_apart for record in read(directory).files)
    verify(directory)
    path = directory / "shards" / "embeddings.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"'shards/embeddings\.safetensors' is damaged"):
        verify(directory)
