"""Decides between passes whether to keep the plan: by a call's needs, the measurements and the memory left.

- The replanner gives memory back at once and takes it slowly: a smaller budget, a smaller limit of the cgroup, less
  free memory or a host that has grown make a new plan before the next pass; room that appears must stay for some
  passes and promise a good deal of time. A layout that still fits is kept, since another one would read shards again.
- The profile learns: when passes take another time than was predicted, or no prediction existed, the replanner takes
  bandwidth and times from the agents' spans, and plans anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Literal

from pipeload.errors import BudgetError
from pipeload.format.manifest import Manifest
from pipeload.machine.memory import Peak
from pipeload.machine.sizes import format_bytes
from pipeload.planning import planner
from pipeload.planning.learning import learn
from pipeload.planning.needs import Needs
from pipeload.planning.planner import Plan
from pipeload.planning.profile import Profile
from pipeload.planning.shares import Share, Shares
from pipeload.tracing.trace import Span

__all__ = ["Replanner"]

_WINDOW = 16
"""The needs of this many latest passes count: giving memory back and forth would reload resident shards."""
_PATIENCE = 8
"""Room that appeared is taken after this many passes."""
_MOST_PATIENCE = 256
"""Room that had to be given back is taken after twice as many passes the next time, at most this many."""
_ROOM_SHARE = 0.05
"""The budget "auto" takes room only when free memory exceeds the budget in force by more than this fraction."""
_UNUSED_SHARE = 0.015
"""At most this fraction of the budget may stay unused: more is taken when it was left for some passes."""
_GAIN = {"first": 0.98, "learned": 0.9, "asked": 1.0}
"""Reason for a plan that is not forced -> it must promise at most this fraction of the time that passes take now."""
_AS_FAST = 1.001
"""Predicted times of two plans that differ by less than this factor are equal."""
_MARGIN = 0.15
"""The profile learns from measured passes that differ from the prediction by more than this fraction."""
_SWING_SHARE = 0.02
"""The host's own data swing by this fraction of the budget all the time."""
_FREE_SWING_SHARE = 0.005
"""Plans outlast free memory that falls by this fraction, at most: what is above may be killed by the kernel. Taking
room back needs patience, so that free memory which swings by more makes a plan smaller once, and not on every pass."""
_HEADROOM_SHARE = 0.01
"""Replans leave this fraction of the budget free, so that slow growth does not force a replan on every pass."""
_SLACK_SHARE, _SLACK_BYTES = 0.005, 1_500_000
"""Corrected figures add this fraction of the budget, or this much where that is more: one of the next passes may take
more than the latest did. Python takes memory in arenas of 1 MiB, and holes in the heap come and go."""
_AMPLE_FACTOR = 1.006
"""A plan leaves half a percent of the memory for weights free."""
_GUARD_SHARE = 0.0025
"""A process that outgrew its plan gets another one unless at least this fraction of the budget is left."""
_WRONG_PASSES, _WRONG_S = 2, 0.5
"""The profile learns after this many more wrong predictions than right ones, one may be chance, and of this many
seconds: a plan takes some milliseconds, as long as a pass of a small model, whose times vary."""


_NO_KIND = object()


