"""A node can be asked as soon as the scheduler knows it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.engine.cluster.test_store import fill, sha256_of

import pipeload
from pipeload.cluster import node as nodes
from pipeload.cluster import stage as stages
from pipeload.cluster.node import Node
from pipeload.cluster.offer import OFFER
from pipeload.cluster.stage import Stage
from pipeload.cluster.store import Store
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME


class _Asked(Exception):  # noqa: N818 - it ends the node
    """A client has asked the node before it has said that it is there."""


class _Worker:
    """Of Dask. To await it is to join, and a client asks at that moment."""

    def __init__(self, *_: object, startup_information: dict[str, Any], **__: object) -> None:
        self.rpc: Any = None
        self.handlers: dict[str, Any] = {}
        self.extensions: dict[str, Any] = {}
        self._offer = startup_information[OFFER](self)

    def __await__(self) -> Generator[None, None, None]:
        (sha256,) = self._offer["models"].values()
        assert isinstance(self.extensions[OFFER], Node)
        assert (yield from self.handlers["pipeload_manifest"](sha256).__await__())
        assert {
            "pipeload_file",
            "pipeload_files",
            "pipeload_speed",
            "pipeload_piece",
            "pipeload_fetch",
        } <= self.handlers.keys()
        raise _Asked


def test_clients_may_ask_at_once(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy").symlink_to(toy)
    monkeypatch.setattr(nodes, "Worker", _Worker)
    with pytest.raises(pipeload.ClusterError, match="could not join") as told:
        nodes.start(
            "tcp://127.0.0.1:1",
            tmp_path,
            "8GB",
            name="node",
            host=None,
            certificates=None,
            trusted=True,
            fetched_bytes=0,
            tell=lambda _: None,
        )
    assert isinstance(told.value.__cause__, _Asked)


def test_a_stage_is_planned_with_the_speeds_by_which_it_was_placed(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another plan, of a model that nothing is known of, would keep less of it, and read the rest for every pass."""
    (tmp_path / "toy").symlink_to(toy)
    node = Node("board", tmp_path, "400MB", trusted=True)
    (sha256,) = node.offer.models.values()
    told = asyncio.run(node.speed(sha256))
    monkeypatch.setattr(stages, "get_worker", lambda: SimpleNamespace(extensions={OFFER: node}))
    stage = Stage(sha256, "toy", ":block.000")
    try:
        used = msgspec.to_builtins(stage._model.profile)
        assert used | {"process_bytes": 0} == told | {"process_bytes": 0}
    finally:
        asyncio.run(stage.close())


def test_a_node_listens_where_the_scheduler_is_reached() -> None:
    """A switch of boards has no way to the internet, whose address Dask would take."""
    assert nodes._own_address("tls://127.0.0.1:8786") == "127.0.0.1"


def test_a_node_offers_the_files_that_it_has_fetched(toy: Path, tmp_path: Path) -> None:
    """Whole ones only, also after another start; one that goes is offered no more, and is refused."""
    manifest, sha256 = manifests.read(toy), sha256_of(toy)
    first, second, third = [one for one in manifest.files if one.path.endswith(".safetensors")][:3]
    fetched = fill(Store(tmp_path / nodes._FETCHED, 100_000_000), toy, [first, second])
    (fetched / f"{third.path}.part").write_bytes(b"some of it")
    node = Node("board", tmp_path, "400MB", trusted=True, fetched_bytes=100_000_000)
    assert node.offer.models == {}
    assert node.fetched == {sha256: "toy"}

    async def main() -> None:
        assert await node.files("of another model") == []
        assert sorted(await node.files(sha256)) == sorted([first.sha256, second.sha256])
        assert await node.manifest(sha256) == (toy / MANIFEST_NAME).read_bytes()
        whole = (toy / first.path).read_bytes()
        assert await node.piece(sha256, first.path, 100, 50) == whole[100:150]
        for path in (third.path, f"{third.path}.part", "../toy"):
            with pytest.raises(pipeload.ShardError):
                await node.piece(sha256, path, 0, 10)
        # Another model needs the room.
        shutil.rmtree(fetched)
        assert await node.files(sha256) == []
        with pytest.raises(pipeload.ShardError):
            await node.piece(sha256, first.path, 0, 10)

    asyncio.run(main())


def test_a_node_that_has_lost_a_file_of_a_whole_copy_offers_it_no_more(toy_copy: Path) -> None:
    node = Node("board", toy_copy.parent, "400MB", trusted=True)
    sha256, lost = sha256_of(toy_copy), manifests.read(toy_copy).files[0]
    assert lost.sha256 in asyncio.run(node.files(sha256))
    (toy_copy / lost.path).unlink()
    assert lost.sha256 not in asyncio.run(node.files(sha256))
