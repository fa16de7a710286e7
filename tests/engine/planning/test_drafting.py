"""A draft is used where it promises a fifth more tokens a second in the memory that it leaves, and says why not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.engine.plans import manifest_of

from pipeload.errors import BudgetError
from pipeload.planning.drafting import MOST_DRAFTS, Contender, Drafting, expected_tokens, weigh
from pipeload.planning.needs import Needs
from pipeload.planning.planner import make_plan, process_bytes
from pipeload.planning.profile import Profile, ShardTimes

MB = 1_000_000


def _contender(blocks: int, nbytes: int, run_s: float) -> Contender:
    manifest = manifest_of(*[[nbytes]] * blocks)
    times = {
        shard.name: ShardTimes(session_s=0, run_s=run_s, loading_run_s=run_s, pack_s=1e-3, packed_run_s=run_s)
        for shard in manifest.shards
    }
    profile = Profile(process_bytes=50 * MB, cores=4, read_bytes_per_s={1: 1e8}, times={4: times})
    return Contender(manifest=manifest, profile=profile, needs=Needs(pass_bytes=MB))


MODEL, DRAFT = _contender(10, 20 * MB, 1e-3), _contender(2, 5 * MB, 1e-3)
"""The model reads for 0.2 s a block where it does not fit."""
ROOM = 160 * MB


def test_expected_tokens_are_the_first_and_each_guess_that_all_before_it_allow() -> None:
    assert expected_tokens(0.5, 0) == 1.0
    assert expected_tokens(0.5, 3) == 1.875
    assert expected_tokens(0.0, 5) == 1.0
    assert expected_tokens(1.0, 5) == 6.0


def test_a_draft_that_is_mostly_right_is_used_by_a_model_that_streams() -> None:
    found = weigh(MODEL, DRAFT, budget_bytes=ROOM, acceptance=0.9)
    assert (found.used, found.reason, found.acceptance) == (True, "", 0.9)
    assert found.model_bytes + found.draft_bytes == ROOM - process_bytes(MODEL.profile)
    assert found.draft_bytes >= 10 * MB
    assert found.sweep_s >= found.plain_s
    assert found.tokens_per_s > 1.2 * found.plain_tokens_per_s
    assert found.plain_tokens_per_s == 1 / found.plain_s
    assert found.tokens_per_sweep == expected_tokens(0.9, found.drafts)
    assert found.compute_s == pytest.approx(0.01)
    assert found.draft_s == pytest.approx(0.002)
    # Its plan fits what it takes, and the model's fits what is left.
    make_plan(MODEL.manifest, MODEL.profile, budget_bytes=ROOM - found.draft_bytes, needs=MODEL.needs)
    whole = make_plan(
        DRAFT.manifest, DRAFT.profile, budget_bytes=process_bytes(DRAFT.profile) + found.draft_bytes, needs=DRAFT.needs
    )
    assert not whole.streamed_bytes
    assert f"{found.drafts} guesses (90% right)" in str(found)
    assert f"{found.tokens_per_s:.2g} tokens/s, plain {found.plain_tokens_per_s:.2g}" in str(found)


def test_a_draft_that_is_seldom_right_is_left_out() -> None:
    found = weigh(MODEL, DRAFT, budget_bytes=ROOM, acceptance=0.01)
    assert not found.used
    assert str(found) == f"draft left out: {found.reason}"
    assert "tokens/s, plain" in found.reason
    again = found.with_acceptance(0.9)
    assert again == weigh(MODEL, DRAFT, budget_bytes=ROOM, acceptance=0.9)
    assert 0 < again.drafts <= MOST_DRAFTS


def test_a_model_that_fits_into_memory_needs_no_draft() -> None:
    found = weigh(MODEL, DRAFT, budget_bytes=1000 * MB, acceptance=0.9)
    assert (found.used, found.reason) == (False, "the model fits into memory")
    assert found.plain_s == pytest.approx(0.01)


def test_a_model_that_does_not_fit_at_all_has_no_draft() -> None:
    found = weigh(MODEL, DRAFT, budget_bytes=60 * MB, acceptance=0.9)
    assert found == Drafting(used=False, reason="the model itself does not fit")
    assert (found.tokens_per_s, found.plain_tokens_per_s) == (0.0, 0.0)


def test_a_draft_that_leaves_the_model_too_little_says_what_it_needs_and_what_is_free() -> None:
    with pytest.raises(BudgetError) as caught:
        make_plan(MODEL.manifest, MODEL.profile, budget_bytes=1, needs=MODEL.needs)
    found = weigh(MODEL, DRAFT, budget_bytes=caught.value.needed_bytes + MB, acceptance=0.9)
    assert not found.used
    assert "1.0 MB are free beside the model" in found.reason
    assert (found.acceptance, found.draft_bytes) == (0.9, 0)


def test_a_guess_that_takes_as_long_as_a_sweep_does_not_pay() -> None:
    found = weigh(MODEL, DRAFT, budget_bytes=ROOM, acceptance=0.9)
    slow = replace(found, draft_s=found.plain_s).with_acceptance(0.9)
    assert not slow.used


def test_a_draft_takes_no_memory_for_packed_copies_that_it_could_have() -> None:
    """Packing would save a tenth of the time of a guess: the memory saves the model more."""
    faster = {name: replace(times, packed_run_s=0.9e-3) for name, times in DRAFT.profile.times[4].items()}
    packing = replace(DRAFT, profile=replace(DRAFT.profile, times={4: faster}))
    ample = make_plan(packing.manifest, packing.profile, budget_bytes=10**12, needs=packing.needs)
    assert ample.packed
    found = weigh(MODEL, packing, budget_bytes=ROOM, acceptance=0.9)
    plain = weigh(MODEL, DRAFT, budget_bytes=ROOM, acceptance=0.9)
    assert found.used
    assert found.draft_bytes == pytest.approx(plain.draft_bytes, rel=0.01)
    assert found.draft_bytes < ample.peak_bytes - process_bytes(packing.profile)
