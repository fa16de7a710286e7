"""Whether a model's own draft pays under a budget, by two plans that share it. Pure.

```
budget  ------------------------------      ------------------------------
        | weights of the model       |      | fewer weights of the model |
        |                            |      |----------------------------|
        |                            |      | the draft                  |
        | process, passes, caches    |      | process, passes, caches    |
0       ------------------------------      ------------------------------
         a token a sweep                     longer sweeps, 1 + a + .. + a^k tokens each
```

The draft makes k guesses of a sweep one after another; each is right with probability a, and those behind the first
wrong one are in vain (Leviathan et al. 2023, arXiv 2211.17192). A sweep that checks them computes for longer, which
costs nothing while reading takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeload.errors import BudgetError
from pipeload.format.manifest import Manifest
from pipeload.machine.sizes import format_bytes
from pipeload.planning.needs import Needs
from pipeload.planning.planner import (
    AMPLE_BYTES,
    Plan,
    forecast,
    least_budget_bytes,
    make_plan,
    process_bytes,
    times_of,
)
from pipeload.planning.profile import Profile

__all__ = ["Contender", "Drafting", "expected_tokens", "weigh"]

MOST_DRAFTS = 20
"""Guesses for a sweep. Few of those behind the twentieth are ever right."""
PIECE_TOKENS = 64
"""A draft reads a prompt in pieces of this many tokens: its activations take memory from the model."""
_GAIN = 1.2
"""Times the speed without it that a draft must promise: its own times vary, and what it takes is missed by others."""
_FIRST_SLOPE = 0.25
"""Assumed cost of computing each further token of a sweep, relative to the first: weights are read once."""
_SPARE_SHARE = 0.006
"""A plan leaves half a percent of its budget for weights free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One of the two models.

    Attributes:
        manifest: its description.
        profile: of the machine, and of the process without either model.
        needs: of its passes, beside weights.
    """

    manifest: Manifest
    profile: Profile
    needs: Needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """Whether a model uses its own draft, and what that promises.

    Attributes:
        used: the draft guesses tokens.
        reason: why it does not; empty where it does.
        draft_bytes: memory that the draft takes of the budget; 0 where no plan has room for it.
        model_bytes: what is left to the model, beside the process; 0 likewise.
        acceptance: probability that a guess is right: measured when the model was exported, or by its texts; or else
            assumed.
        drafts: guesses for a sweep.
        tokens_per_sweep: expected with these.
        sweep_s: predicted seconds of a sweep, in the memory that the draft leaves.
        compute_s: the part of it in which one token is computed.
        draft_s: predicted seconds of a guess.
        plain_s: predicted seconds of a sweep, in all of the memory.
    """

    __module__ = "pipeload"

    used: bool
    reason: str = ""
    draft_bytes: int = 0
    model_bytes: int = 0
    acceptance: float = 0.0
    drafts: int = 0
    tokens_per_sweep: float = 1.0
    sweep_s: float = 0.0
    compute_s: float = 0.0
    draft_s: float = 0.0
    plain_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Expected with guesses, of a long text; 0 where no plan has room for the draft."""
        return self.tokens_per_sweep / _seconds(self, self.drafts) if self.sweep_s else 0.0

    @property
    def plain_tokens_per_s(self) -> float:
        """Expected without guesses; 0 where the model itself has no plan."""
        return 1 / self.plain_s if self.plain_s else 0.0

    def with_acceptance(self, acceptance: float) -> Drafting:
        """What the same two plans promise when guesses are right with another probability."""
        told = replace(self, acceptance=acceptance)
        drafts = max(
            range(MOST_DRAFTS + 1), key=lambda count: expected_tokens(acceptance, count) / _seconds(told, count)
        )
        told = replace(told, drafts=drafts, tokens_per_sweep=expected_tokens(acceptance, drafts), used=True, reason="")
        if told.tokens_per_s > _GAIN * told.plain_tokens_per_s:
            return told
        gives = f"would give {told.tokens_per_s:.2g} tokens/s, plain {told.plain_tokens_per_s:.2g}"
        return replace(told, used=False, reason=gives)

    def __str__(self) -> str:
        if not self.used:
            return f"draft left out: {self.reason}"
        return (
            f"draft: {format_bytes(self.draft_bytes)} in memory, {self.tokens_per_sweep:.1f} tokens a sweep from "
            f"{self.drafts} guesses ({self.acceptance:.0%} right), {self.tokens_per_s:.2g} tokens/s, plain "
            f"{self.plain_tokens_per_s:.2g}"
        )


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens of a sweep that checks this many guesses, each of which is right with this probability."""
    return sum(acceptance**place for place in range(drafts + 1))


def weigh(
    model: Contender,
    draft: Contender,
    *,
    budget_bytes: int,
    acceptance: float,
    loaders: int | None = None,
    threads: int | None = None,
) -> Drafting:
    """Plan the model alone and beside its draft, and take what makes more tokens a second.

    All of the draft stays in memory: its weights of few bits are packed whenever they are loaded, which takes longer
    than a guess is worth.

    Args:
        model: the model.
        draft: its copy with fewer bits.
        budget_bytes: the most memory that the whole process may use.
        acceptance: probability that a guess is right.
        loaders: number of Loading Agents; None chooses.
        threads: intra-op threads; None chooses.
    """

    def plan(one: Contender, nbytes: int, neighbour_bytes: int = 0) -> Plan:
        profile = replace(one.profile, process_bytes=one.profile.process_bytes + neighbour_bytes)
        return make_plan(one.manifest, profile, budget_bytes=nbytes, needs=one.needs, loaders=loaders, threads=threads)

    try:
        alone = plan(model, budget_bytes)
    except BudgetError:
        return Drafting(used=False, reason="the model itself does not fit")
    plain_s = _steady_s(model, alone)
    if not alone.streamed_bytes:
        return Drafting(used=False, reason="the model fits into memory", plain_s=plain_s)
    # With all the memory that it could use, other resident shards are packed too; that much need not be.
    ample = plan(draft, AMPLE_BYTES)
    whole = plan(draft, ample.peak_bytes)
    if whole.streamed_bytes:
        whole = ample
    draft_bytes = whole.peak_bytes + int(whole.weights_bytes * _SPARE_SHARE) + 1 - process_bytes(draft.profile)
    try:
        beside = plan(model, budget_bytes, draft_bytes)
    except BudgetError:
        least_bytes = least_budget_bytes(model.manifest, model.profile, model.needs, threads=threads)
        free = max(0, budget_bytes - least_bytes)
        needs = f"needs {format_bytes(draft_bytes)}, {format_bytes(free)} are free beside the model"
        return Drafting(used=False, reason=needs, plain_s=plain_s, acceptance=acceptance)
    times = times_of(model.manifest, model.profile, beside.threads).values()
    return Drafting(
        used=True,
        draft_bytes=draft_bytes,
        model_bytes=budget_bytes - process_bytes(model.profile) - draft_bytes,
        sweep_s=_steady_s(model, beside),
        compute_s=sum(time.loading_run_s for time in times),
        draft_s=_steady_s(draft, whole),
        plain_s=plain_s,
    ).with_acceptance(acceptance)


def _steady_s(one: Contender, plan: Plan) -> float:
    return forecast(one.manifest, one.profile, plan).steady_s


def _seconds(told: Drafting, drafts: int) -> float:
    """Seconds of this many guesses, and of the sweep that checks them."""
    return max(told.sweep_s, told.compute_s * (1 + _FIRST_SLOPE * drafts)) + drafts * told.draft_s
