"""Several tokens from one sweep: guesses of the next tokens, which one pass checks all at once.

```
text ..a b c | draft d e f      one pass over c d e f chooses what follows c, d, e and f
               d e x            d and e were chosen as guessed, x was not: three tokens, f is forgotten
```

Each token is chosen by the same rule, and with the same random number, as without drafts; a draft only decides how many
tokens of a pass are useful. So the text stays the same, greedy or sampled (about rounding see docs/adr/0010).

Prompt lookup: Saxena 2023 (github.com/apoorvumang/prompt-lookup-decoding). Draft models: Leviathan et al. 2023
(arXiv 2211.17192), with draws that share their random numbers instead of a rejection.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Generic, Protocol

from pipeload.tasks.generate.cached_text import Reading
from pipeload.tasks.generate.sampling import TokenChooser
from pipeload.tasks.runner import Decoder, State, config_of

__all__ = ["Assistant", "DraftLength", "Drafter", "PromptLookup"]

_FADING = 0.9
"""The weight of earlier sweeps against the latest one: texts change."""
_MOST = 128
"""Longer drafts are not considered, even if a model's file asks for them: weighing them would outlast a pass."""
_FIRST_SLOPE = 0.25
"""Assumed cost of each further token, relative to the first, until it is measured: weights are read once."""


class Drafter(Protocol):
    """Guesses tokens."""

    def propose(self, ids: Sequence[int], count: int, chooser: TokenChooser) -> list[int]:
        """At most `count` tokens that may follow the ids; `chooser` chooses the tokens that do."""


class PromptLookup:
    """Guesses that the same tokens have the same continuation as before.

    Args:
        max_ngram: match at most this many tokens; shorter matches count only if no longer one exists.
    """

    def __init__(self, max_ngram: int) -> None:
        self._max_ngram = max_ngram
        self._indexed = 0
        self._ends: dict[int, list[int]] = {}

    def propose(self, ids: Sequence[int], count: int, chooser: TokenChooser) -> list[int]:
        """The continuation of the latest of the longest matches."""
        del chooser
        # The last token is the one to look up, so it is not indexed yet.
        for place in range(self._indexed, len(ids) - 1):
            self._ends.setdefault(ids[place], []).append(place)
        self._indexed = max(self._indexed, len(ids) - 1)
        best, size = None, 0
        for end in reversed(self._ends.get(ids[-1], ())):
            if (same := self._same(ids, end)) > size:
                best, size = end, same
            if size == self._max_ngram:
                break
        if best is None:
            return []
        # At the end of the text the copy goes on into the draft: a text that repeats itself once may do so again.
        distance, text = len(ids) - 1 - best, list(ids)
        for _ in range(count):
            text.append(text[-distance])
        return text[len(ids) :]

    def _same(self, ids: Sequence[int], end: int) -> int:
        """The number of tokens up to a place that equal the tokens at the end of the text."""
        most = min(self._max_ngram, end + 1)
        return next((size for size in range(1, most) if ids[end - size] != ids[-1 - size]), most)


class Assistant(Generic[State]):
    """Guesses the next tokens with another, smaller model.

    Args:
        reading: the smaller model's reading of one text.
        runner: the model whose tokens it guesses.
    """

    def __init__(self, reading: Reading[State], runner: Decoder[Any]) -> None:
        self._reading = reading
        mine, other = config_of(reading.decoder), config_of(runner)
        self._positions = mine.max_positions or sys.maxsize
        # Models of one family share their tokens, but round their tables up to different sizes.
        self._known = min(mine.vocab_size or sys.maxsize, other.vocab_size or sys.maxsize)

    def propose(self, ids: Sequence[int], count: int, chooser: TokenChooser) -> list[int]:
        """The smaller model's choices, by the sequence's own rules and random numbers; empty if it cannot continue."""
        if max(ids) >= self._known:
            return []
        chooser, text = chooser.ahead(), list(ids)
        for _ in range(min(count, self._positions - len(ids))):
            ((scores,),) = self._reading.scores([text], padding=[0], positions=1, top=chooser.top)
            token = scores.token(chooser.choose(text, scores))
            if token >= self._known:
                break
            text.append(token)
        return text[len(ids) :]


class DraftLength:
    """Chooses the number of tokens to draft that promises the most tokens a second, by the measured sweeps.

    A sweep that checks n tokens takes `max(R, c(n))`: R is the time for which the storage reads, and c the time for
    which the model computes, a straight line through the measured times. While the storage takes longer, checking more
    tokens costs nothing. With drafts that are right with probability a, k of them make `1 + a + .. + a^k` tokens.

    Args:
        acceptance: the probability, until drafts were checked.
        draft_s: the seconds of a draft, until it was timed.
        read_s: the seconds of a sweep, until it was timed.
    """

    def __init__(self, *, acceptance: float = 0.5, draft_s: float = 0.0, read_s: float = 0.0) -> None:
        self._right, self._wrong = 2 * acceptance, 2 * (1 - acceptance)
        self._draft_s, self._read_s = draft_s, read_s
        self._computed_s: dict[int, float] = {}

    def choose(self, most: int) -> int:
        """The number of tokens to draft, at most `most`."""
        acceptance = self._right / (self._right + self._wrong)

        def tokens_per_s(drafts: int) -> float:
            tokens = sum(acceptance**place for place in range(drafts + 1))
            return tokens / max(self.sweep_s(drafts + 1) + drafts * self._draft_s, 1e-9)

        return max(range(min(most, _MOST) + 1), key=tokens_per_s, default=0)

    def sweep_s(self, tokens: int) -> float:
        """The expected seconds of a sweep over this many tokens."""
        if not self._computed_s:
            return self._read_s or 1.0
        fewest, most = min(self._computed_s), max(self._computed_s)
        least_s = self._computed_s[fewest]
        slope = _FIRST_SLOPE * least_s / fewest
        if most > fewest:
            slope = max(0.0, (self._computed_s[most] - least_s) / (most - fewest))
        return max(self._read_s, least_s + slope * (tokens - fewest))

    def drafted(self, tokens: int, seconds: float) -> None:
        """Learn the seconds that drafting this many tokens took."""
        # Without drafts, their measured time slowly fades.
        self._draft_s = _faded(self._draft_s, seconds / tokens) if tokens else self._draft_s * _FADING

    def checked(self, drafts: int, accepted: int) -> None:
        """Learn from a sweep that has checked drafts.

        Args:
            drafts: the number of drafted tokens.
            accepted: the number of tokens before the first wrong one.
        """
        # Without drafts, their errors slowly fade, so that they get another chance.
        self._right = 1 + (self._right - 1) * _FADING + accepted
        self._wrong = 1 + (self._wrong - 1) * _FADING + (accepted < drafts)

    def timed(self, tokens: int, *, read_s: float, computed_s: float) -> None:
        """Learn from a timed sweep for this text alone.

        Args:
            tokens: the number of tokens that it computed.
            read_s: seconds for which the storage has read.
            computed_s: seconds for which the model has computed.
        """
        self._read_s = _faded(self._read_s, read_s)
        self._computed_s[tokens] = _faded(self._computed_s.get(tokens, 0.0), computed_s)


def _faded(before: float, now: float) -> float:
    return before * _FADING + now * (1 - _FADING) if before else now
