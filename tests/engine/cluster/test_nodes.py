"""What nodes are asked for: at the same time where they are on several machines, and one after another on one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.engine.cluster.test_placing import MB, member
from tests.engine.cluster.test_store import sha256_of
from tests.engine.harness import PATIENCE_S

import pipeload
from pipeload.cluster.loop import Loop
from pipeload.cluster.nodes import Nodes
from pipeload.cluster.watch import Watch
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME

_ADDRESSES = ("tcp://10.0.0.1:1", "tcp://10.0.0.1:2", "tcp://10.0.0.1:3", "tcp://10.0.0.2:1", "tls://[fe80::1]:1")
_HOSTS = ("10.0.0.1", "10.0.0.1", "10.0.0.1", "10.0.0.2", "fe80::1")


class _Measuring:
    """Nodes that measure their speed until each machine has one that does.

    Attributes:
        asked: addresses, in the order in which they were asked.
        most: host -> the most of its nodes that have measured at the same time.
    """

    def __init__(self, failing: Sequence[str] = ()) -> None:
        self.asked: list[str] = []
        self.most: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._failing = failing
        self._all = asyncio.Event()

    def __call__(self, address: str) -> Any:
        host = _HOSTS[_ADDRESSES.index(address)]

        async def pipeload_speed(sha256: str, name: str, sources: list[str]) -> dict[str, Any]:
            self.asked.append(address)
            self._now[host] += 1
            self.most[host] = max(self.most[host], self._now[host])
            if len(self.most) == len({*_HOSTS}):
                self._all.set()
            await self._all.wait()
            # Others have their turn now, if they may.
            for _ in range(10):
                await asyncio.sleep(0)
            self._now[host] -= 1
            if address in self._failing:
                raise pipeload.LoadError("its disk")
            return dict(msgspec.to_builtins(member("a", MB).speed))

        return SimpleNamespace(pipeload_speed=pipeload_speed)


def _asked(body: Callable[[Nodes, dict[str, Any]], Any], failing: Sequence[str] = ()) -> tuple[_Measuring, Any]:
    async def main() -> tuple[_Measuring, Any]:
        watch: Any = Watch(None)
        watch.offers = {
            address: member(f"n{number}", MB, models=("sha256",)).offer for number, address in enumerate(_ADDRESSES)
        }
        loop: Any = None
        pool = _Measuring(failing)
        nodes = Nodes(loop, watch, pool)
        return pool, await asyncio.wait_for(body(nodes, watch.offers), PATIENCE_S)

    return asyncio.run(main())


@pytest.mark.parametrize("failing", [(), _ADDRESSES[:1]])
def test_nodes_of_one_machine_measure_their_speed_one_after_another(failing: Sequence[str]) -> None:
    """They share its cores and its disk; nodes of several machines measure at the same time."""
    pool, found = _asked(lambda nodes, offers: nodes.speeds("sha256", offers), failing)
    assert sorted(pool.asked) == sorted(_ADDRESSES)
    assert pool.most == dict.fromkeys(_HOSTS, 1)
    assert [one.address for one in found] == [one for one in _ADDRESSES if one not in failing]


def test_nodes_that_join_together_measure_one_after_another_too() -> None:
    """An open model asks each new node by itself; who asks for a speed that another one waits for measures nothing."""

    async def both(nodes: Nodes, offers: dict[str, Any]) -> None:
        asked = [*offers.items(), *offers.items()]
        await asyncio.gather(*(nodes.speed("sha256", address, offer) for address, offer in asked))

    pool, _ = _asked(both)
    assert sorted(pool.asked) == sorted(_ADDRESSES)
    assert pool.most == dict.fromkeys(_HOSTS, 1)


class _Holding:
    """Nodes that have some files of a model, and tell what they have.

    Args:
        directory: of the model.
        has: address -> paths of its files there; an address that is not there does not answer.

    Attributes:
        lying: addresses of nodes that send other bytes.
    """

    def __init__(self, directory: Path, has: dict[str, set[str]]) -> None:
        self._directory, self._has = directory, has
        self._files = {record.path: record for record in manifests.read(directory).files}
        self.lying: set[str] = set()

    def __call__(self, address: str) -> Any:
        async def answer(path: str) -> bytes:
            if address not in self._has:
                raise OSError("cut off")
            if path != MANIFEST_NAME and path not in self._has[address]:
                raise pipeload.ShardError(f"The model has no file '{path}'.")
            return b"other bytes" if address in self.lying else (self._directory / path).read_bytes()

        async def pipeload_files(sha256: str) -> list[str]:
            await answer(MANIFEST_NAME)
            return [self._files[path].sha256 for path in self._has[address]]

        async def pipeload_file(sha256: str, path: str) -> bytes:
            return await answer(path)

        async def pipeload_manifest(sha256: str) -> bytes:
            return await answer(MANIFEST_NAME)

        return SimpleNamespace(
            pipeload_files=pipeload_files, pipeload_file=pipeload_file, pipeload_manifest=pipeload_manifest
        )


@pytest.fixture
def holding(toy: Path) -> Iterator[Callable[..., tuple[Nodes, _Holding]]]:
    """Nodes that fetch, each with the paths that a test gives, by their address."""
    loop = Loop()

    def make(owner: str | None = None, **has: set[str]) -> tuple[Nodes, _Holding]:
        watch: Any = Watch(None)
        watch.offers = {
            name: replace(member(name, MB, models=(sha256_of(toy),) if name == owner else ()).offer, fetched_bytes=MB)
            for name in (*has, "silent")
        }
        watch.fetched = {name: {sha256_of(toy): "toy"} for name in has}

        async def look() -> None:
            return None

        watch.look = look
        pool = _Holding(toy, has)
        return Nodes(loop, watch, pool), pool

    try:
        yield make
    finally:
        loop.close()


def test_a_model_is_there_as_long_as_each_file_is_somewhere(
    toy: Path, holding: Callable[..., tuple[Nodes, _Holding]], tmp_path: Path
) -> None:
    manifest, sha256 = manifests.read(toy), sha256_of(toy)
    paths = [record.path for record in manifest.files]
    nodes, _ = holding(one={*paths[::2]}, other={*paths[1::2]})
    assert nodes.named("toy") == (sha256, "toy")
    assert nodes.manifest(sha256) == (manifest, (toy / MANIFEST_NAME).read_bytes())
    assert nodes.members(sha256, manifest).keys() == {"one", "other", "silent"}
    nodes.bring(sha256, manifest, (toy / MANIFEST_NAME).read_bytes(), tmp_path)
    assert manifests.read(tmp_path) == manifest
    lacking, _ = holding(one={*paths[::2]}, other={*paths[3::2]})
    with pytest.raises(pipeload.ClusterError, match=f"none has 1 of its files, such as '{paths[1]}'"):
        lacking.members(sha256, manifest)
    empty, _ = holding(one=set())
    with pytest.raises(pipeload.ClusterError, match="No node has the model"):
        empty.members(sha256, manifest)
    with pytest.raises(pipeload.ClusterError, match="there are toy"):
        nodes.named("another")


def test_a_client_keeps_no_wrong_bytes(toy: Path, holding: Callable[..., tuple[Nodes, _Holding]]) -> None:
    sha256, paths = sha256_of(toy), {record.path for record in manifests.read(toy).files}
    nodes, pool = holding(owner="one", one=paths, other=paths)
    pool.lying = {"one"}
    assert nodes.manifest(sha256)[1] == (toy / MANIFEST_NAME).read_bytes()
    pool.lying = {"one", "other"}
    with pytest.raises(pipeload.ClusterError, match="sent other bytes"):
        nodes.manifest(sha256)
    alone, _ = holding(owner="silent")
    with pytest.raises(pipeload.ClusterError, match="does not answer"):
        alone.manifest(sha256)
