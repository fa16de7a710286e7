"""What nodes are asked for: at the same time where they are on several machines, and one after another on one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.engine.cluster.test_placing import MB, member
from tests.engine.harness import PATIENCE_S

import pipeload
from pipeload.cluster.nodes import Nodes
from pipeload.cluster.watch import Watch

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

        async def pipeload_speed(sha256: str, sources: list[str]) -> dict[str, Any]:
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
