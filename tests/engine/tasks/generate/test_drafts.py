"""Drafts come from the text so far, and their length from measured times."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.tasks.fakes import ToyDecoder

from pipeload.tasks.generate import loop
from pipeload.tasks.generate.drafts import DraftLength, PromptLookup
from pipeload.tasks.generate.generate import generate
from pipeload.tasks.generate.sampling import TokenChooser
from pipeload.tasks.model_files import GenerationConfig
from pipeload.tracing.stats import PassStats, Stats
from pipeload.tracing.trace import AgentTimes

CHOOSER = TokenChooser(GenerationConfig(), prompt_tokens=1, eos_ids=[])


@pytest.mark.parametrize(
    ("ids", "count", "draft"),
    [
        ([1, 2, 3, 4, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 4, 1, 2], 5, [3, 4, 1, 2, 3]),  # it goes on with itself
        ([1, 2, 3, 9, 2, 4, 1, 2], 1, [3]),  # two tokens in a row say more than the latest one
        ([2, 3, 2, 4, 2], 1, [4]),  # the latest of equal matches
        ([7, 7], 3, [7, 7, 7]),
        ([1, 2, 3], 3, []),
        ([1], 3, []),
    ],
)
def test_what_followed_before_is_proposed(ids: list[int], count: int, draft: list[int]) -> None:
    assert PromptLookup(2).propose(ids, count, CHOOSER) == draft


@given(st.lists(st.integers(0, 2), min_size=2, max_size=30), st.integers(1, 4))
def test_a_text_that_grows_is_looked_up_as_a_new_one(ids: list[int], ngram: int) -> None:
    growing = PromptLookup(ngram)
    for length in range(1, len(ids) + 1):
        found = growing.propose(ids[:length], 3, CHOOSER)
        assert found == PromptLookup(ngram).propose(ids[:length], 3, CHOOSER)


def _length(*sweeps: tuple[int, int], read_s: float, token_s: float, further_s: float) -> DraftLength:
    length = DraftLength()
    for drafts, accepted in sweeps:
        length.checked(drafts, accepted)
        length.timed(drafts + 1, read_s=read_s, computed_s=token_s + drafts * further_s)
    return length


def test_while_the_storage_takes_longer_drafts_are_free() -> None:
    # Seven tokens compute in as long as the storage reads.
    length = _length((0, 0), (4, 2), (2, 1), read_s=1.0, token_s=0.4, further_s=0.1)
    assert length.choose(20) >= 6
    assert length.sweep_s(7) == pytest.approx(1.0)
    assert length.sweep_s(9) == pytest.approx(1.2)


def test_drafts_that_are_never_right_are_not_made_where_they_cost_time() -> None:
    sweeps = [(0, 0)] + [(5, 0)] * 10
    assert _length(*sweeps, read_s=0.0, token_s=0.1, further_s=0.05).choose(10) == 0
    assert _length(*sweeps, read_s=9.0, token_s=0.1, further_s=0.05).choose(10) == 10


def test_drafts_that_were_wrong_get_another_chance() -> None:
    length = _length((0, 0), *[(5, 0)] * 10, read_s=0.0, token_s=0.1, further_s=0.03)
    assert length.choose(10) == 0
    for _ in range(100):
        length.checked(0, 0)
        length.timed(1, read_s=0.0, computed_s=0.1)
    assert length.choose(10) > 0


def test_drafts_that_are_always_right_are_long() -> None:
    length = _length((0, 0), *[(8, 8)] * 6, read_s=0.0, token_s=0.1, further_s=0.02)
    assert length.choose(12) == 12
    # A drafter that takes as long as the model itself is of no use.
    length.drafted(8, 8 * 0.1)
    assert length.choose(12) <= 1


def test_never_more_than_asked_for() -> None:
    length = DraftLength()
    assert [length.choose(most) for most in (-1, 0, 3)] == [0, 0, 3]


def test_the_time_that_drafts_took_once_is_forgotten() -> None:
    length = _length((0, 0), *[(8, 8)] * 3, read_s=0.0, token_s=0.1, further_s=0.01)
    length.drafted(1, 60.0)
    assert length.choose(10) == 0
    for _ in range(100):
        length.drafted(0, 0.0)
    assert length.choose(10) > 0


@pytest.mark.parametrize(("calls", "others", "timed"), [(1, 0, [2, 3, 4]), (2, 0, []), (1, 1, [])])
def test_only_sweeps_for_the_text_alone_teach_how_long_sweeps_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, others: int, timed: list[int]
) -> None:
    class Shared(ToyDecoder):
        """A decoder whose sweeps serve several calls, or come between those of others."""

        @property
        def stats(self) -> Stats:
            agents = {"inference": AgentTimes(kinds={"run": 1.0}, busy_s=1.0, wait_s=0.0)}
            last = PassStats(seconds=1.0, read_bytes=0, read_s=0.5, bound_s=None, agents=agents, calls=calls)
            return Stats(passes=len(self.steps) * (1 + others), last=last)

    found: list[int] = []
    monkeypatch.setattr(loop.DraftLength, "timed", lambda *_, **__: found.append(len(decoder.steps)))  # type: ignore[attr-defined]
    decoder = Shared(tmp_path)
    generate(decoder, [1, 2, 3], max_new_tokens=4, prompt_lookup_num_tokens=2)
    assert found == timed[: len(decoder.steps) - 1]


def test_a_file_cannot_ask_for_drafts_without_end() -> None:
    length = _length((0, 0), *[(8, 8)] * 9, read_s=9.0, token_s=0.1, further_s=0.0)
    assert length.choose(10**12) <= 128
