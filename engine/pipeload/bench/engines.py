"""The contenders behind the interface of a pipeload model, so that only the engine differs.

This module starts a thread, which in the engine only `pipeline.py` may do: the usual pipeline, which pipeload is
compared with, has a loading thread of its own, and must not borrow pipeload's.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeload.bench.spec import Unsplit
from pipeload.format import manifest as manifests
from pipeload.format.manifest import Manifest, Shard
from pipeload.pipeline.joining import Padding
from pipeload.pipeline.session import ShardSession, Stopper, Value, to_array, to_value
from pipeload.pipeline.sweep import Feed, Sweep
from pipeload.pipeline.top_logits import RunningTop, TopLogits
from pipeload.storage.model_files import ModelFiles
from pipeload.storage.weights import Storage
from pipeload.tracing.stats import Stats

__all__ = ["Engine", "ShardChain", "SingleSession", "one_after_the_other", "one_ahead"]

Arrays = dict[str, NDArray[Any]]
Borrow = Callable[[int], AbstractContextManager[ShardSession]]


class ArrayState:
    """KV caches as arrays."""

    def __init__(self) -> None:
        self.length = 0
        self.caches: Arrays = {}

    @property
    def nbytes(self) -> int:
        """Memory of the caches."""
        return sum(array.nbytes for array in self.caches.values())

    def expect(self, tokens: int) -> None:
        """Does nothing: this state needs no plan."""

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length`."""
        self.caches = {name: array[:, :, :length] for name, array in self.caches.items()}
        self.length = length

    def close(self) -> None:
        """Drop the arrays."""
        self.caches.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Engine(ABC):
    """A model run by an engine other than pipeload's.

    Args:
        directory: the sharded model directory.
    """

    own_draft = None

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: Manifest = manifests.read(directory)
        self.files = ModelFiles(directory, self.manifest)

    @abstractmethod
    def _pass(self, feed: Arrays, *, positions: int | None) -> Arrays:
        """All graph outputs for all graph inputs."""

    @property
    def stats(self) -> Stats:
        """Empty figures: the harness measures all contenders alike."""
        return Stats()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """All graph outputs; caches that are left out are empty."""
        return self._pass(self._with_caches(inputs), positions=None)

    def run_rows(self, inputs: Mapping[str, NDArray[Any]], padding: Padding, *, passes: int = 0) -> Arrays:
        """The same: there is one caller."""
        del padding, passes
        return self.run(inputs)

    def room_for(self, most_bytes: int) -> AbstractContextManager[None]:  # noqa: ARG002 - there is nothing to keep to
        """No budget, so no room to make."""
        return nullcontext()

    def new_state(self, capacity: int = 0) -> ArrayState:
        """An empty cache; the capacity is not needed."""
        del capacity
        return ArrayState()

    def step(self, inputs: Mapping[str, NDArray[Any]], state: ArrayState, *, positions: int = 1) -> NDArray[np.float32]:
        """One pass over new tokens; logits of the last positions."""
        outputs = self._pass(self._with_caches({**inputs, **state.caches}), positions=positions)
        state.caches = {cache.input: outputs[cache.output] for cache in self.manifest.caches}
        state.length += next(iter(inputs.values())).shape[1]
        name = self.manifest.free_outputs[0].name
        logits: NDArray[np.float32] = outputs[name][:, -positions:, :]
        return logits

    def step_top(
        self, inputs: Mapping[str, NDArray[Any]], state: ArrayState, top: int, *, positions: int = 1
    ) -> Sequence[Sequence[TopLogits]]:
        """`step` that keeps only the largest logits."""
        running = RunningTop(top)
        running.push(self.step(inputs, state, positions=positions))
        return running.result

    def _with_caches(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        bound = manifests.bind_dims(self.manifest.inputs, {name: array.shape for name, array in inputs.items()})
        dims = {symbol: bound.get(symbol, 0) for symbol in self.manifest.dims}
        feed = dict(inputs)
        for spec in self.manifest.inputs:
            if spec.name not in feed:
                feed[spec.name] = np.zeros([manifests.evaluate_dim(d, dims) for d in spec.shape], spec.dtype)
        return feed


class SingleSession(Engine):
    """The unsplit graph in one session.

    Args:
        directory: the sharded model directory of the same model, for its names.
        unsplit: the graph.
        mapped: prepacking off, so that external data stays memory-mapped: the strongest baseline when memory is short.
        threads: intra-op threads.
    """

    def __init__(self, directory: Path, unsplit: Unsplit, *, mapped: bool, threads: int) -> None:
        super().__init__(directory)
        options = _options(threads)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(unsplit.folder))
        if mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
        self._session = ort.InferenceSession(str(unsplit.graph), options, providers=_PROVIDERS, enable_fallback=0)

    def _pass(self, feed: Arrays, *, positions: int | None) -> Arrays:
        del positions  # an unsplit graph computes all positions
        names = [spec.name for spec in self.manifest.outputs]
        return dict(zip(names, self._session.run(names, feed), strict=True))


