"""Nothing outside the model's directory is opened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.engine.storage.reading import (
    expected_of,
    open_graph,
    open_storage,
    read_shard,
)

from pipeload.errors import ShardError


@pytest.mark.parametrize("relative", ["shards/block.001.safetensors", "shards/block.001.onnx"])
def test_a_link_out_of_the_directory_is_refused(toy_copy: Path, toy: Path, relative: str) -> None:
    storage, shard, _ = open_storage(toy_copy)
    (toy_copy / relative).unlink()
    (toy_copy / relative).symlink_to(toy / relative)
    use = open_graph if relative.endswith(".onnx") else read_shard
    with pytest.raises(ShardError, match=f"'{relative}' leads out of the model directory"):
        use(storage, shard)


def test_a_linked_folder_out_of_the_directory_is_refused(toy_copy: Path, toy: Path) -> None:
    storage, shard, _ = open_storage(toy_copy)
    shutil.rmtree(toy_copy / "shards")
    (toy_copy / "shards").symlink_to(toy / "shards")
    with pytest.raises(ShardError, match="leads out of the model directory"):
        read_shard(storage, shard)


def test_a_link_to_the_directory_itself_works(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(toy)
    storage, shard, _ = open_storage(tmp_path / "link")
    assert read_shard(storage, shard) == expected_of(toy, shard)


def test_a_link_inside_the_directory_works(toy_copy: Path) -> None:
    storage, shard, path = open_storage(toy_copy)
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))
    assert read_shard(storage, shard) == expected_of(toy_copy, shard)
