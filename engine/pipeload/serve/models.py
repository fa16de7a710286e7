"""Models by their names: opened when the server starts or when they are called, closed when they are idle."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar, cast

import msgspec

import pipeload
from pipeload.errors import BudgetError, ConfigError
from pipeload.machine.heap import trim
from pipeload.machine.memory import rss_bytes
from pipeload.machine.sizes import format_bytes
from pipeload.serve.errors import LOGGER, ApiError
from pipeload.serve.prefixes import Prefixes
from pipeload.serve.settings import LIMITS, Settings, most_connections
from pipeload.serve.sources import Directory, Nodes, OnNodes, Source

if TYPE_CHECKING:
    from pipeload.cluster.model import ClusterModel
    from pipeload.model import Model

__all__ = ["ModelCounts", "Models", "Served", "beside_bytes"]

Result = TypeVar("Result")

_SERVER_BYTES, _CALL_BYTES = 4_000_000, 64_000
"""Memory that calls take beside models, which nothing takes before they come: libraries that the first ones use, and
the thread, texts and tokens of each."""
_CONNECTION_BYTES = 64_000
"""Of a connection: its own objects, 16 KiB of headers as objects, and 16 KiB of a body that was not asked for."""


class ModelCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of a model, as `Served` has them, for a process that takes the place of this one."""

    opened: int
    closed: int
    sweeps: int
    read_bytes: int
    prefix_hits: int = 0
    prefix_reused_tokens: int = 0


