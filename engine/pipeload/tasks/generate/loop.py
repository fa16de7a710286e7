"""The loop of text generation: pass after pass, until every text has ended."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

from pipeload.errors import DeadlineError, PipeloadError
from pipeload.tasks.generate.cached_text import Reading
from pipeload.tasks.generate.drafts import Drafter, DraftLength
from pipeload.tasks.generate.own_draft import OwnDraft
from pipeload.tasks.generate.sampling import Scores
from pipeload.tasks.generate.sequence import GrowingSequence
from pipeload.tasks.generate.streaming import Streamer, TextStream
from pipeload.tasks.runner import State

__all__ = ["extend", "extend_with_drafts"]


def extend(reading: Reading[State], sequences: Sequence[GrowingSequence], streamer: Streamer | None) -> None:
    """Add a token a pass to each sequence until all have ended, or the reader has closed its stream."""
    longest = max(len(sequence.ids) for sequence in sequences)
    padding = [longest - len(sequence.ids) for sequence in sequences]
    top = sequences[0].chooser.top
    while (running := [one for one in sequences if one.finish_reason is None]) and not _closed(streamer):
        made = reading.scores([one.ids for one in sequences], padding=padding, positions=1, top=top)
        for sequence, scores in zip(sequences, made, strict=True):
            if sequence in running:
                _push(sequence, scores, (), streamer)


def extend_with_drafts(
    reading: Reading[State],
    sequence: GrowingSequence,
    drafter: Drafter,
    most: int,
    streamer: Streamer | None,
    own: OwnDraft | None = None,
) -> None:
    """The same for one sequence, whose passes check drafts of at most this many tokens; `own` learns from them."""
    length, wrong = own.length(DraftLength) if own else DraftLength(), 0
    while sequence.finish_reason is None and not _closed(streamer):
        begin_s = time.perf_counter()
        count = length.choose(min(most, sequence.tokens_left - 1))
        draft: list[int] = []
        try:
            draft = drafter.propose(sequence.ids, count, sequence.chooser) if count else []
        except DeadlineError:
            raise
        except PipeloadError as error:
            # A draft only speeds the text up: its failure must not end the text.
            warnings.warn(f"The text goes on without drafts, since the draft model failed: {error}", stacklevel=2)
            most = 0
        # The first pass of either model also reads the prompt.
        if sequence.sweeps:
            length.drafted(len(draft), time.perf_counter() - begin_s)
        passes = reading.decoder.stats.passes
        (scores,) = reading.scores(
            [[*sequence.ids, *draft]], padding=[0], positions=len(draft) + 1, top=sequence.chooser.top
        )
        accepted = _push(sequence, scores, draft, streamer)
        wrong += accepted < len(draft) and sequence.finish_reason is None
        if sequence.sweeps > 1:
            length.checked(len(draft), accepted)
            stats = reading.decoder.stats
            # A sweep of other callers, or one shared with them, says nothing about this text alone.
            if (last := stats.last) and stats.passes == passes + 1 and last.calls == 1:
                computed_s = last.agents["inference"].kinds.get("run", 0.0)
                length.timed(len(draft) + 1, read_s=last.read_s, computed_s=computed_s)
    if own:
        own.learn(length, sequence.accepted, wrong)


def _push(sequence: GrowingSequence, scores: Sequence[Scores], draft: Sequence[int], streamer: Streamer | None) -> int:
    """Choose tokens while they match the draft, and one more; their text goes to the streamer."""
    sequence.sweeps += 1
    sequence.drafted += len(draft)
    accepted = 0
    for place, one in enumerate(scores):
        piece = sequence.push(one)
        if piece and streamer is not None:
            streamer(piece)
        if place == len(draft) or sequence.ids[-1] != draft[place]:
            break
        accepted += 1
        if sequence.finish_reason is not None or _closed(streamer):
            break
    sequence.accepted += accepted
    return accepted


def _closed(streamer: Streamer | None) -> bool:
    return isinstance(streamer, TextStream) and streamer.closed
