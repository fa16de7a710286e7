"""The process that runs stages: a Dask worker, without a nanny, so that the budget holds for the process."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from distributed import Worker
from distributed.comm import get_address_host_port
from distributed.utils import get_ip

from pipeload.budget import Budget
from pipeload.cluster import settings
from pipeload.cluster.certificates import check_accepted, security_of
from pipeload.cluster.fetching import Fetcher
from pipeload.cluster.links import Link, measured
from pipeload.cluster.offer import BUDGET, FETCHED, OFFER, Offer, models_in
from pipeload.cluster.pace import Pace, Series
from pipeload.cluster.rates import first_shards, speed_of
from pipeload.cluster.running import until_stopped
from pipeload.cluster.store import PIECE_BYTES, Store
from pipeload.errors import ClusterError, ConfigError, ShardError
from pipeload.foreign import foreign_errors
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME, Manifest
from pipeload.format.stages import stage_of
from pipeload.machine.memory import FreeMemory, auto_budget_bytes
from pipeload.machine.sizes import parse_budget
from pipeload.measuring.profiler import measure
from pipeload.planning.profile import Profile
from pipeload.storage.model_files import ModelFiles

__all__ = ["SETTINGS_BYTES", "Node", "start"]

_MESSAGES_BYTES = 16_000_000
"""Activations that arrive and leave, and what Dask keeps of them."""
_JOIN_S = 20
_FETCHED = ".fetched"
_LINK_S = 20.0
_SENT_AT_ONCE = 2
"""Pieces of files that are in memory for other nodes."""
SETTINGS_BYTES = 64 << 20
"""A model's tokenizer and settings, which clients ask for."""


