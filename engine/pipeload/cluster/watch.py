"""Which nodes are there: the scheduler knows, and is asked all the time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from pipeload.cluster.offer import BUDGET, FETCHED, OFFER, Offer
from pipeload.cluster.settings import LOST_AFTER_S
from pipeload.errors import ClusterError
from pipeload.foreign import foreign_errors

__all__ = ["Watch"]

_INTERVAL_S = 0.5
_SILENT_S = float(LOST_AFTER_S)
"""A scheduler that does not answer for this time is lost."""


class Watch:
    """The nodes of a cluster, as its scheduler knows them.

    Args:
        scheduler: Dask's connection to it.

    Attributes:
        offers: address -> offer.
        strangers: address -> the error of a node whose offer cannot be read; it takes part in nothing.
        facts: address -> the open stages of the node.
        budgets: address -> bytes that the node may use now: its budget, or less where its memory is short.
        fetched: address -> sha256 of the manifest and name of each model that the node has fetched files of.
        lost: the scheduler did not answer for some time; models that were opened before that are of no use.
        listeners: called, in the loop's thread, with the offers after each look, or with an error once the scheduler
            is lost.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.offers: dict[str, Offer] = {}
        self.strangers: dict[str, ClusterError] = {}
        self.facts: dict[str, list[dict[str, Any]]] = {}
        self.budgets: dict[str, int] = {}
        self.fetched: dict[str, dict[str, str]] = {}
        self.lost = False
        self.listeners: set[Callable[[dict[str, Offer] | ClusterError], object]] = set()

    async def look(self) -> None:
        """Ask the scheduler.

        Raises:
            ClusterError: it does not answer.
        """
        with foreign_errors(
            ClusterError,
            "The cluster's scheduler does not answer",
            "Start it with `pipeload cluster start`, and connect again.",
        ):
            told = await asyncio.wait_for(self._scheduler.identity(n_workers=-1), _SILENT_S)
            workers = {address: facts for address, facts in told["workers"].items() if OFFER in facts}
            facts = {address: list(own["metrics"].get(OFFER, ())) for address, own in workers.items()}
            budgets = {address: own["metrics"].get(BUDGET) for address, own in workers.items()}
            self.fetched = {address: dict(own["metrics"].get(FETCHED) or {}) for address, own in workers.items()}
        self.offers, self.strangers, self.facts, self.budgets = {}, {}, facts, {}
        for address, own in workers.items():
            try:
                offer = Offer.heard(own[OFFER])
            except ClusterError as error:
                self.strangers[address] = error
                continue
            # A node that has just come has not told yet.
            self.offers[address], self.budgets[address] = offer, budgets[address] or offer.budget_bytes

    async def run(self) -> None:
        """Look until cancelled, and tell the listeners."""
        answered_s = time.monotonic()
        while True:
            try:
                await self.look()
                told: dict[str, Offer] | ClusterError = self.offers
                answered_s = time.monotonic()
            except ClusterError as error:
                if time.monotonic() - answered_s < _SILENT_S:
                    await asyncio.sleep(_INTERVAL_S)
                    continue
                told, self.lost = error, True
            self._tell(told)
            await asyncio.sleep(_INTERVAL_S)

    def _tell(self, told: dict[str, Offer] | ClusterError) -> None:
        for listener in [*self.listeners]:
            listener(told)