class ShardChain(Engine):
    """The shards of a model directory, each in a default session of its own, which is destroyed after it ran.

    Args:
        directory: the sharded model directory.
        sessions: makes the sessions of a pass.
        threads: intra-op threads.
    """

    def __init__(
        self,
        directory: Path,
        sessions: Callable[[Sequence[Callable[[], _Session]]], AbstractContextManager[Borrow]],
        *,
        threads: int,
    ) -> None:
        super().__init__(directory)
        self._sweep = Sweep(self.manifest, Storage(directory, self.manifest, verify=False))
        self._sessions = sessions
        self._makers = [_maker(directory, shard, threads) for shard in self.manifest.shards]

    def _pass(self, feed: Arrays, *, positions: int | None) -> Arrays:
        specs = {spec.name: spec.dtype for spec in self.manifest.inputs}
        values: dict[str, Value] = {name: to_value(array, specs[name]) for name, array in feed.items()}
        one = Feed(pieces=[values], positions=positions)
        with self._sessions(self._makers) as borrow:
            self._sweep.run([one], borrow)
        return {name: to_array(value) for name, value in one.outputs.items()}


@contextmanager
def one_after_the_other(makers: Sequence[Callable[[], _Session]]) -> Iterator[Borrow]:
    """No pipeline: makes a session on demand, and destroys it before it makes the next one."""

    @contextmanager
    def borrow(index: int) -> Iterator[_Session]:
        yield makers[index]()

    yield cast("Borrow", borrow)


def one_ahead(*, keep: bool) -> Callable[[Sequence[Callable[[], _Session]]], AbstractContextManager[Borrow]]:
    """The usual pipeline: a thread makes the session of the next shard while one runs.

    Args:
        keep: sessions live until the end of the pass (PipeSwitch), instead of only until they ran.
    """

    @contextmanager
    def sessions(makers: Sequence[Callable[[], _Session]]) -> Iterator[Borrow]:
        ready: queue.Queue[_Session | BaseException] = queue.Queue()
        permits = threading.Semaphore(1)
        ended = threading.Event()

        def load() -> None:
            try:
                for make in makers:
                    permits.acquire()
                    if ended.is_set():
                        return
                    ready.put(make())
            except BaseException as error:  # noqa: BLE001 - raised in the caller
                ready.put(error)

        kept: list[_Session] = []

        @contextmanager
        def borrow(index: int) -> Iterator[_Session]:
            del index  # the shards come in order
            session = ready.get()
            if isinstance(session, BaseException):
                raise session
            permits.release()
            if keep:
                kept.append(session)
            yield session

        thread = threading.Thread(target=load, name="standard-pipeline-loader", daemon=True)
        thread.start()
        try:
            yield cast("Borrow", borrow)
        finally:
            ended.set()
            permits.release()
            thread.join()

    return sessions


_PROVIDERS = ["CPUExecutionProvider"]


class _Session:
    """A shard in a session as any user of onnxruntime would make it, with the interface of a `ShardSession`."""

    def __init__(self, graph: Path, shard: Shard, threads: int) -> None:
        self._outputs = list(shard.outputs)
        self._session = ort.InferenceSession(str(graph), _options(threads), providers=_PROVIDERS, enable_fallback=0)

    def run(
        self, inputs: Mapping[str, Value], stopper: Stopper, in_place: Mapping[str, Value] | None = None
    ) -> Sequence[Value]:
        del stopper, in_place
        made: Sequence[Value] = self._session.run_with_ort_values(self._outputs, dict(inputs))
        return made


def _maker(directory: Path, shard: Shard, threads: int) -> Callable[[], _Session]:
    return lambda: _Session(directory / shard.graph.path, shard, threads)


def _options(threads: int) -> ort.SessionOptions:
    """All defaults except the number of threads, which is the same for every contender."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options
