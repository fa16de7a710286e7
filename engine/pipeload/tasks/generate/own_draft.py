"""A model's own draft: the copy with fewer bits that lies in its directory, open beside it under the same budget.

```
open ---- a pass of the model needs its memory, or its guesses turn out too bad ----> left out, for good
  '------ the model is closed ------------------------------------------------------> closed
```
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

from pipeload.errors import BudgetError, PipeloadError
from pipeload.planning.drafting import PIECE_TOKENS, Drafting
from pipeload.tasks.generate.cached_text import Reading
from pipeload.tasks.generate.drafts import Assistant, DraftLength
from pipeload.tasks.generate.sampling import TokenChooser
from pipeload.tasks.runner import Decoder

__all__ = ["DraftModel", "DraftRooms", "OwnDraft", "OwnGuesses"]

_ENOUGH_GUESSES = 40
"""Guesses that were right or the first wrong one of their sweep, before they are held against the plan."""
_LOGGER = logging.getLogger("pipeload")


class DraftModel(Decoder[Any], Protocol):
    """The copy, as an open model."""

    def close(self) -> None:
        """Give all memory back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRooms:
    """The memory of an open draft.

    Attributes:
        take: lets it have more of the budget; returns after the model has given that back.
        expected_bytes: memory of passes and caches, when the texts that open states expect have come.
        counted_bytes: what both plans have counted for these.
    """

    take: Callable[[int], None]
    expected_bytes: Callable[[], int]
    counted_bytes: int


class OwnDraft:
    """The draft of one open model. May be used from any thread.

    Args:
        drafting: why it is used, or left out.
        model: the open draft; None where it is left out.
        rooms: its memory; None likewise.
    """

    def __init__(self, drafting: Drafting, model: DraftModel | None = None, rooms: DraftRooms | None = None) -> None:
        self.drafting = drafting
        self._model, self._rooms = model, rooms
        self._more_bytes = 0
        self._lock = threading.Lock()
        self._length: DraftLength | None = None
        self._right = self._wrong = 0
        _LOGGER.info("%s", drafting)

    @property
    def model(self) -> DraftModel | None:
        """The open draft; None when it is left out or closed."""
        return self._model

    def make_room(self) -> None:
        """Take memory for the texts that are expected, from the model's share of the budget."""
        with self._lock:
            rooms = self._rooms
            if self._model is None or rooms is None:
                return
            more = rooms.expected_bytes() - rooms.counted_bytes - self._more_bytes
            if more <= 0:
                return
            try:
                rooms.take(more)
                self._more_bytes += more
                return
            except BudgetError as error:
                reason = f"this text does not fit beside the model. {error}"
        self.leave_out(reason)

    def length(self, new: Callable[..., DraftLength]) -> DraftLength:
        """The number of tokens to draft, as earlier texts have taught it; `new` makes the first one."""
        told = self.drafting
        if self._length is None:
            return new(acceptance=told.acceptance, draft_s=told.draft_s, read_s=told.sweep_s)
        return deepcopy(self._length)

    def learn(self, length: DraftLength, right: int, wrong: int) -> None:
        """Learn from a text that has ended: enough wrong guesses end the drafts.

        Args:
            length: as this text has taught it.
            right: guesses that were right.
            wrong: sweeps with a wrong one.
        """
        self._length = length
        with self._lock:
            self._right, self._wrong = self._right + right, self._wrong + wrong
            guesses = self._right + self._wrong
            if guesses < _ENOUGH_GUESSES:
                return
            told = self.drafting.with_acceptance(self._right / guesses)
            self._right = self._wrong = 0
        if told.used:
            self.drafting = told
        else:
            self.leave_out(f"{told.acceptance:.0%} of its guesses were right; it {told.reason}")

    def leave_out(self, reason: str) -> bool:
        """Close the draft, and let the model have its memory. Returns whether it was open."""
        with self._lock:
            model, self._model = self._model, None
        if model is None:
            return False
        told = self.drafting
        self.drafting = Drafting(used=False, reason=reason, acceptance=told.acceptance, plain_s=told.plain_s)
        _LOGGER.info("%s", self.drafting)
        model.close()
        return True

    def close(self) -> None:
        """Give all memory back. May be called again."""
        with self._lock:
            model, self._model = self._model, None
        if model is not None:
            model.close()


class OwnGuesses(Assistant[Any]):
    """The guesses of a model's own draft; none once it is left out.

    Args:
        reading: the draft's reading of one text.
        runner: the model.
        draft: the model's draft.
    """

    def __init__(self, reading: Reading[Any], runner: Decoder[Any], draft: OwnDraft) -> None:
        super().__init__(reading, runner)
        self._draft = draft

    def propose(self, ids: Sequence[int], count: int, chooser: TokenChooser) -> list[int]:
        """The draft's choices, by the sequence's own rules and random numbers."""
        if self._draft.model is not self._reading.decoder:
            return []
        try:
            read = self._reading.tokens.shape[1]
            for end in range(read + PIECE_TOKENS, len(ids), PIECE_TOKENS):
                self._reading.scores([ids[:end]], padding=[0], positions=1, top=1)
            return super().propose(ids, count, chooser)
        except BudgetError as error:
            self._draft.leave_out(f"its memory is needed. {error}")
        except PipeloadError:
            if self._draft.model is self._reading.decoder:
                raise
        return []