class Node:
    """The models and the budget of this process.

    Args:
        name: the node's.
        models: the directory of its sharded model directories.
        memory_budget: as for `pipeload.load`.
        trusted: see `Offer`.
        fetched_bytes: likewise; these shards are in the folder `.fetched` of the models' directory.

    Attributes:
        budget: of all stages.
        stages: id -> facts about each open stage, for `pipeload cluster status`.
        paces: sha256 -> how fast the model's stages have been here.
        sends: address -> how fast activations have gone to that node.

    Raises:
        ConfigError: there is no model, and none is to be fetched.
        ManifestError: a model's manifest is damaged.
    """

    def __init__(
        self,
        name: str,
        models: Path,
        memory_budget: str,
        *,
        trusted: bool,
        fetched_bytes: int = 0,
    ) -> None:
        budget_bytes = parse_budget(memory_budget) or auto_budget_bytes()
        self._models = models_in(models)
        if not self._models and not fetched_bytes:
            raise ConfigError(
                f"{models} holds no sharded model directory. Copy those here that `pipeload export` made, or let the "
                "node fetch shards from others with --fetch."
            )
        self._fetcher = Fetcher(Store(models / _FETCHED, fetched_bytes))
        self._files: dict[str, ModelFiles] = {}
        self._sending = asyncio.Semaphore(_SENT_AT_ONCE)
        self._pool: Callable[[str], Any] | None = None
        self._links: dict[tuple[str, str], Link] = {}
        self._speeds: dict[str, Profile] = {}
        # One measurement at a time, of a model or of a link.
        self._measuring = asyncio.Lock()
        self.budget = Budget(budget_bytes, beside_bytes=_MESSAGES_BYTES)
        self.stages: dict[str, dict[str, Any]] = {}
        self.paces: defaultdict[str, Pace] = defaultdict(Pace)
        self.sends: defaultdict[str, Series] = defaultdict(Series)
        self._free = FreeMemory()
        here = measure()
        self.offer = Offer(
            name=name,
            process=uuid.uuid4().hex,
            budget_bytes=budget_bytes,
            process_bytes=here.process_bytes + _MESSAGES_BYTES,
            cores=here.cores,
            trusted=trusted,
            models={model: sha256 for model, (sha256, _) in self._models.items()},
            fetched_bytes=fetched_bytes,
        )

    def model(self, sha256: str) -> tuple[Path, bytes]:
        """A model's directory and the bytes of its manifest.

        Raises:
            ShardError: the node has no model with this manifest, or has it no more.
        """
        fetched = self._fetcher.store.directory(sha256)
        for known, directory in (*self._models.values(), (sha256, fetched)):
            if known == sha256 and directory.exists():
                data = manifests.content(directory)
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise ShardError(f"{directory} on the node {self.offer.name} has changed. Start the node again.")
                return directory, data
        raise ShardError(f"The node {self.offer.name} has no model with the manifest {sha256[:16]} ...")

    def present_budget_bytes(self) -> int:
        """What its memory lets the node use now: the budget, or less where cgroup and machine leave less."""
        return min(self.offer.budget_bytes, self._free())

    @property
    def fetched(self) -> dict[str, str]:
        """Of each model that it has fetched files of, the sha256 of the manifest and the name."""
        return self._fetcher.store.names

    def listen_to(self, worker: Any) -> None:
        """Let other processes ask this node through Dask's worker, and this one ask other nodes."""
        worker.extensions[OFFER] = self
        worker.handlers |= {
            "pipeload_manifest": self.manifest,
            "pipeload_file": self.file,
            "pipeload_files": self.files,
            "pipeload_piece": self.piece,
            "pipeload_fetch": self.fetch,
            "pipeload_speed": self.speed,
            "pipeload_links": self.links,
            "pipeload_take": self.take,
        }
        self._pool = self._fetcher.pool = worker.rpc

    def _files_of(self, sha256: str) -> ModelFiles:
        """The files of a model that is here, or was: which of them are there is seen when they are read."""
        if sha256 not in self._files:
            directory, data = self.model(sha256)
            self._files[sha256] = ModelFiles(directory, manifests.parse(data, directory / MANIFEST_NAME))
        return self._files[sha256]

    def _open_models(self) -> set[str]:
        return {facts["sha256"] for facts in self.stages.values()}

    async def manifest(self, sha256: str) -> bytes:
        """A model's manifest. For other processes."""
        return self.model(sha256)[1]

    async def file(self, sha256: str, path: str) -> bytes:
        """A model's tokenizer or settings; no weights. For other processes.

        Raises:
            ShardError: there is no such file, it is damaged, or too large to be one.
        """
        directory, data = self.model(sha256)
        found = ModelFiles(directory, manifests.parse(data, directory / MANIFEST_NAME))
        content = await asyncio.to_thread(found.read, path, most_bytes=SETTINGS_BYTES)
        if content is None:
            raise ShardError(f"The model has no file '{path}'.")
        return content

    async def files(self, sha256: str) -> list[str]:
        """The sha256 of each file of a model that is here whole; none of a model that this node does not know.

        For other processes.
        """

        def found() -> list[str]:
            with suppress(ShardError):
                known = self._files_of(sha256)
                return [record.sha256 for path, record in known.records.items() if known.path(path).is_file()]
            return []

        return await asyncio.to_thread(found)

    def known_speed(self, sha256: str) -> Profile | None:
        """What `speed` has told of a model, by which it was placed: its stages are planned alike. None before."""
        return self._speeds.get(sha256)

    async def piece(self, sha256: str, path: str, offset: int, nbytes: int) -> bytes:
        """A piece of a file of a model that is here whole. For other nodes.

        Raises:
            ShardError: there is no such model or file, or it cannot be read.
        """
        files = self._files_of(sha256)
        async with self._sending:
            await asyncio.to_thread(self._fetcher.store.note_use, sha256)
            return await asyncio.to_thread(files.piece, path, offset, min(nbytes, PIECE_BYTES))

    async def fetch(self, sha256: str, name: str, shards: str, sources: Sequence[str]) -> None:
        """Take the files of a stage from other nodes, as far as they are not here. For clients.

        Args:
            sha256: of the model's manifest.
            name: the model's.
            shards: its first and last shard, as `pipeload.load` takes them.
            sources: addresses of nodes that may have files of the model.

        Raises:
            ClusterError: none of them gives a file. The next try goes on from where this one stopped.
            ConfigError: there is no room within the limit of --fetch, or on the disk.
        """
        await self._fetcher.bring(sha256, name, lambda whole: stage_of(whole, shards), sources, self._open_models())

    async def speed(self, sha256: str, name: str = "", sources: Sequence[str] = ()) -> dict[str, Any]:
        """The fields of a profile of a model on this node; takes a second or two the first time. For clients.

        Args:
            sha256: of the model's manifest.
            name: the model's.
            sources: of its first shards, by which it is measured, where this node has not all of it.
        """
        if not self.offer.has(sha256):
            await self._fetcher.bring(sha256, name, first_shards, sources, self._open_models())
        directory, data = self.model(sha256)
        async with self._measuring:
            if sha256 not in self._speeds:
                manifest: Manifest = manifests.parse(data, directory / MANIFEST_NAME)
                self._speeds[sha256] = await asyncio.to_thread(
                    speed_of, directory, manifest, self.budget, self.offer.process_bytes
                )
        return dict(msgspec.to_builtins(self._speeds[sha256]))

    async def take(self, data: bytes) -> int:
        """The number of these bytes. For other nodes, which measure the way here."""
        return len(data)

    async def links(self, others: Mapping[str, str], anew: bool = False) -> dict[str, dict[str, float]]:
        """The ways to other nodes, by address, as far as they answer; measured the first time. For clients.

        Args:
            others: address -> process of each, see `Offer`.
            anew: measure those that are known too; one that does not answer stays as it is known.
        """
        assert self._pool is not None
        found = {}
        async with self._measuring:
            for key in others.items():
                if anew or key not in self._links:
                    with suppress(ClusterError), foreign_errors(ClusterError, "It does not answer", "Look at its log."):
                        async with asyncio.timeout(_LINK_S):
                            self._links[key] = await measured(self._pool(key[0]))
                if key in self._links:
                    found[key[0]] = dict(msgspec.to_builtins(self._links[key]))
        return found


