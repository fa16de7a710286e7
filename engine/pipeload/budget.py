"""One memory budget for several models: the one that is called has the memory, the others what they need to run.

Only threads of callers move memory, so no agent waits for another model's agent. A model that is asked gives memory
back between two of its passes.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import TypeVar

from pipeload.errors import BudgetError, ClosedError, ConfigError, LoadError
from pipeload.machine.sizes import format_bytes, parse_budget
from pipeload.pipeline.deadlines import held
from pipeload.pipeline.open_pipelines import OPEN_PIPELINES
from pipeload.pipeline.pipeline import Pipeline
from pipeload.planning.shares import Share, Shares

__all__ = ["Budget", "budget_of"]

_Made = TypeVar("_Made")

_MOVING = "while memory moved between models"
_ROUND_BYTES = 1_000_000
"""What a model lacks is told in whole megabytes."""
_USEFUL_FACTOR = 1.25
"""Memory of this many buffers keeps another shard, with its session, for certain."""
_SLACK_SHARE = 0.005
"""Models keep this fraction of the budget beyond what their plans use: needs change a little all the time."""


class Budget:
    """The most memory that the process may use, for all models that are loaded with it.

    Each model always has the memory that it needs to stream its weights, or is refused. The rest is the memory of the
    model that is called: at its second pass without a pass of another one between, the others give back what they keep
    between passes, those first that were called longest ago.

    Args:
        memory_budget: as for `load`: bytes, `"256MB"`, `"1GiB"` or `"auto"`.
        beside_bytes: memory that no model gets: the program itself needs it while models are called.

    Raises:
        ConfigError: the budget is no size.

    Example:
        >>> budget = pipeload.Budget("300MB")
        >>> embedder = pipeload.load("models/exported/minilm", budget)
        >>> chatter = pipeload.load("models/exported/smollm2-135m", budget)
    """

    __module__ = "pipeload"

    def __init__(self, memory_budget: int | str = "auto", *, beside_bytes: int = 0) -> None:
        self._budget_bytes = parse_budget(memory_budget)
        if not isinstance(beside_bytes, int) or isinstance(beside_bytes, bool) or beside_bytes < 0:
            raise ConfigError(f"beside_bytes is {beside_bytes!r:.80}; it must be a whole number, not below 0.")
        self._beside_bytes = beside_bytes
        self._pid = os.getpid()
        self._shares = self._new_shares()
        self._known: list[weakref.ref[Pipeline]] = []
        # One move at a time. No agent takes it.
        self._moving = threading.Lock()

    @property
    def budget_bytes(self) -> int | None:
        """The budget; None takes the free memory."""
        return self._budget_bytes

    def set(self, memory_budget: int | str) -> None:
        """Change the budget; this returns after the memory beyond it was given back.

        The model that was called last gets or gives the difference, the others where that one cannot.

        Args:
            memory_budget: as for `load`.

        Raises:
            BudgetError: the new budget is too small for the open models; the old one stays in force.
            ConfigError: it is no size.
        """
        budget_bytes = parse_budget(memory_budget)
        while True:
            with held(self._moving, _MOVING):
                try:
                    self._set(budget_bytes)
                    return
                except BudgetError as error:
                    refused = error
            if not self._leave_out_drafts(refused) and not self._wait_for_closing():
                raise self.refusal(refused) from refused

    def __repr__(self) -> str:
        size = "auto" if self._budget_bytes is None else format_bytes(self._budget_bytes)
        return f"<pipeload.Budget of {size}, {len(self._pipelines)} models open>"

    # Opening. The caller holds the lock of OPEN_PIPELINES.

    def process_bytes(self, measured_bytes: int, brought_bytes: int) -> int:
        """The process beside its models, and beside what opening them has brought into it.

        Args:
            measured_bytes: memory that it occupies now.
            brought_bytes: the part of it that opening the next model has brought.
        """
        if os.getpid() != self._pid:
            # The parent's models are not the forked child's, where a thread of the parent may hold the lock.
            self._pid, self._shares, self._known = os.getpid(), self._new_shares(), []
            self._moving = threading.Lock()
        own_bytes = measured_bytes - brought_bytes
        models = self._pipelines
        if not models:
            return own_bytes + OPEN_PIPELINES.to_come_bytes()
        # Their passes may run: what was measured tells no more than this.
        seen_bytes = own_bytes - sum(
            one.used_bytes - one.to_come_bytes + one.plan.pass_bytes + one.plan.cache_bytes + one.share.brought_bytes
            for one in models
        )
        known_bytes = max(one.process_bytes - one.share.brought_bytes for one in models)
        return max(known_bytes, seen_bytes - self.runtime_bytes)

    @property
    def runtime_bytes(self) -> int:
        """The runtime's memory as the open models know it, which have one runtime; 0 while there are none."""
        return max((one.runtime_bytes for one in self._pipelines), default=0)

    def open_share(self, fixed_bytes: int | None, brought_bytes: int) -> Share:
        """The share of a model that is being opened; `leave` it where that fails.

        Args:
            fixed_bytes: of a draft; None for a model, which has no memory yet where there are others: see `gather`.
            brought_bytes: see `Share`.

        Raises:
            BudgetError: the others need the memory of the draft.
        """
        return self._shares.add(None, brought_bytes) if fixed_bytes is None else self.fixed(fixed_bytes, brought_bytes)

    def add(self, pipeline: Pipeline) -> None:
        """Count this pipeline from now on."""
        self._known = [weakref.ref(one) for one in (*self._pipelines, pipeline)]

    # Moving

    def called(self, share: Share) -> None:
        """A model is about to queue a pass: let it have memory that others do not use, and memory of those that had no
        pass since its own latest one.

        Waits for no pass of another model: one that runs gives memory back when it ends.
        """
        if share.alone or share.fixed:
            return
        own = next((one for one in self._models if one.share is share), None)
        if own is None or not own.plan.streamed_bytes:
            return
        others = [one for one in self._models if one is not own]
        resting = [one for one in others if _rests(one.share, share)]
        unused_bytes = sum(map(_unused_bytes, others))
        # With less than that it might keep no more than before.
        useless = unused_bytes < _USEFUL_FACTOR * own.plan.buffer_bytes
        if (useless and not resting) or not self._moving.acquire(blocking=False):
            return
        try:
            for one in resting:
                one.share.asked_pass = one.share.last_pass
            wants = own.extremes[1] - own.usable_bytes
            if wants > 0:
                _give_back_kept(resting, wants - unused_bytes)
                self._move(share, wants, wants, others, resting, wait=False)
        finally:
            self._moving.release()

    def with_room(self, share: Share, call: Callable[[], _Made], most_bytes: Callable[[], int] = int) -> _Made:
        """What a call returns. Where only other models' memory keeps it from running, they give it back, drafts are
        left out, and models that are being closed are waited for.

        Args:
            share: of the model that it is for.
            call: raises BudgetError where the share is too small.
            most_bytes: tells what the model may also have of memory that others do not use.

        Raises:
            BudgetError: there is too little memory for all models together; none moves for a draft.
        """
        while True:
            standing = share.standing
            try:
                return call()
            except BudgetError as error:
                if share.standing != standing:
                    # Another model was closed meanwhile.
                    continue
                if share.alone or share.fixed:
                    raise
                if self.gather(share, error, most_bytes()) or self._wait_for_closing():
                    continue
                self._wait_for_moves(share)
                if share.standing == standing:
                    raise self.refusal(error, share) from error

    def gather(self, share: Share, error: BudgetError, most_bytes: int = 0) -> bool:
        """Let a model have what it lacks to run at all, from all others. Returns whether there was anything to have.

        Waits for the end of passes that run. Drafts are left out where the models give too little.

        Args:
            share: the model's.
            error: tells what it lacks.
            most_bytes: what it may also have of memory that others do not use.
        """
        with held(self._moving, _MOVING):
            if self._gather(share, error, most_bytes):
                return True
        return self._leave_out_drafts(error)

    def fixed(self, nbytes: int, brought_bytes: int = 0) -> Share:
        """A share of this size, of the memory of the model that has the rest; `leave` it in the end.

        Raises:
            BudgetError: that one needs the memory.
        """
        share = self._shares.add(0, brought_bytes)
        try:
            self.extend(share, nbytes)
        except BaseException:
            share.leave()
            raise
        return share

    def extend(self, share: Share, nbytes: int) -> None:
        """Let a fixed share have more memory, of the model that has the rest; returns after that was given back.

        Raises:
            BudgetError: that one needs the memory.
        """
        with held(self._moving, _MOVING):
            share.counted_bytes += nbytes
            try:
                while (holder := self._holder) is not None:
                    try:
                        holder.change(nullcontext).result()
                        break
                    except ClosedError:
                        if not self._wait_for_closing():
                            raise
            except BaseException:
                share.counted_bytes -= nbytes
                raise
            share.usable_bytes = share.counted_bytes

    def refusal(self, error: BudgetError, share: Share | None = None) -> BudgetError:
        """The error of a model, which names the smallest budget for all models together.

        Args:
            error: of one model.
            share: the model's; None stands for the one that has the rest.
        """
        others = [one for one in self._models if one.share is not (share or self._shares.holder)]
        if not others:
            return error
        needed = error.needed_bytes - sum(_unused_bytes(one) + _spare_bytes(one) for one in others)
        needed = (needed // _ROUND_BYTES + 2) * _ROUND_BYTES
        return BudgetError(
            f"A memory budget of {format_bytes(error.budget_bytes)} cannot work for {len(others) + 1} models together: "
            f"the smallest that can is {format_bytes(needed)}, in which each streams its weights. Raise the budget to "
            f"at least {needed} bytes, close a model, or pass smaller inputs.",
            needed_bytes=needed,
            budget_bytes=error.budget_bytes,
        )

    def _new_shares(self) -> Shares:
        shares = Shares()
        if self._beside_bytes:
            shares.add(self._beside_bytes)
        return shares

    @property
    def _pipelines(self) -> list[Pipeline]:
        """Those that are open."""
        found = [known() for known in self._known]
        return [one for one in found if one is not None and one.share in self._shares.opened]

    @property
    def _models(self) -> list[Pipeline]:
        """The pipelines of open models, without those of drafts."""
        return [one for one in self._pipelines if not one.share.fixed]

    @property
    def _holder(self) -> Pipeline | None:
        return next((one for one in self._models if one.share is self._shares.holder), None)

    def _set(self, budget_bytes: int | None) -> None:
        while (holder := self._holder) is not None:
            try:
                holder.set_budget(budget_bytes)
                break
            except BudgetError as error:
                if not self._gather(holder.share, error):
                    raise
            except ClosedError:
                if not self._wait_for_closing():
                    raise
        for pipeline in self._pipelines:
            if pipeline is not holder:
                with suppress(ClosedError):
                    pipeline.set_budget(budget_bytes)
        self._budget_bytes = budget_bytes

    def _gather(self, share: Share, error: BudgetError, most_bytes: int = 0) -> bool:
        lacks = error.needed_bytes - error.budget_bytes
        others = [one for one in self._models if one.share is not share]
        _give_back_kept(others, lacks - sum(map(_unused_bytes, others)))
        if sum(_unused_bytes(one) + _spare_bytes(one) for one in others) < lacks:
            return False
        return self._move(share, lacks, max(lacks, most_bytes), others, others, wait=True) > 0

    def _move(
        self,
        taker: Share,
        lacks: int,
        wants: int,
        others: Sequence[Pipeline],
        givers: Sequence[Pipeline],
        *,
        wait: bool,
    ) -> int:
        """Move memory to one model, which has the rest from then on. Returns the bytes that it has for certain.

        Args:
            taker: its share.
            lacks: memory for which the givers take weights out of memory, those first that were called longest ago.
            wants: memory that all others leave to it where they do not use it.
            others: all models but the taker.
            givers: some of them.
            wait: also for passes that run.
        """
        given = {}
        for one in others:
            given[one] = min(_unused_bytes(one), wants)
            lacks, wants = lacks - given[one], wants - given[one]
        for one in sorted(givers, key=lambda pipeline: pipeline.share.last_pass):
            more = min(_spare_bytes(one), max(0, lacks))
            given[one] += more
            lacks -= more
        moved = 0
        for one, nbytes in given.items():
            if not nbytes and one.share is not self._shares.holder:
                continue
            # It may need its memory again, or the caller may be its own agent; then the taker does with what it has.
            with suppress(BudgetError, ClosedError, ConfigError, LoadError):
                waits = wait or one.idle
                call = one.change(partial(one.share.becoming, one.usable_bytes - nbytes, taker))
                if waits:
                    call.result()
                    moved += nbytes
        return moved

    def _wait_for_moves(self, share: Share) -> None:
        """Wait until models have given back what `called` has asked them for: they have it no more, and the taker has
        not got it yet.
        """
        for one in self._models:
            if one.share is not share:
                with suppress(BudgetError, ClosedError, ConfigError, LoadError):
                    one.change(nullcontext).result()

    def _wait_for_closing(self) -> bool:
        """Wait until models that are being closed have given their memory back. Returns whether one has."""
        closing = [one for one in self._pipelines if one.closed]
        for one in closing:
            # The first to close it does all; one of its own agents cannot wait for itself.
            one.close()
        return any(one.share not in self._shares.opened for one in closing)

    def _leave_out_drafts(self, error: BudgetError) -> bool:
        """Let the models have the memory of their drafts. Returns whether there were any."""
        reason = f"the model needs its memory. {error}"
        left_out = [share.give_up(reason) for share in self._shares.opened if share.give_up is not None]
        return any(left_out)


def budget_of(memory_budget: int | str | Budget) -> Budget:
    """The caller's budget, or a new one for a single model."""
    return memory_budget if isinstance(memory_budget, Budget) else Budget(memory_budget)


def _rests(one: Share, taker: Share) -> bool:
    """Whether a model has had no pass since the taker's latest one, and was not asked for memory since its own."""
    return one.last_pass < taker.last_pass and one.asked_pass != one.last_pass


def _give_back_kept(models: Sequence[Pipeline], nbytes: int) -> None:
    """Let models close caches that they keep for later, of this many bytes: before any weights give way."""
    for one in sorted(models, key=lambda pipeline: pipeline.share.last_pass):
        before = one.extremes[0]
        if nbytes > 0 and one.share.give_back is not None:
            one.share.give_back(nbytes)
            nbytes -= before - one.extremes[0]


def _unused_bytes(one: Pipeline) -> int:
    """Memory of a share that its plan has no use for, but for a little that passes may need."""
    return max(0, one.usable_bytes - one.used_bytes - int(one.plan.budget_bytes * _SLACK_SHARE))


def _spare_bytes(one: Pipeline) -> int:
    """The rest of a share, but for what the model needs to run."""
    return max(0, one.usable_bytes - _unused_bytes(one) - one.extremes[0])
