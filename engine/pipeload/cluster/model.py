"""A model that runs on the nodes of a cluster, with the methods of `pipeload.Model`."""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeload.cluster.calls import Calls
from pipeload.cluster.history import History, Reconfiguration
from pipeload.cluster.loop import Loop
from pipeload.cluster.messages import Job, NodeLostError, TextLostError
from pipeload.cluster.ring import Ring
from pipeload.cluster.state import ClusterState, Texts
from pipeload.errors import (
    BudgetError,
    ClosedError,
    ClusterError,
    ConfigError,
    PipeloadError,
    QuantisationWarning,
    RunError,
)
from pipeload.foreign import foreign_errors
from pipeload.format.manifest import Manifest, TensorSpec
from pipeload.inputs import Arrays, GraphInputs, batches, split_batch
from pipeload.pipeline.joining import Padding
from pipeload.pipeline.top_logits import TopLogits
from pipeload.planning.placement import Placement
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.answer.answer import answer
from pipeload.tasks.arguments import check_positive, is_whole
from pipeload.tasks.chat.chat import chat_prompt
from pipeload.tasks.classify.classify import classify
from pipeload.tasks.classify.rerank import rerank
from pipeload.tasks.classify.zero_shot import zero_shot
from pipeload.tasks.embed.embed import embed
from pipeload.tasks.fill.fill_mask import fill_mask
from pipeload.tasks.generate.generate import generate
from pipeload.tasks.generate.session import Session
from pipeload.tracing.stats import Stats

__all__ = ["ClusterModel"]

_ATTEMPTS = 2
"""A call whose node was lost is tried this many times in all."""
_FAREWELL_S = 30.0

_Answer = TypeVar("_Answer")