def start(
    address: str,
    models: Path,
    memory_budget: str,
    *,
    name: str,
    host: str | None,
    certificates: Path | None,
    trusted: bool,
    fetched_bytes: int,
    tell: Callable[[str], object],
) -> None:
    """Run a node until SIGINT or SIGTERM, or until the scheduler sends it away.

    Args:
        address: the scheduler's.
        models: see `Node`.
        memory_budget: likewise, for this process.
        name: the node's.
        host: to listen on; None finds the address by which the scheduler is reached.
        certificates: the directory of `make_certificates`; None without TLS.
        trusted: see `Offer`.
        fetched_bytes: likewise.
        tell: called with the node's address once the scheduler knows it.

    Raises:
        ConfigError: an argument is invalid, or certificates are missing.
        ClusterError: the scheduler cannot be reached, or refuses the node.
    """
    security = security_of(address, certificates, "node")
    settings.use()
    protocol = address.partition("://")[0]

    async def run(stopped: Callable[[], Awaitable[object]]) -> None:
        await check_accepted(address, security, "node")
        node = Node(name, models, memory_budget, trusted=trusted, fetched_bytes=fetched_bytes)
        with tempfile.TemporaryDirectory(prefix="pipeload-node-") as scratch:
            with foreign_errors(
                ClusterError,
                f"The node could not join the cluster at {address}",
                "Start it with `pipeload cluster start`, and look at address, certificates and firewall.",
            ):
                worker = Worker(
                    address,
                    name=name,
                    nthreads=1,
                    host=host or _own_address(address),
                    protocol=f"{protocol}://",
                    security=security,
                    memory_limit=0,
                    dashboard=False,
                    dashboard_address="127.0.0.1:0",
                    local_directory=scratch,
                    death_timeout=_JOIN_S,
                    startup_information={OFFER: lambda _: node.offer.told()},
                    metrics={
                        OFFER: lambda _: list(node.stages.values()),
                        BUDGET: lambda _: node.present_budget_bytes(),
                        FETCHED: lambda _: node.fetched,
                    },
                )
                # Clients may ask as soon as the scheduler knows the node.
                node.listen_to(worker)
                await worker
            try:
                tell(worker.address)
                asked = asyncio.ensure_future(stopped())
                ended = asyncio.ensure_future(worker.finished())
                await asyncio.wait([asked, ended], return_when=asyncio.FIRST_COMPLETED)
                if not asked.done():
                    raise ClusterError(
                        f"The cluster at {address} has ended, or has lost this node. Start the node again."
                    )
                ended.cancel()
            finally:
                await worker.close(nanny=False)

    until_stopped(run)


def _own_address(scheduler: str) -> str:
    """The address of this machine on the way to a scheduler. Dask would take that of the way to the internet."""
    return str(get_ip(*get_address_host_port(scheduler)))
