"""The facade: open a sharded model directory, run it, close it."""

from __future__ import annotations

import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeload.budget import Budget, budget_of
from pipeload.decode import DecodeState, Decoding, Step
from pipeload.errors import (
    BudgetError,
    ClosedError,
    ConfigError,
    LoadError,
    PipeloadError,
    QuantisationWarning,
    RunError,
)
from pipeload.foreign import foreign_errors
from pipeload.format import manifest as manifests
from pipeload.format.caches import past_symbols
from pipeload.format.manifest import MANIFEST_NAME, Manifest, TensorSpec
from pipeload.format.stages import stage_of
from pipeload.inputs import INPUTS_FACT, INPUTS_REMEDY, Arrays, GraphInputs, batches, check_batches, split_batch
from pipeload.machine.sizes import format_bytes
from pipeload.opening import Opened, Options, draft_bytes, open_pipeline, weigh_draft
from pipeload.pipeline.deadlines import lifted
from pipeload.pipeline.joining import Joins, Padding, Rows
from pipeload.pipeline.pipeline import Pipeline
from pipeload.pipeline.requests import Call
from pipeload.pipeline.session import Value, to_array, to_value
from pipeload.pipeline.sweep import Feed
from pipeload.pipeline.top_logits import RunningTop, TopLogits
from pipeload.planning import needs
from pipeload.planning.drafting import Drafting
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile
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
from pipeload.tasks.generate.own_draft import DraftRooms, OwnDraft
from pipeload.tasks.generate.session import Session
from pipeload.tasks.images import image_sizes
from pipeload.tasks.text.tokenizer import tokenizer_of
from pipeload.tracing.stats import Stats
from pipeload.tracing.trace import Progress, Trace

_Sizes: TypeAlias = tuple[tuple[str, int], ...]

__all__ = ["Model", "load"]