class ClusterModel:
    """A model on the nodes of a cluster. Made by `Connection.load`; safe to call from several threads.

    A call whose node is lost is tried once more, on a new placement among the nodes that are left; a text goes on from
    its tokens.

    Attributes:
        directory: with the model's manifest, tokenizer and settings, and no weights.
        manifest: its shards, inputs and outputs.
        files: its tokenizer and settings.
        own_draft: None: a model's own draft is not used on a cluster.
    """

    own_draft: None = None

    def __init__(
        self,
        loop: Loop,
        name: str,
        directory: Path,
        manifest: Manifest,
        open_ring: Callable[[frozenset[str]], Ring],
        tell: Callable[[Mapping[str, Any]], object],
    ) -> None:
        self.directory, self.manifest = directory, manifest
        self.files = ModelFiles(directory, manifest)
        self._loop, self._name = loop, name
        self._graph_inputs = GraphInputs(manifest)
        self._texts = Texts(manifest)
        self._open_ring = open_ring
        self._placing = threading.Lock()
        self._lost: frozenset[str] = frozenset()
        self._replaced = self._passes = 0
        self._closed = False
        self._opening: Future[None] | None = None
        self._refusal: ClusterError | None = None
        self._history = History(name, manifest, tell)
        # A model that is dropped is closed, so what closes it must not refer to it.
        self._calls = Calls(open_ring(self._lost))
        self._finalizer = weakref.finalize(self, _end, self._loop, self._calls)
        if manifest.quantised_dynamically:
            warnings.warn(
                "This model quantises its activations with one scale for a whole tensor, so the answers for a text "
                "depend on what is computed together with it.",
                QuantisationWarning,
                stacklevel=3,
            )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Graph inputs, without the caches."""
        return self.manifest.free_inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Graph outputs, without the caches."""
        return self.manifest.free_outputs

    @property
    def _ring(self) -> Ring:
        return self._calls.ring

    @property
    def placement(self) -> Placement:
        """Which node runs which shards now."""
        return self._ring.placement

    @property
    def replacements(self) -> int:
        """How often the model was placed anew, since a node was lost."""
        return self._replaced

    @property
    def reconfigurations(self) -> tuple[Reconfiguration, ...]:
        """The latest 100 changes of the placement, the oldest first."""
        return self._history.known

    @property
    def stats(self) -> Stats:
        """The number of passes. Their times are the nodes' own."""
        return Stats(passes=self._passes)

    @property
    def keeps_beginnings(self) -> bool:
        """Whether a text can go on from the caches of another one that begins as it does."""
        return self._texts.decoding.keeps_beginnings

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """One pass over all shards.

        Args:
            inputs: an array for each graph input; names, dtypes and shapes as in `inputs`. Caches that the caller
                leaves out are empty.

        Returns:
            An array for each graph output, caches included.

        Raises:
            ConfigError: an input is missing, unknown, or of the wrong dtype or shape; all faults at once.
            ClusterError: a node was lost, and then another one, or the nodes that are left cannot run the model.
            PipeloadError: as `Model.run`, of the nodes.
            ClosedError: the model was closed before or during the call.
        """
        arrays = self._checked(inputs)
        return self._tried(lambda ring: self._loop.begin(ring.run(arrays)))

    def run_rows(self, inputs: Mapping[str, NDArray[Any]], padding: Padding, *, passes: int = 0) -> Arrays:
        """`run`: rows of several callers share the nodes' sweeps, and no batch.

        Args:
            inputs: as for `run`.
            padding: not used here.
            passes: likewise.
        """
        del padding, passes
        return self.run(inputs)

    def run_many(self, items: Iterable[Mapping[str, NDArray[Any]]], batch: int = 1) -> Iterator[Arrays]:
        """A pass for each item, or for each batch of them, with as many on their way as keep all nodes at work.

        Args:
            items: inputs as for `run`, taken from the iterable on demand.
            batch: the most items to join along the first dimension; items in a batch agree in all other dimensions.
                Items of a model that is quantised dynamically are not joined: they would share a scale.

        Yields:
            The outputs of each item, in order.

        Raises:
            PipeloadError: as `run`; ConfigError also when batch is below 1.
        """
        if not isinstance(batch, int | np.integer) or batch < 1:
            raise ConfigError(f"batch is {batch!r}; it must be a whole number, at least 1.")
        if not isinstance(items, Iterable):
            raise ConfigError(f"items is {items!r}; it must be an iterable of inputs.")
        if self.manifest.quantised_dynamically:
            batch = 1
        queue: deque[tuple[_Begun[Arrays], Arrays, list[int]]] = deque()

        def oldest() -> Iterator[Arrays]:
            begun, inputs, sizes = queue.popleft()
            outputs: Arrays = self._tried(lambda ring: self._loop.begin(ring.run(inputs)), begun)
            return split_batch(outputs, sizes)

        try:
            for inputs, sizes in batches(items, batch):
                arrays = self._checked(inputs)
                begun = self._begin(lambda ring, arrays=arrays: self._loop.begin(ring.run(arrays)))  # type: ignore[misc]
                queue.append((begun, arrays, sizes))
                if len(queue) > len(begun.ring.placement.segments):
                    yield from oldest()
            while queue:
                yield from oldest()
        finally:
            for begun, *_ in queue:
                begun.future.cancel()

    def new_state(self, capacity: int = 0) -> ClusterState:
        """An empty KV cache for `step`; it is on the nodes of the blocks.

        Args:
            capacity: tokens to plan for; more fit while the budgets have room.

        Raises:
            ConfigError: the model has no caches.
        """
        self._check_usable()
        if not is_whole(capacity, 0):
            raise ConfigError(f"capacity is {capacity!r:.80}; it must be a whole number of tokens, not below 0.")
        if not self.manifest.caches:
            raise ConfigError(f"This {self.manifest.task} model has no KV cache, so it cannot decode step by step.")
        return ClusterState(self._texts, capacity, self._end_state)

    def step(self, inputs: Mapping[str, NDArray[Any]], state: ClusterState, *, positions: int = 1) -> NDArray[Any]:
        """One pass of a decoder over new tokens, which follow the tokens in the state.

        A text passes through the stages in pieces of at most 256 tokens, so that they work at the same time.

        Args:
            inputs: as for `run`, without caches; an attention mask covers the cached tokens too.
            state: the caches; a pass that succeeds updates them.
            positions: return the logits of this many of the last new tokens.

        Returns:
            Logits of these positions, `[batch, positions, vocabulary]`.

        Raises:
            PipeloadError: as `run`.
        """
        logits: NDArray[Any] = self._step(inputs, state, positions, 0)
        return logits

    def step_top(
        self, inputs: Mapping[str, NDArray[Any]], state: ClusterState, top: int, *, positions: int = 1
    ) -> Sequence[Sequence[TopLogits]]:
        """`step` that returns only the largest logits of each position.

        Args:
            inputs: as for `step`.
            state: as for `step`.
            top: logits to keep for each position, at least 1.
            positions: as for `step`.

        Returns:
            For each sequence its positions' largest logits.

        Raises:
            PipeloadError: as `run`.
        """
        check_positive("top", top)
        found: Sequence[Sequence[TopLogits]] = self._step(inputs, state, positions, top)
        return found

    def session(self, capacity: int = 0) -> Session[ClusterState]:
        """A growing text: its `generate` does not recompute the beginning that the caches already hold.

        Args:
            capacity: tokens to plan for; more fit while the budgets have room.

        Raises:
            ConfigError: the model generates no text.
        """
        return Session(self, capacity)

    def room_for(self, most_bytes: int, kept_bytes: int = 0) -> AbstractContextManager[None]:
        """No budget holds for a client, so there is no room to make.

        Args:
            most_bytes: what the body makes.
            kept_bytes: what stays of it.
        """
        del most_bytes, kept_bytes
        return nullcontext()

    # Each is the task's own function, whose first argument is the model.
    embed = embed
    classify = classify
    zero_shot = zero_shot
    rerank = rerank
    answer = answer
    fill_mask = fill_mask
    generate = generate
    chat_prompt = chat_prompt

    def close(self) -> None:
        """End running calls with ClosedError, and close the stages on the nodes. May be called again."""
        # A move that goes on ends too.
        self._calls.close()
        if (opening := self._opening) is not None:
            opening.cancel()
        with self._placing:
            if self._closed:
                return
            self._closed = True
        self._finalizer.detach()
        if (closing := _end(self._loop, self._calls)) is not None:
            with suppress(TimeoutError, CancelledError):
                closing.result(_FAREWELL_S)

    def __repr__(self) -> str:
        nodes = ", ".join(segment.node for segment in self.placement.segments)
        return f"<pipeload.ClusterModel '{self._name}' on {nodes}{', closed' if self._closed else ''}>"

    def __enter__(self) -> ClusterModel:
        self._check_usable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise ConfigError("A model of a cluster holds connections and cannot be pickled. Connect where it is needed.")

    def _step(self, inputs: Mapping[str, NDArray[Any]], state: ClusterState, positions: int, top: int) -> Any:
        self._check_usable()
        check_positive("positions", positions)
        if not isinstance(state, ClusterState):
            raise ConfigError(f"state is {state!r}; make one with model.new_state().")
        state.check_usable()
        texts = self._texts
        cached = texts.cached_shapes(state.dims, state.length) if state.length else None
        with foreign_errors(RunError, "The inputs could not be brought into the pipeline", "Pass smaller inputs."):
            arrays, dims = self._graph_inputs.check(inputs, cached)
        arrays = texts.free(arrays)
        length = texts.length(dims)
        if positions > length - state.length:
            raise ConfigError(
                f"positions is {positions!r}; it must be from 1 to {length - state.length}, the new tokens of this "
                "step."
            )
        known = state.inputs is not None
        whole = texts.joined(state.inputs, arrays) if state.inputs is not None and texts.can_be_joined else arrays

        def once(ring: Ring) -> Future[Any]:
            if state.begin(ring):
                pieces = texts.pieces(arrays, dims, state.length, length, positions, state.expected)
            elif known and texts.can_be_joined:
                pieces = texts.pieces(whole, dims, 0, length, positions, state.expected)
            else:
                raise ClusterError(
                    "A node was lost, and the caches of this model cannot be computed again from its tokens at once. "
                    "Generate the text anew."
                )
            last = len(pieces) - 1
            jobs = [
                Job(
                    state=state.id,
                    step=state.steps,
                    past=past,
                    first=number == 0,
                    last=number == last,
                    expected=state.expected,
                    positions=positions if number == last else 1,
                    top=top if number == last else 1,
                )
                for number, (_, past) in enumerate(pieces)
            ]
            work = [(piece, job) for (piece, _), job in zip(pieces, jobs, strict=True)]
            return self._loop.begin(ring.step(work))

        made = self._tried(once, failed=state.drop)
        state.inputs, state.length, state.dims = whole, length, dims
        state.steps += 1
        state.batch = max(state.batch, next(iter(arrays.values())).shape[0])
        return made

    def _checked(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        self._check_usable()
        with foreign_errors(RunError, "The inputs could not be brought into the pipeline", "Pass smaller inputs."):
            self._graph_inputs.check(inputs)
        # Caches that are left out are empty on the nodes too.
        return dict(inputs)

    def _begin(self, once: Callable[[Ring], Future[_Answer]]) -> _Begun[_Answer]:
        """Begin a call on the present stages; waits while there are none."""
        self._check_usable()
        while isinstance(ring := self._calls.enter(), Future):
            self._loop.result(ring)
        moves = self._calls.moves
        try:
            future = once(ring)
        except BaseException:
            self._calls.leave(ring)
            raise
        # Not when its caller takes the answer: of a list of passes, the caller may wait for room to begin the next one.
        future.add_done_callback(partial(_leave, self._calls, ring))
        return _Begun(ring, future, moves)

    def _tried(
        self,
        once: Callable[[Ring], Future[_Answer]],
        begun: _Begun[_Answer] | None = None,
        *,
        failed: Callable[[], object] = bool,
    ) -> _Answer:
        """What a call gives, on a new placement where a node was lost.

        Args:
            once: begins the call.
            begun: its first try, where that has begun.
            failed: called after each try that failed.
        """
        tries, waited = _ATTEMPTS, False
        while True:
            begun = begun or self._begin(once)
            try:
                made = self._loop.result(begun.future)
            except BaseException as error:
                failed()
                tries -= 1
                if isinstance(error, BudgetError) and not waited and (ends := self._calls.settled(begun.moves)):
                    # The stages before and after a move were there together. That is no fault of the nodes.
                    self._loop.result(ends)
                    waited, tries = True, tries + 1
                elif isinstance(error, BudgetError) and self._refusal is not None:
                    raise self._refusal from error
                elif isinstance(error, NodeLostError):
                    if not tries:
                        text = f"{error} The call was tried twice. Call again once the nodes stay."
                        raise ClusterError(text) from error
                    self._replace(begun.ring, error)
                elif not isinstance(error, TextLostError) or not tries:
                    raise
                begun = None
            else:
                self._passes += 1
                return made

    def _move(self, seen: Ring, prepare: Callable[[Ring], Ring], why: str, *, together: bool) -> bool:
        """Move to other stages, between two passes. Returns whether the model has moved.

        Calls on their way end on the stages before. Texts go on there from their tokens.

        Args:
            seen: the ring that the decision was made for; where it is not the present one, nothing is done.
            prepare: called, in the loop, with the ring before; gives one that is to be started.
            why: the reason.
            together: the nodes have room for the stages before and after at the same time. Else calls wait while the
                ones are closed and the others opened.
        """
        with self._placing:
            if self._closed or self._ring is not seen:
                return False

            async def prepared() -> Ring:
                return prepare(seen)

            self._calls.move()
            begin_s, waited_s = time.monotonic(), 0.0
            try:
                ring = self._loop.ask(prepared())
                try:
                    if together:
                        self._wait_open(ring)
                        self._calls.to(ring)
                        self._calls.ended(seen)
                    else:
                        self._calls.shut()
                        begin_s = time.monotonic()
                        self._calls.ended(seen)
                        self._loop.ask(seen.close(_left()))
                        self._wait_open(ring)
                        self._calls.to(ring)
                        waited_s = time.monotonic() - begin_s
                finally:
                    # What is not in use any more, or never came into use.
                    self._loop.ask((ring if self._ring is seen else seen).close(_left()))
            except PipeloadError as error:
                if not self._calls.closed:
                    waited_s = 0.0 if together else time.monotonic() - begin_s
                    self._history.add(seen.placement, None, f"{why} That failed: {error}", waited_s)
                return False
            finally:
                self._calls.rest()
            self._history.add(seen.placement, ring.placement, why, waited_s)
            return True

    def _wait_open(self, ring: Ring) -> None:
        """Open stages; ends when the model is closed meanwhile."""
        self._opening = self._loop.begin(ring.start())
        try:
            if self._calls.closed:
                self._opening.cancel()
            self._loop.result(self._opening)
        finally:
            self._opening = None

    def _replace(self, lost: Ring, error: NodeLostError) -> None:
        """Place the model anew, where no other thread has done so."""
        with self._placing:
            if self._closed:
                raise ClosedError("The model was closed during the call. Load it again.")
            if self._ring is not lost:
                return
            begin_s = time.monotonic()
            self._lost |= lost.processes_at(error.address)
            with suppress(PipeloadError, TimeoutError, CancelledError):
                self._loop.begin(lost.close(error)).result(_FAREWELL_S)
            try:
                self._calls.to(self._open_ring(self._lost))
            except PipeloadError as refusal:
                raise ClusterError(f"{error} The model cannot be placed anew: {refusal}") from refusal
            self._replaced += 1
            self._history.add(lost.placement, self.placement, str(error), time.monotonic() - begin_s)

    def _end_state(self, state: ClusterState) -> None:
        """Not waited for: the nodes close it when they hear of it, or with the stage."""
        if state.ring is not None and state.id and not self._closed:
            with suppress(ClosedError):
                self._loop.begin(state.ring.end_state(state.id))

    def _check_usable(self) -> None:
        if self._closed:
            raise ClosedError("The model is closed. Load it again.")


class _Begun(NamedTuple, Generic[_Answer]):
    """A call on its way.

    Attributes:
        ring: its stages.
        future: its answer.
        moves: those of the model that had ended when it began.
    """

    ring: Ring
    future: Future[_Answer]
    moves: int


def _left() -> NodeLostError:
    """The error of calls that find a ring that was left; where there is no other one, they place the model anew."""
    return NodeLostError("The model has left its stages.", "")


def _leave(calls: Calls, ring: Ring, _: object) -> None:
    calls.leave(ring)


def _end(loop: Loop, calls: Calls) -> Future[None] | None:
    """Begin to close the stages of a model, unless the connection is closed."""
    calls.close()
    try:
        return loop.begin(calls.ring.close())
    except ClosedError:
        return None
