"""A model that runs on the nodes of a cluster, with the methods of `pipeload.Model`."""

from __future__ import annotations

import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from numpy.typing import NDArray

from pipeload.cluster.history import History, Reconfiguration
from pipeload.cluster.loop import Loop
from pipeload.cluster.messages import Job
from pipeload.cluster.ring import Ring
from pipeload.cluster.rings import FAREWELL_S, Begun, Rings
from pipeload.cluster.state import ClusterState, Texts
from pipeload.errors import (
    ClosedError,
    ClusterError,
    ConfigError,
    PipeloadError,
    QuantisationWarning,
    RunError,
)
from pipeload.foreign import foreign_errors
from pipeload.format.manifest import Manifest, TensorSpec
from pipeload.inputs import INPUTS_FACT, INPUTS_REMEDY, Arrays, GraphInputs, batches, check_batches, split_batch
from pipeload.pipeline.joining import Padding
from pipeload.pipeline.top_logits import TopLogits
from pipeload.planning.placement import Placement
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.answer.answer import answer
from pipeload.tasks.arguments import check_capacity, check_positive
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

_Answer = TypeVar("_Answer")


class ClusterModel:
    """A model on the nodes of a cluster. Made by `Connection.load`; safe to call from several threads.

    A call whose node is lost is tried once more, on a new placement among the nodes that are left; a text goes on from
    its tokens.

    Attributes:
        directory: with the model's manifest, tokenizer and settings, and no weights.
        manifest: its shards, inputs and outputs.
        files: its tokenizer and settings.
        rings: its stages, and the calls to them.
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
        self._passes = 0
        self._closed = False
        self._history = History(name, manifest, tell)
        # A model that is dropped is closed, so what closes it must not refer to it.
        self.rings = Rings(loop, open_ring, self._history)
        self._finalizer = weakref.finalize(self, self.rings.drop)
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
    def placement(self) -> Placement:
        """Which node runs which shards now."""
        return self.rings.present.placement

    @property
    def replacements(self) -> int:
        """How often the model was placed anew, since a node was lost."""
        return self.rings.replaced

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
            DeadlineError: the call was not done within its `pipeload.deadline`.
            ClosedError: the model was closed before or during the call.
        """
        arrays = self._checked(inputs)
        return self._tried(self._pass_of(arrays))

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
        check_batches(items, batch)
        if self.manifest.quantised_dynamically:
            batch = 1
        queue: deque[tuple[Begun[Arrays], Arrays, list[int]]] = deque()

        def oldest() -> Iterator[Arrays]:
            begun, inputs, sizes = queue.popleft()
            outputs: Arrays = self._tried(self._pass_of(inputs), begun)
            return split_batch(outputs, sizes)

        try:
            for inputs, sizes in batches(items, batch):
                arrays = self._checked(inputs)
                begun = self.rings.begin(self._pass_of(arrays))
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
        check_capacity(self.manifest, capacity)
        state = ClusterState(self._texts, capacity, self._end_state)
        self.rings.keep(state)
        return state

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
        self._closed = True
        self._finalizer.detach()
        if (closing := self.rings.close()) is not None:
            with suppress(PipeloadError, TimeoutError, CancelledError):
                closing.result(FAREWELL_S)

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
        with foreign_errors(RunError, INPUTS_FACT, INPUTS_REMEDY):
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

        async def on(ring: Ring) -> Any:
            if await state.bring(ring):
                past, given = state.length, arrays
            else:
                past, given = 0, whole
                if state.length and not (known and texts.can_be_joined):
                    raise ClusterError(
                        "A node was lost, and the caches of this model cannot be computed again from its tokens at "
                        "once. Generate the text anew."
                    )
                state.start(ring)
            pieces = texts.pieces(given, dims, past, length, positions, state.expected)
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
            begin_s = time.perf_counter()
            answer = await ring.step([(piece, job) for (piece, _), job in zip(pieces, jobs, strict=True)])
            state.timed(length - past, time.perf_counter() - begin_s)
            return answer

        made = self._tried(lambda ring: self._loop.begin(on(ring)), failed=state.drop)
        state.inputs, state.length, state.dims = whole, length, dims
        state.steps += 1
        state.batch = max(state.batch, next(iter(arrays.values())).shape[0])
        return made

    def _pass_of(self, arrays: Arrays) -> Callable[[Ring], Future[Arrays]]:
        return lambda ring: self._loop.begin(ring.run(arrays))

    def _checked(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        self._check_usable()
        with foreign_errors(RunError, INPUTS_FACT, INPUTS_REMEDY):
            self._graph_inputs.check(inputs)
        # Caches that are left out are empty on the nodes too.
        return dict(inputs)

    def _tried(
        self,
        once: Callable[[Ring], Future[_Answer]],
        begun: Begun[_Answer] | None = None,
        *,
        failed: Callable[[], object] = bool,
    ) -> _Answer:
        made = self.rings.answer(once, begun, failed=failed)
        self._passes += 1
        return made

    def _end_state(self, state: ClusterState) -> None:
        """Not waited for: the nodes close it when they hear of it, or with the stage."""
        if state.ring is not None and state.id and not self._closed:
            # A move may have brought them to the present stages already.
            for ring in {state.ring, self.rings.present}:
                with suppress(ClosedError):
                    self._loop.begin(ring.end_state(state.id))

    def _check_usable(self) -> None:
        if self._closed:
            raise ClosedError("The model is closed. Load it again.")