def load(
    path: str | os.PathLike[str],
    memory_budget: int | str | Budget = "auto",
    *,
    loaders: int | None = None,
    threads: int | None = None,
    sizes: Mapping[str, int] | None = None,
    verify: bool = True,
    profile: Profile | None = None,
    progress: Callable[[Progress], None] | None = None,
    draft: Literal["auto"] | None = "auto",
    shards: str | None = None,
) -> Model:
    """Open a sharded model directory under a memory budget for the whole process.

    Reading begins in the background at once, but only after the budget was found to work.

    Args:
        path: the directory that `pipeload export` made.
        memory_budget: the most memory that the process may use, in bytes or as `"256MB"` or `"1GiB"`; `"auto"` takes
            all memory that the cgroup (v1 or v2) and the machine leave free. Models that are loaded with one
            `pipeload.Budget` share it.
        loaders: number of Loading Agents; None chooses.
        threads: intra-op threads; None chooses between the numbers that `pipeload profile` measured, every usable core
            or one less. Without a profile it takes every core.
        sizes: sizes of symbolic dimensions to plan for, such as `{"sequence_length": 512}`; without it batch 1 and 128.
            Larger inputs also work if they fit the budget: resident shards then make room for them.
        verify: check the sha256 of each file, except for files that passed this check on this machine before and have
            not changed since. Sizes and headers are always checked.
        profile: the measurements of this model on this machine, by `pipeload profile`; None takes the profile kept for
            this machine, or learns from the first passes if there is none.
        progress: called after each shard of each pass, in a thread of the engine.
        draft: "auto" opens the draft that `pipeload export --draft` has put beside the model, where the budget has room
            for it and it is expected to pay: it guesses tokens of `generate`, and the model checks them, so the texts
            stay the same. `Model.draft` says what is expected, or why the draft is left out. None leaves it out.
        shards: opens a stage, a part of the model: the names of its first and last shard, as in
            `"block.000:block.011"`, where either may be left out. Its inputs are what these shards take from others
            (edges), its outputs what others take from them, and it has the KV caches of its own shards: `run` and
            `step_outputs` work as for a whole model. None opens all shards.

    Returns:
        The model, a context manager.

    Raises:
        ManifestError: the directory holds no valid model.
        ShardError: a file of the directory is missing, damaged or foreign; for shards, which are read later, `run`
            raises it.
        BudgetError: the budget is too small; the message names the smallest that works, for all models that share it.
        ConfigError: an argument is invalid.
        LoadError: the system refused to start another thread, or another memory allocator than the C library's is
            preloaded.

    Warns:
        QuantisationWarning: answers depend on what is computed together.

    Example:
        >>> with pipeload.load("models/exported/minilm", memory_budget="128MB") as model:
        ...     vectors = model.embed(["a cat", "a dog"])
    """
    with foreign_errors(ConfigError, f"{path!r} is no path of a directory", "Pass a str or a path."):
        directory = Path(path)
    manifest = whole = manifests.read(directory)
    if sizes is not None and not isinstance(sizes, Mapping):
        raise ConfigError(f"sizes is {sizes!r}; it must be sizes by name, such as {{'sequence_length': 128}}.")
    if profile is not None and not isinstance(profile, Profile):
        raise ConfigError(f"profile is {profile!r}; it must be a pipeload.Profile.")
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress is {progress!r:.80}; it must be a function that takes a pipeload.Progress.")
    unknown = set(sizes or {}) - set(manifest.dims)
    if unknown:
        raise ConfigError(f"The model has no dimension {sorted(unknown)}; it has {sorted(manifest.dims)}.")
    for symbol, size in (sizes or {}).items():
        if not isinstance(size, int | np.integer) or size < 0:
            raise ConfigError(f"The size of {symbol} is {size!r}; it must be a whole number, not below 0.")
    for name, number in (("loaders", loaders), ("threads", threads)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ConfigError(f"{name} is {number}; it must be at least 1, or None to choose.")
    if draft not in ("auto", None):
        raise ConfigError(f"draft is {draft!r:.80}; it must be 'auto' or None.")
    if shards is not None:
        if not isinstance(shards, str):
            raise ConfigError(
                f"shards is {shards!r:.80}; it must be FIRST:LAST, such as 'block.000:block.011', or None."
            )
        manifest = stage_of(whole, shards)
    budget = budget_of(memory_budget)
    files = ModelFiles(directory, manifest, verify=verify)
    if manifest.quantised_dynamically:
        warnings.warn(
            "This model quantises its activations with one scale for a whole tensor, so the answers for a text depend "
            "on what is computed together with it. Its texts and images are computed one by one, and prompts whole, "
            "without drafts; run and step compute what they are given together.",
            QuantisationWarning,
            stacklevel=2,
        )
    with foreign_errors(LoadError, f"The model in {directory} could not be opened", "Check the limits of the process."):
        return Model(
            directory,
            manifest,
            Options(
                budget=budget,
                loaders=loaders,
                threads=threads,
                dims=needs.planning_dims(manifest, image_sizes(files, manifest) | dict(sizes or {})),
                verify=verify,
                profile=profile,
                progress=progress,
                stage_of=None if shards is None else whole,
            ),
            draft=draft is not None,
        )


load.__module__ = "pipeload"


class Model:
    """A model that runs under a memory budget. Made by `load`; safe to call from several threads.

    Attributes:
        directory: its path.
        manifest: its shards, inputs and outputs.
        files: its own files, such as `config.json`; each is checked when it is read.
        own_draft: the copy of the model that guesses its tokens; None where there is none, or none was asked for.
            `draft` tells what it promises.
    """

    __module__ = "pipeload"

    def __init__(self, directory: Path, manifest: Manifest, options: Options, *, draft: bool = False) -> None:
        self.directory = directory
        self.manifest = manifest
        self.files = ModelFiles(directory, manifest, verify=options.verify)
        self._graph_inputs = GraphInputs(manifest)
        self._joins = Joins.of(manifest)
        self._decoding = Decoding(manifest)
        self._pass_needs = _pass_needs_of(manifest)
        self._pid = os.getpid()
        self._budget = options.budget
        self._whole = options.stage_of is None
        # A stage with the end of the model makes what the model makes.
        self._has_logits = options.stage_of is None or manifest.shards[-1] is options.stage_of.shards[-1]
        self.own_draft, beside = self._open_draft(options) if draft else (None, options)
        try:
            open_pipeline(directory, manifest, self._decoding, beside, self._bring_in, self._adopt)
        except BaseException as error:
            open_draft = self.own_draft is not None and self.own_draft.leave_out(
                f"the model cannot open beside it. {error}"
            )
            if not open_draft or not isinstance(error, BudgetError):
                raise
            open_pipeline(directory, manifest, self._decoding, options, self._bring_in, self._adopt)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Graph inputs, without the caches."""
        return self.manifest.free_inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Graph outputs, without the caches."""
        return self.manifest.free_outputs

    @property
    def plan(self) -> Plan:
        """How the model runs now; larger inputs may change it."""
        return self._pipeline.plan

    @property
    def draft(self) -> Drafting | None:
        """Whether the model's own draft guesses tokens, and what that promises; None where there is none, or `load` was
        told to leave it out.
        """
        return self.own_draft.drafting if self.own_draft else None

    @property
    def keeps_beginnings(self) -> bool:
        """Whether a text can go on from the caches of another one that begins as it does."""
        return self._decoding.keeps_beginnings

    @property
    def give_back(self) -> Callable[[int], object] | None:
        """Called with the bytes that are missing, before a pass that needs more than the plan has beside weights, and
        before weights give way to another model of the budget: its owner may close decode states that it keeps.
        """
        return self._pipeline.share.give_back

    @give_back.setter
    def give_back(self, call: Callable[[int], object] | None) -> None:
        self._pipeline.share.give_back = call

    @property
    def profile(self) -> Profile:
        """The figures of the machine; passes refine them."""
        return self._replanner.profile

    @property
    def trace(self) -> Trace:
        """The actions of every agent, with their times, in the latest passes."""
        return self._pipeline.trace

    @property
    def stats(self) -> Stats:
        """The figures of all passes since the model was opened."""
        return self._pipeline.stats

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One pass over all shards.

        Args:
            inputs: an array for each graph input; names, dtypes and shapes as in `inputs`. Caches that the caller
                leaves out are empty.

        Returns:
            An array for each graph output, caches included.

        Raises:
            ConfigError: an input is missing, unknown, or of the wrong dtype or shape; all faults at once.
            BudgetError: inputs of this size do not fit the budget; nothing was read.
            ShardError, LoadError, RunError: a shard could not be read, built or run; the next call starts afresh.
            DeadlineError: the call was not done within its `pipeload.deadline`.
            ClosedError: the model was closed before or during the call.
        """
        return self._budget.with_room(self._pipeline.share, lambda: self._arrays(self._start(inputs).result()))

    def run_rows(
        self, inputs: Mapping[str, NDArray[Any]], padding: Padding, *, passes: int = 0
    ) -> dict[str, NDArray[Any]]:
        """`run` for rows of texts, which may share a batch with those of other callers that wait at the same moment.

        Args:
            inputs: as for `run`, `[rows, length]` each.
            padding: makes rows longer; it must change no answer.
            passes: that the caller has had before, for the same task: callers with fewer passes go first.

        Returns:
            As `run`; what others' rows have added is cut off.

        Raises:
            PipeloadError: as `run`.
        """
        return self._budget.with_room(
            self._pipeline.share, lambda: self._arrays(self._start(inputs, padding=padding, passes=passes).result())
        )

    def run_many(
        self, items: Iterable[Mapping[str, NDArray[Any]]], batch: int = 1
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """A pass for each item, or for each batch of them, with the next pass queued while one runs.

        One sweep over the shards serves all items of a batch, so with streamed shards a larger batch takes hardly
        longer while reading takes longer than computing.

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
        queue: deque[tuple[Call[dict[str, Value]], Arrays, list[int]]] = deque()
        lent_bytes = self._pipeline.lent_bytes
        try:
            for passes, (inputs, sizes) in enumerate(batches(items, batch)):
                # The next batch waits in memory while this one runs; the caller has outputs of the two before.
                waiting_bytes = sum(a.nbytes for a in inputs.values())
                call = self._start(inputs, beside_bytes=waiting_bytes, lent_bytes=lent_bytes, passes=passes)
                queue.append((call, inputs, sizes))
                if len(queue) > 1:
                    yield from split_batch(self._outputs_of(*queue[0][:2]), queue.popleft()[2])
            while queue:
                yield from split_batch(self._outputs_of(*queue[0][:2]), queue.popleft()[2])
        finally:
            for call, *_ in queue:
                call.withdraw()

    def set_budget(self, memory_budget: int | str) -> None:
        """Change the memory budget; this returns after the memory beyond it was given back.

        The budget holds for the model, its own draft and the models that share it (`Budget.set`) together; where they
        do not fit, the draft is left out.

        Args:
            memory_budget: as for `load`, but no `pipeload.Budget`.

        Raises:
            BudgetError: the new budget is too small; the old one stays in force.
            ClosedError: the model is closed.
        """
        self._check_usable()
        self._budget.set(memory_budget)

    @contextmanager
    def room_for(self, most_bytes: int, kept_bytes: int = 0) -> Iterator[None]:
        """Memory under the model's budget for what the body makes; weights give way before it begins.

        Args:
            most_bytes: that the body takes at once.
            kept_bytes: that stay, at most as long as the model is open.

        Raises:
            BudgetError: the model cannot work in what is left; nothing has changed.
            ClosedError: the model is closed.
        """
        self._check_usable()
        room = self._budget.with_room(self._pipeline.share, lambda: self._budget.fixed(most_bytes))
        left_bytes = 0
        try:
            yield
            left_bytes = kept_bytes
        finally:
            with suppress(ClosedError), lifted():
                self._budget.extend(room, left_bytes - most_bytes)
            if left_bytes:
                self._pipeline.rooms.append(room)
            if not left_bytes or not self._finalizer.alive:
                room.leave()

    def new_state(self, capacity: int = 0) -> DecodeState:
        """An empty KV cache for `step`.

        Args:
            capacity: tokens to plan for; more fit while the budget has room.

        Raises:
            ConfigError: the model has no caches.
        """
        self._check_usable()
        check_capacity(self.manifest, capacity)
        return self._decoding.new_state(capacity, self)

    def step(self, inputs: Mapping[str, NDArray[Any]], state: DecodeState, *, positions: int = 1) -> NDArray[Any]:
        """One pass of a decoder over new tokens, which follow the tokens in the state.

        Args:
            inputs: as for `run`, without caches; an attention mask covers the cached tokens too.
            state: the caches; a pass that succeeds updates them.
            positions: return the logits of this many of the last new tokens.

        Returns:
            Logits of these positions, `[batch, positions, vocabulary]`.

        Raises:
            PipeloadError: as `run`.
        """
        self._check_logits()
        outputs, _ = self._step(positions, 0, inputs, state)
        return self._logits(outputs, positions)

    def step_outputs(
        self, inputs: Mapping[str, NDArray[Any]], state: DecodeState, *, positions: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """`step` that returns all outputs, as a stage has them: edges, and logits where it has the head.

        Args:
            inputs: as for `step`; of a stage, the edges of the new tokens too.
            state: as for `step`.
            positions: compute the logits of this many of the last new tokens; None for all. A stage without a cut head
                takes all.

        Returns:
            An array for each output that is no cache; edges have all new tokens.

        Raises:
            PipeloadError: as `run`.
        """
        if not self._whole and self.manifest.head is None:
            # A long text would pass in pieces, and only the last one would leave.
            positions = None
        outputs, _ = self._step(positions, 0, inputs, state)
        return {spec.name: to_array(outputs[spec.name]) for spec in self.outputs}

    def step_top(
        self, inputs: Mapping[str, NDArray[Any]], state: DecodeState, top: int, *, positions: int = 1
    ) -> Sequence[Sequence[TopLogits]]:
        """`step` that keeps only the largest logits of each position: the slices of a head are never joined.

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
        self._check_logits()
        outputs, feed = self._step(positions, top, inputs, state)
        if feed.top_logits is not None:
            return feed.top_logits
        running = RunningTop(top)
        running.push(self._logits(outputs, positions))
        return running.result

    def hold(self, state: DecodeState, dims: Mapping[str, int], length: int) -> dict[str, NDArray[Any]]:
        """Room for the caches of a text that another process has computed; weights give way to them.

        Args:
            state: without tokens.
            dims: sizes of the symbolic dimensions in a step of the text.
            length: its tokens.

        Returns:
            Graph input -> its cache, to be written before the state's next step, which follows these tokens.

        Raises:
            BudgetError: the caches do not fit the budget; the state is as it was.
            ClosedError: the model or the state was closed.
        """
        self._check_usable()
        state.check_usable_by(self)
        pipeline = self._pipeline
        change = partial(self._decoding.holding, state, dims, length)
        self._budget.with_room(pipeline.share, lambda: pipeline.change(change).result())
        return self._decoding.hold(state, dims, length)

    def session(self, capacity: int = 0) -> Session[DecodeState]:
        """A growing text: its `generate` does not recompute the beginning that the caches already hold.

        Args:
            capacity: tokens to plan for; more fit while the budget has room.

        Raises:
            ConfigError: the model generates no text.
        """
        return Session(self, capacity)

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
        """End running calls with ClosedError, join every thread, give all memory back. May be called again.

        Stores the figures that passes have taught about the machine, for the next load. This also happens when an
        unclosed model is garbage-collected, and when the interpreter exits.
        """
        try:
            self._close()
        except KeyboardInterrupt:
            # What is left of it is given back; a second one leaves that to the next call.
            self._close()
            raise

    def _close(self) -> None:
        if self.own_draft is not None:
            self.own_draft.close()
        self._finalizer()
        # Another thread may be closing it at this moment: then this waits until it is closed.
        _end_in(self._pid, self._pipeline)

    def __repr__(self) -> str:
        budget = format_bytes(self.plan.budget_bytes) if self._finalizer.alive else "closed"
        return f"<pipeload.Model '{self.directory.name}' for {self.manifest.task}, {budget}>"

    def __enter__(self) -> Model:
        self._check_usable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "A model holds threads and sessions and cannot be pickled. Pass its path, and load it where it is needed."
        )

    def _adopt(self, opened: Opened) -> None:
        self._pipeline, self._replanner = opened.pipeline, opened.replanner
        self._profile_dims = opened.profile_dims
        # The finalizer must not refer to the model. It also runs when the interpreter exits: onnxruntime must not be
        # torn down under running agents.
        self._finalizer = weakref.finalize(self, _end_in, self._pid, self._pipeline, opened.keep)

    def _open_draft(self, options: Options) -> tuple[OwnDraft | None, Options]:
        """Open the model's own draft where that pays. Returns it, and the model's options beside it."""
        record = self.manifest.draft
        if record is None:
            return None, options
        if self.manifest.quantised_dynamically:
            return OwnDraft(Drafting(used=False, reason="the texts of this model are made without drafts")), options
        name, folder = f"{record.path}/{MANIFEST_NAME}", self.directory / record.path
        try:
            data = self.files.read(name, most_bytes=manifests.MOST_BYTES) or b""
            manifest = manifests.parse(data, self.directory / name)
            weighed = weigh_draft(self.directory, self.manifest, (folder, manifest), options, self._bring_in)
            if not weighed.drafting.used:
                return OwnDraft(weighed.drafting), options
            model = Model(folder, manifest, weighed.draft)
        except PipeloadError as error:
            return OwnDraft(Drafting(used=False, reason=f"it cannot be opened. {error}")), options
        share = model._pipeline.share
        rooms = DraftRooms(
            take=partial(options.budget.extend, share),
            expected_bytes=partial(draft_bytes, manifest, model._decoding),
            counted_bytes=weighed.beside_bytes,
        )
        draft = OwnDraft(weighed.drafting, model, rooms)
        leave_out = weakref.WeakMethod(draft.leave_out)
        share.give_up = lambda reason: (known := leave_out()) is not None and known(reason)
        return draft, weighed.model

    def _step(
        self, positions: int | None, top: int, inputs: Mapping[str, NDArray[Any]], state: DecodeState
    ) -> tuple[dict[str, Value], Feed]:
        """Run one pass of a decoder. Returns its outputs, and the feed with its largest logits."""

        def once() -> tuple[dict[str, Value], Feed]:
            # A feed that was refused is of no use any more.
            feed = Feed(positions=positions, top=top)
            return self._step_once(feed, inputs, state), feed

        if positions is not None:
            check_positive("positions", positions)
        return self._budget.with_room(self._pipeline.share, once)

    def _step_once(self, feed: Feed, inputs: Mapping[str, NDArray[Any]], state: DecodeState) -> dict[str, Value]:
        self._check_usable()
        if not isinstance(state, DecodeState):
            raise ConfigError(f"state is {state!r}; make one with model.new_state().")
        state.check_usable_by(self)
        decoding = self._decoding
        with foreign_errors(RunError, INPUTS_FACT, INPUTS_REMEDY):
            arrays, dims = self._graph_inputs.check(inputs, decoding.cached_shapes(state))
        step = decoding.begin(state, feed, dims)
        try:
            outputs = self._submit(feed, arrays, dims, state=state, step=step).result()
        except BaseException:
            decoding.abandon(state)
            raise
        decoding.end(state, step, outputs)
        return outputs

    def _check_logits(self) -> None:
        if not self._has_logits:
            raise ConfigError("This is a stage of a model, which has no logits. Take its step by step_outputs.")

    def _bring_in(self) -> None:
        """The tokenizer takes tens of megabytes: it must be loaded before the process is measured."""
        if self._whole:
            with suppress(ConfigError):
                tokenizer_of(self)

    def _logits(self, outputs: Mapping[str, Value], positions: int) -> NDArray[Any]:
        return to_array(outputs[self.outputs[0].name])[:, -positions:, :]

    def _start(
        self,
        inputs: Mapping[str, NDArray[Any]],
        *,
        beside_bytes: int = 0,
        lent_bytes: int | None = None,
        padding: Padding | None = None,
        passes: int = 0,
    ) -> Call[dict[str, Value]]:
        """Queue one pass.

        Args:
            inputs: as for `run`.
            beside_bytes: memory that the caller needs meanwhile.
            lent_bytes: outputs that callers keep already; the caller will also have those of two passes like this while
                it runs. None when it has none.
            padding: see `run_rows`; None for a pass that shares no batch.
            passes: likewise.
        """
        self._check_usable()
        with foreign_errors(RunError, INPUTS_FACT, INPUTS_REMEDY):
            arrays, dims = self._graph_inputs.check(inputs)
            if lent_bytes is not None:
                lent_bytes += 2 * sum(needs.tensor_bytes(spec, dims) for spec in self.manifest.outputs)
            return self._submit(
                Feed(),
                arrays,
                dims,
                beside_bytes=beside_bytes,
                lent_bytes=lent_bytes or 0,
                rows=self._rows(dims, padding) if padding else None,
                passes=passes,
            )

    def _submit(
        self,
        feed: Feed,
        arrays: Arrays,
        dims: Mapping[str, int],
        *,
        beside_bytes: int = 0,
        lent_bytes: int = 0,
        state: DecodeState | None = None,
        step: Step | None = None,
        rows: Rows | None = None,
        passes: int = 0,
    ) -> Call[dict[str, Value]]:
        pieces, planned = [arrays], [dims]
        if step:
            pieces, planned = self._decoding.pieces(arrays, dims, feed.positions or 1, step)
        specs = self._graph_inputs.specs
        values = [{name: to_value(array, specs[name].dtype) for name, array in piece.items()} for piece in pieces]
        if state and not self._decoding.in_place:
            values[0] |= state.caches
        elif state:
            feed.caches = state.caches
        feed.pieces = values
        found = [self._pass_needs(tuple(sizes.items()), feed.positions, feed.top > 0) for sizes in planned]
        pass_bytes, held_bytes = (max(figures) for figures in zip(*found, strict=True))
        # Pieces waiting for their turn in a shard are in memory too.
        beside_bytes += (len(pieces) - 1) * held_bytes
        cache_bytes = self._decoding.cache_bytes(state, step)
        if (give_back := self.give_back) is not None:
            plan = self.plan
            has_bytes = plan.pass_bytes + plan.cache_bytes + plan.budget_bytes - plan.peak_bytes
            if (missing := pass_bytes + beside_bytes + cache_bytes - has_bytes) > 0:
                give_back(missing)
                cache_bytes = self._decoding.cache_bytes(state, step)
        self._budget.called(self._pipeline.share)
        return self._pipeline.submit(
            feed,
            Needs(
                pass_bytes=pass_bytes + beside_bytes,
                held_bytes=held_bytes + beside_bytes,
                lent_bytes=lent_bytes,
                cache_bytes=cache_bytes,
                growth_bytes=self._decoding.growth_bytes(state, step),
            ),
            kind=self._kind_of(dims),
            rows=rows,
            passes=state.steps if state else passes,
        )

    def _kind_of(self, dims: Mapping[str, int]) -> object:
        """The kind of a pass of these sizes; see `Call`."""
        # The fill level of the caches does not change it.
        past = past_symbols(self.manifest)
        sizes = tuple(sorted((symbol, size) for symbol, size in dims.items() if symbol not in past))
        return None if all(self._profile_dims.get(symbol) == size for symbol, size in sizes) else sizes

    def _rows(self, dims: Mapping[str, int], padding: Padding) -> Rows | None:
        """The rows of a pass of these sizes, as others' rows may be joined to them; None where they may not."""
        joins = self._joins
        if joins is None or {spec.name for spec in self.inputs} - dict(padding.fills).keys():
            return None

        def needs_of(count: int, length: int) -> tuple[Needs, object]:
            sizes = {**dims, joins.rows: count, joins.length: length}
            pass_bytes, held_bytes = self._pass_needs(tuple(sizes.items()), None, False)
            return Needs(pass_bytes=pass_bytes, held_bytes=held_bytes), self._kind_of(sizes)

        return Rows(
            count=dims[joins.rows],
            length=dims[joins.length],
            padding=padding,
            joins=joins,
            needs_of=needs_of,
            output_bytes=sum(needs.tensor_bytes(spec, dims) for spec in self.manifest.outputs),
        )

    def _outputs_of(self, call: Call[dict[str, Value]], inputs: Arrays) -> dict[str, NDArray[Any]]:
        """The outputs of a queued pass; one that has no room beside other models runs again when they have made it."""
        try:
            return self._arrays(call.result())
        except BudgetError:
            if self._pipeline.share.alone:
                raise
            return self.run(inputs)

    def _arrays(self, outputs: Mapping[str, Value]) -> dict[str, NDArray[Any]]:
        return {spec.name: to_array(outputs[spec.name]) for spec in self.manifest.outputs}

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ConfigError(
                f"This model was opened in process {self._pid} and its threads live there; this is process "
                f"{os.getpid()}. Load the model after the fork."
            )
        if not self._finalizer.alive:
            raise ClosedError("The model is closed. Load it again.")


def _pass_needs_of(manifest: Manifest) -> Callable[[_Sizes, int | None, bool], tuple[int, int]]:
    """`needs.pass_needs` of one model, which remembers the latest sizes: nearly all steps of a text share them."""

    @lru_cache(maxsize=16)
    def pass_needs(dims: _Sizes, positions: int | None, top: bool) -> tuple[int, int]:
        return needs.pass_needs(manifest, dict(dims), positions=positions, top=top)

    return pass_needs


def _end_in(pid: int, pipeline: Pipeline, keep: Callable[[], None] | None = None) -> None:
    if os.getpid() == pid:
        pipeline.close()
        if keep:
            keep()