class Replanner:
    """Makes the plans of one model.

    Args:
        manifest: the model.
        profile: the machine and the process.
        budget_bytes: the caller's budget; None takes the free memory.
        free_bytes: gives the memory that cgroup and machine leave to this process; called between passes.
        loaders: number of Loading Agents; None chooses.
        threads: intra-op threads; None chooses.
        share: the model's share of the budget; None where no other model has any.

    Attributes:
        share: see above.
    """

    def __init__(
        self,
        manifest: Manifest,
        profile: Profile,
        *,
        budget_bytes: int | None,
        free_bytes: Callable[[], int],
        loaders: int | None = None,
        threads: int | None = None,
        share: Share | None = None,
    ) -> None:
        self.share = share or Shares().add()
        self._standing = self.share.standing
        self._beside_bytes = 0
        self._manifest = manifest
        self._profile = profile
        self._least_process_bytes = profile.process_bytes
        self._budget_bytes = budget_bytes
        self._free_bytes = free_bytes
        self._loaders = loaders
        self._threads = threads
        self._needs: deque[Needs] = deque(maxlen=_WINDOW)
        self._reason: Literal["first", "learned", "asked"] | None = None
        self._ran = False
        self._patience = 0
        self._most_patience = _PATIENCE
        self._took_room = False
        self._room_bytes = 0
        self._slacks: deque[int] = deque(maxlen=_PATIENCE)
        self._outgrown = False
        self._corrected = False
        self._given = profile
        self._kind: object = _NO_KIND
        self._known_kind: object = None
        self._learned: Profile | None = None
        self._wrong, self._wrong_s = 0, 0.0

    @property
    def profile(self) -> Profile:
        """The profile as passes have improved it."""
        return self._profile

    @property
    def learned(self) -> Profile | None:
        """The profile as improved by steady passes of its own sizes, and in its memory by all passes; or None."""
        found = self._learned or (self._given if self._corrected else None)
        return replace(found, runtime_bytes=self._profile.runtime_bytes) if found else None

    def plan(self, needs: Needs, limit_bytes: int | None = None) -> Plan:
        """The best plan for passes with these needs.

        Raises:
            BudgetError: the budget cannot work.
        """
        limit = limit_bytes or self._budget_bytes or self._free_bytes()
        return self._plan_in(self._process_in(limit), needs, limit)

    def extremes(self, needs: Needs) -> tuple[int, int]:
        """The least memory beside the process that works for passes with these needs, and the most that is of use to
        them and to the latest passes. Any thread may ask.
        """
        process = planner.process_bytes(self._profile)
        least = planner.least_budget_bytes(self._manifest, self._profile, needs, threads=self._threads)
        ample = self._plan_in(self._profile, _most([*self._needs, needs]), planner.AMPLE_BYTES).peak_bytes
        return least - process, int((ample - process) * _AMPLE_FACTOR)

    def _plan_in(self, process: Profile, needs: Needs, limit_bytes: int) -> Plan:
        return planner.make_plan(
            self._manifest,
            process,
            budget_bytes=limit_bytes,
            needs=needs,
            loaders=self._loaders,
            threads=self._threads,
        )

    def _process_in(self, limit_bytes: int) -> Profile:
        """The profile as plans see it that may use this much: the process has the memory of other models too."""
        beside = self.beside_bytes(limit_bytes)
        return replace(self._profile, process_bytes=self._profile.process_bytes + beside) if beside else self._profile

    def first_plan(self, needs: Needs) -> Plan:
        """The first plan: loading begins at once, so the plan keeps to the free memory even below the budget.

        Raises:
            BudgetError: the budget cannot work, or too little memory is free for any plan.
        """
        free = self._free_bytes()
        if self._budget_bytes is None or free >= self._budget_bytes * (1 - _FREE_SWING_SHARE):
            return self.plan(needs)
        self.plan(needs)
        try:
            return self.plan(needs, free)
        except BudgetError as error:
            raise BudgetError(
                f"The budget of {format_bytes(self._budget_bytes)} would do, but cgroup and machine leave only "
                f"{format_bytes(free)} to this process, and the smallest that works is "
                f"{format_bytes(error.needed_bytes)}. Free memory, or raise the cgroup's limit.",
                needed_bytes=error.needed_bytes,
                budget_bytes=free,
            ) from error

    @contextmanager
    def trying(self, budget_bytes: int | None) -> Iterator[None]:
        """Try another budget (None: the free memory): it stays if the body plans a pass under it, else the old one."""
        before = self._budget_bytes, self._reason
        self._budget_bytes, self._reason = budget_bytes, "asked"
        try:
            yield
        except BaseException:
            self._budget_bytes, self._reason = before
            raise

    def limit_bytes(self, current: Plan) -> int:
        """Bytes that the process may use now: the budget, or less when less memory is left."""
        free = self._free_bytes()
        # A small difference from the limit in force is no reason to load shards again.
        if self._budget_bytes is None:
            held = current.budget_bytes
            return held if held * (1 - _FREE_SWING_SHARE) <= free <= held * (1 + _ROOM_SHARE) else free
        limit = min(free, self._budget_bytes)
        held = min(current.budget_bytes, self._budget_bytes)
        return held if held * (1 - _FREE_SWING_SHARE) <= limit < held else limit

    def before_pass(self, current: Plan, needs: Needs, occupied_bytes: int, *, strict: bool = False) -> Plan:
        """The plan for the next pass: the one in force, as long as nothing speaks against it.

        Args:
            current: the plan in force.
            needs: of the pass.
            occupied_bytes: memory of the process now, without weights and caches.
            strict: refuse a pass that does not fit the memory free now, even where no other plan could do better.

        Raises:
            BudgetError: the pass does not fit the budget.
        """
        limit = self.limit_bytes(current)
        self._look_beside(limit)
        if self._reason is not None and self._budget_bytes is None:
            # A plan is made in any case: it may use the free memory, but for the part that swings.
            limit = max(limit, int(self._free_bytes() * (1 - _FREE_SWING_SHARE)))
        growth = self.growth_bytes(current, needs.pass_bytes, occupied_bytes)
        if growth:
            process_bytes = max(self._least_process_bytes, self._profile.process_bytes + growth)
            self._profile = replace(self._profile, process_bytes=process_bytes)
        self._needs.append(needs)
        most = _most(self._needs)
        process = self._process_in(limit)
        kept = planner.with_needs(current, process, most, limit)
        room = limit - kept.peak_bytes
        self._patience = self._patience + 1 if room > self._room_bytes + limit * _UNUSED_SHARE else 0
        enough = self._patience >= self._most_patience
        forced = room < (limit * _GUARD_SHARE if self._outgrown else 0)
        self._outgrown = False
        if not forced and self._reason is None and not enough:
            return kept
        try:
            best = self._best(limit, most, needs, forced=forced, strict=strict)
        except BudgetError:
            if forced or self._reason == "asked":
                raise
            # New plans leave a little memory free: where none fits, the one in force still does.
            self._needs.append(needs)
            self._reason, self._patience = None, 0
            return kept
        if not forced:
            now = planner.predict(self._manifest, process, kept)
            # Room is used also where it only saves reading: others may need the disk.
            saves = enough and best.streamed_bytes < kept.streamed_bytes
            gain = _AS_FAST if saves else _GAIN[self._reason or "learned"]
            self._reason = None
            if now is None or (best.steady_pass_s or 0.0) >= now.steady_s * gain:
                if enough:
                    # Room that was refused for its own sake; other reasons for a look say nothing about it.
                    self._room_bytes, self._patience = room, 0
                return replace(kept, first_pass_s=now.first_s, steady_pass_s=now.steady_s) if now else kept
        elif self._took_room and limit >= current.budget_bytes:
            self._most_patience = min(2 * self._most_patience, _MOST_PATIENCE)
        self._reason, self._patience = None, 0
        self._took_room = enough and not forced
        self._room_bytes = max(0, limit - best.peak_bytes)
        return best

    def _look_beside(self, limit_bytes: int) -> None:
        """Plan anew where other models have left memory to this one."""
        before, self._beside_bytes = self._beside_bytes, self.beside_bytes(limit_bytes)
        moved, self._standing = self._standing != self.share.standing, self.share.standing
        if moved and self._beside_bytes < before:
            self._reason = "asked"

    def beside_bytes(self, limit_bytes: int) -> int:
        """Memory that is left to the other models of the budget, where the process may use this much."""
        return self.share.beside_bytes(limit_bytes - planner.process_bytes(self._profile))

    def correct(self, current: Plan, peak: Peak, pass_bytes: int, *, complete: bool) -> None:
        """Compare the peak of the process during a pass with the plan, and correct `Profile.runtime_bytes`.

        Args:
            current: the plan in force.
            peak: bounds on the process's peak memory.
            pass_bytes: the plan's figure for the pass beside weights and caches.
            complete: all weights that the plan has room for were in memory, and nothing was being packed.
        """
        more = min(peak.least_bytes - current.peak_bytes, int(current.budget_bytes * _SWING_SHARE))
        if more > 0:
            self._slacks.clear()
            self._grow(more, current)
            return
        if not complete or not self.share.alone:
            # Other models may use more of their shares the next time.
            return
        # Caches may still be empty, so they count as nothing.
        planned = current.process_bytes + pass_bytes + current.weights_bytes
        self._slacks.append(planned - peak.most_bytes)
        least = min(self._slacks)
        share = int(current.budget_bytes * _SLACK_SHARE)
        slack = max(share, _SLACK_BYTES)
        if len(self._slacks) == _PATIENCE and least > slack + share:
            self._slacks.clear()
            self._set_runtime(planner.runtime_bytes(self._profile) - (least - slack))
            # These passes have shown that the room stays: it is taken at once, unless it had to be given back before.
            self._patience = max(self._patience, _PATIENCE - 1)

    def _grow(self, more_bytes: int, current: Plan) -> None:
        before, corrected = self._profile, self._corrected
        # The runtime is kept for later processes, so it takes no more than it ever could; the host has the rest.
        runtime = planner.runtime_bytes(before)
        of_runtime = min(more_bytes, max(0, planner.MOST_RUNTIME_BYTES - runtime))
        self._set_runtime(runtime + of_runtime)
        of_host = self._profile.process_bytes + more_bytes - of_runtime
        self._profile = replace(self._profile, process_bytes=of_host)
        try:
            self.plan(Needs(pass_bytes=current.pass_bytes, cache_bytes=current.cache_bytes))
        except BudgetError:
            # No other plan would do with less memory than the one in force.
            self._profile, self._corrected = before, corrected
        else:
            self._outgrown = True

    def _set_runtime(self, nbytes: int) -> None:
        self._profile = replace(self._profile, runtime_bytes=max(nbytes, planner.LEAST_RUNTIME_BYTES))
        self._corrected = True

    def growth_bytes(self, current: Plan, pass_bytes: int, occupied_bytes: int) -> int:
        """Growth of the host's own data, negative when they shrank; 0 within the usual swing of free memory.

        Args:
            current: the plan in force.
            pass_bytes: memory that the next pass needs beside weights and caches.
            occupied_bytes: memory of the process now, without weights and caches.
        """
        swing = current.budget_bytes * _SWING_SHARE
        others = self.beside_bytes(self.limit_bytes(current))
        beside = occupied_bytes - planner.process_bytes(self._profile) - others
        # Memory that passes leave behind in the heap is no growth.
        growth = beside - max(pass_bytes, current.pass_bytes)
        # Nor is memory that other models do not use now given back.
        shrunk = beside + self.share.idle_bytes(others)
        return growth if growth > swing else shrunk if shrunk < -swing else 0

    def knows(self, kind: object) -> bool:
        """Whether the profile was measured with passes of this kind; None stands for the profile's own sizes."""
        return self._profile.measured and kind == self._known_kind

    def after_pass(self, current: Plan, spans: Sequence[Span], seconds: float, kind: object) -> bool:
        """Compare a finished pass with its prediction, and learn from it when it was wrong.

        Args:
            current: the plan in force.
            spans: the agents' spans during the pass.
            seconds: its duration.
            kind: tells passes of one kind from others; a pass after one of another kind used shards that were read
                ahead for that kind. None stands for the sizes that the profile is kept for.

        Returns:
            Whether there is a reason to plan anew.
        """
        first, self._ran = not self._ran, True
        if first and self._budget_bytes is None:
            # Pages of libraries that the first pass touched may be charged to no cgroup: they have left memory free.
            self._reason = self._reason or "first"
        if _settling(current, spans):
            self._kind = _NO_KIND
            return self._reason is not None
        alike, self._kind = self._kind == kind, kind
        predicted_s = current.steady_pass_s
        if predicted_s is not None:
            wrong = alike and abs(seconds - predicted_s) > _MARGIN * predicted_s
            # Once may be chance: another process has used the disk or a core.
            if wrong:
                self._wrong, self._wrong_s = self._wrong + 1, self._wrong_s + seconds
            else:
                # Times vary: most passes must be wrong, not all of them.
                self._wrong, self._wrong_s = max(0, self._wrong - 1), max(0.0, self._wrong_s - seconds)
            if self._wrong < _WRONG_PASSES or self._wrong_s < _WRONG_S:
                return self._reason is not None
        self._wrong, self._wrong_s = 0, 0.0
        self._profile = learn(self._manifest, self._profile, current, spans)
        self._known_kind = kind
        if kind is None and alike:
            self._learned = self._profile
        self._reason = self._reason or ("first" if first else "learned")
        return True

    def _best(self, limit_bytes: int, most: Needs, now: Needs, *, forced: bool, strict: bool) -> Plan:
        if forced:
            with suppress(BudgetError):
                found = self.plan(most, int(limit_bytes * (1 - _HEADROOM_SHARE)))
                return planner.with_needs(found, self._process_in(limit_bytes), most, limit_bytes)
        try:
            return self.plan(most, limit_bytes)
        except BudgetError:
            self._needs.clear()
            self._needs.append(now)
        try:
            return self.plan(now, limit_bytes)
        except BudgetError as error:
            whole = self._budget_bytes is not None and limit_bytes >= self._budget_bytes
            if strict or whole or self.beside_bytes(limit_bytes):
                # The pass was refused, so nothing needs to be kept free for it.
                self._needs.clear()
                raise
            # Memory is short outside this process: the smallest plan that works is the best.
            return self.plan(now, min(error.needed_bytes, self._budget_bytes or error.needed_bytes))


def _most(needs: Collection[Needs]) -> Needs:
    return Needs(pass_bytes=max(one.pass_bytes for one in needs), cache_bytes=max(one.cache_bytes for one in needs))


def _settling(plan: Plan, spans: Sequence[Span]) -> bool:
    """Whether shards were packed, or loaded to stay, during a pass: it took longer than later ones will."""
    if plan.steady_pass_s is None:
        return False
    loaded_bytes = sum(span.nbytes for span in spans if span.kind == "read")
    packed = any(span.kind == "pack" and span.shard in plan.resident for span in spans)
    return packed or loaded_bytes > plan.streamed_bytes + 2 * plan.buffers * plan.buffer_bytes