class Served:
    """One model.

    Args:
        name: its name in requests.
        source: where it is opened.
        idle_s: see `Settings`.
        executor: runs what takes long.
        all_served: all models of the server.
        prefix_cache_bytes: see `Settings`.

    Attributes:
        manifest: its description.
        model: the open model, or None.
        users: calls that have it now.
        generating: those of them that generate, each with KV caches of its own.
        opened, closed: how many times.
        sweeps, read_bytes: of its earlier openings.
        made: see `Source`.
        prefixes: KV caches of texts that have ended.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        idle_s: float | None,
        executor: Executor,
        all_served: Mapping[str, Served],
        prefix_cache_bytes: int | None = None,
    ) -> None:
        self.name, self._source = name, source
        self.manifest, self.made = source.manifest, source.made
        self.model: Model | None = None
        self.users = self.generating = self.opened = self.closed = self.sweeps = self.read_bytes = 0
        self._idle_s, self._executor = idle_s, executor
        self._all_served = all_served
        self.prefixes = Prefixes(prefix_cache_bytes)
        self._lock = asyncio.Lock()
        self._room = asyncio.Condition()
        self._ended = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def here(self) -> Model | None:
        """The open model, where it runs in this process and has a plan; else None."""
        return self.model if self._source.here else None

    @property
    def there(self) -> ClusterModel | None:
        """The open model, where it runs on the nodes of a cluster; else None."""
        return None if self._source.here else cast("ClusterModel | None", self.model)

    @property
    def idle(self) -> bool:
        """Whether it is closed, and no call opens it."""
        return self.model is None and not self.users and not self._lock.locked()

    @property
    def counts(self) -> ModelCounts:
        """Its counts, while it is closed."""
        return ModelCounts(
            opened=self.opened,
            closed=self.closed,
            sweeps=self.sweeps,
            read_bytes=self.read_bytes,
            prefix_hits=self.prefixes.hits,
            prefix_reused_tokens=self.prefixes.reused_tokens,
        )

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Model]:
        """The open model; a closed one is opened first.

        Raises:
            PipeloadError: it cannot be opened.
            ApiError: the budget has no room for it now.
        """
        async with self._lock:
            if self._source.lost:
                await self._close()
            model = self.model or await self._open()
            self.users += 1
            if self._timer is not None:
                self._timer.cancel()
        try:
            yield model
        finally:
            # No name of this frame may keep a model that is closed.
            del model
            self.users -= 1
            if not self.users and self._idle_s is not None:
                self._timer = asyncio.get_running_loop().call_later(self._idle_s, self._begin_closing)

    @asynccontextmanager
    async def generates(self) -> AsyncIterator[Callable[[BudgetError], Awaitable[None]]]:
        """The time of a generation. Gives a function that waits until another one has given memory back."""
        before = self._ended
        self.generating += 1

        async def wait_for_room(error: BudgetError) -> None:
            nonlocal before
            async with self._room:
                if self._ended == before and self.generating == 1:
                    raise error
                # Those that wait as well hold no memory.
                self.generating -= 1
                try:
                    await self._room.wait_for(lambda: self._ended != before or not self.generating)
                finally:
                    self.generating += 1
                before = self._ended

        try:
            yield wait_for_room
        finally:
            async with self._room:
                self.generating -= 1
                self._ended += 1
                self._room.notify_all()

    async def close(self) -> None:
        """Close the model, if it is open and no call has it."""
        async with self._lock:
            await self._close()

    async def end(self) -> None:
        """Close the model for good. Calls that still have it end with ClosedError."""
        self._idle_s = None
        if self._timer is not None:
            self._timer.cancel()
        if self._closing is not None:
            await asyncio.wait([self._closing])
        self.prefixes.end()
        if self.model is not None:
            self.model.close()

    async def _close(self) -> None:
        if self.model is None or self.users:
            return
        begin_s = time.perf_counter()
        stats = self.model.stats
        self.prefixes.end()
        await self._on_thread(self.model.close)
        # At once, so that no figure has a sweep twice.
        self.model = None
        self.sweeps += stats.passes
        self.read_bytes += stats.read_bytes
        del stats
        self.closed += 1
        await self._on_thread(_give_back)
        LOGGER.info(
            "%s is closed; the process has %s; %.0f ms",
            self.name,
            format_bytes(rss_bytes()),
            1e3 * (time.perf_counter() - begin_s),
        )

    async def _open(self) -> Model:
        begin_s = time.perf_counter()
        while True:
            try:
                model = await self._on_thread(self._load)
                break
            except BudgetError as error:
                if await self._close_another():
                    continue
                if not self.opened:
                    raise
                raise ApiError(503, str(error), code="memory_budget_exceeded", retry_after_s=5) from error
        self.model = model
        if self._source.here:
            # Nodes have no way to ask for the memory of caches that are kept for later.
            self.prefixes.begin(model)
        self.opened += 1
        LOGGER.info("%s is open; %.0f ms", self.name, 1e3 * (time.perf_counter() - begin_s))
        return model

    def _load(self) -> Model:
        # Imported with the first model, as the engine is.
        from pipeload.tasks.generate.prompts import tokenizer_if_any

        model = self._source.load()
        if (tokenizer := tokenizer_if_any(model, required=False)) is not None:
            tokenizer.most_characters = LIMITS.text_characters
        return model

    async def _close_another(self) -> bool:
        """Close a model that no call has, if there is one: this one is called, and not even the least memory of both
        fits the budget.
        """
        for other in self._all_served.values():
            if other is not self and other.model is not None and not other.users:
                await other.close()
                return True
        return False

    def _begin_closing(self) -> None:
        self._closing = asyncio.get_running_loop().create_task(self.close())

    async def _on_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


class Models:
    """All models of a server.

    Args:
        settings: name them.
        executor: runs what takes long.

    Attributes:
        served: by name.
        budget: gives the one that all of them share.
        ready: all of them have been opened once.

    Raises:
        ManifestError: a directory holds no valid model.
        ConfigError: an alias is of no model.
        ClusterError: the cluster does not answer, or has no such model.
    """

    def __init__(self, settings: Settings, executor: Executor) -> None:
        self.served: dict[str, Served] = {}
        # Made with the first model, since it brings the engine in.
        beside = beside_bytes(settings.max_waiting)
        self.budget = budget = cache(lambda: pipeload.Budget(settings.budget, beside_bytes=beside))
        self._executor = executor
        self._nodes: Nodes | None = None
        sources: dict[str, Source] = {
            name: Directory(directory, budget) for name, directory in settings.directories.items()
        }
        with ExitStack() as stack:
            if settings.cluster is not None:
                self._nodes = nodes = Nodes(settings.cluster, settings.certificates)
                stack.callback(nodes.close)
                sources |= {name: OnNodes(nodes, name) for name in settings.names or nodes.models()}
            self.aliases = dict(settings.aliases)
            if unknown := sorted({*self.aliases.values()} - sources.keys()):
                raise ConfigError(f"An alias is of {unknown[0]}, which is none of the models: {', '.join(sources)}.")
            stack.pop_all()
        for name, source in sources.items():
            self.served[name] = Served(
                name, source, settings.idle_s, executor, self.served, settings.prefix_cache_bytes
            )
        self.ready = False

    @property
    def idle(self) -> bool:
        """Whether all have been opened once, and are closed."""
        return self.ready and all(one.idle for one in self.served.values())

    def go_on(self, counts: Mapping[str, ModelCounts]) -> None:
        """Go on from the counts of the process before this one, in which all have been opened."""
        for name, count in counts.items():
            served = self.served[name]
            served.opened, served.closed = count.opened, count.closed
            served.sweeps, served.read_bytes = count.sweeps, count.read_bytes
            served.prefixes.hits, served.prefixes.reused_tokens = count.prefix_hits, count.prefix_reused_tokens
        self.ready = True

    async def open_all(self) -> None:
        """Open one after another."""
        for served in self.served.values():
            async with served.use():
                pass
        self.ready = True

    async def end(self) -> None:
        """Close all models for good, and leave the cluster."""
        for served in self.served.values():
            await served.end()
        if self._nodes is not None:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._nodes.close)

    def find(self, name: str | None, tasks: Sequence[str] = ()) -> Served:
        """The model that a request names; without a name, the only one for these tasks.

        Args:
            name: of a model, or an alias.
            tasks: of a route that names no model.

        Raises:
            ApiError: there is none.
        """
        if name:
            if (found := self.served.get(self.aliases.get(name, name))) is not None:
                return found
            known = ", ".join([*self.served, *self.aliases])
            raise ApiError(
                404, f"There is no model '{name:.80}' here, only {known}.", code="model_not_found", param="model"
            )
        fitting = [one for one in self.served.values() if not tasks or one.manifest.task in tasks]
        if len(fitting) != 1:
            names = ", ".join(one.name for one in fitting) or "none of the models here"
            raise ApiError(400, f"The request names no model, and {names} could answer it.", param="model")
        return fitting[0]


def beside_bytes(calls: int) -> int:
    """Memory of the budget that no model of a server with this many places gets."""
    return _SERVER_BYTES + calls * _CALL_BYTES + LIMITS.bodies_bytes + most_connections(calls) * _CONNECTION_BYTES


def _give_back() -> None:
    gc.collect()
    trim()
