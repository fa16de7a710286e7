"""A decoder's cached part of a batch of growing texts, and its scores for the next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import numpy as np

from pipeload.errors import RunError
from pipeload.foreign import foreign_errors
from pipeload.tasks.generate.sampling import Scores, TokenIds
from pipeload.tasks.runner import Decoder, State, graph_inputs
from pipeload.tasks.text.padding import padded, position_ids

__all__ = ["Reading"]

_NOTHING: TokenIds = np.zeros((0, 0), np.int64)
_FACT, _REMEDY = "The texts could not be brought into the pipeline", "Pass fewer or shorter texts."


class Reading(Generic[State]):
    """Texts that are in the KV caches of a decoder. A text that begins as they do does not compute its beginning again.

    Args:
        decoder: reads.
        state: an empty state of the decoder; its maker closes it.
    """

    def __init__(self, decoder: Decoder[State], state: State) -> None:
        self.decoder = decoder
        self.state = state
        self._read = _NOTHING

    @property
    def tokens(self) -> TokenIds:
        """The tokens that the caches hold, padding included, `[batch, length]`."""
        return self._read[:, : self.state.length]

    def scores(
        self, rows: Sequence[Sequence[int]], *, padding: Sequence[int], positions: int, top: int | None
    ) -> list[list[Scores]]:
        """Score the tokens after each text's last positions: one pass over all tokens that are not in the caches.

        Args:
            rows: the texts. Texts that have ended stay in, because caches are one array for the whole batch.
            padding: the number of padding tokens before each text, so that texts of different lengths end together.
            positions: score this many of the last positions.
            top: see `TokenChooser`.
        """
        with foreign_errors(RunError, _FACT, _REMEDY):
            padded_rows = [[0] * before + list(row) for before, row in zip(padding, rows, strict=True)]
            width = max(map(len, padded_rows))
            texts = padded([row + row[-1:] * (width - len(row)) for row in padded_rows], fill=0, side="left")
            mask = padded([[1] * (width - before) for before in padding], fill=0, side="left")
            common = min(_common_length(self.tokens, texts), width - positions)
            self.state.truncate(common)
            self._read = texts
            new = texts[:, common:]
            inputs = graph_inputs(
                self.decoder,
                {
                    "input_ids": new,
                    "attention_mask": mask,
                    "position_ids": position_ids(mask)[:, common:],
                    "token_type_ids": np.zeros_like(new),
                },
            )
        if top is None:
            logits = self.decoder.step(inputs, self.state, positions=positions).astype(np.float32, copy=False)
            return [[Scores(one) for one in row] for row in logits]
        made = self.decoder.step_top(inputs, self.state, top, positions=positions)
        return [[Scores(one) for one in row] for row in made]


def _common_length(one: TokenIds, other: TokenIds) -> int:
    """The number of leading columns that are the same."""
    if len(one) != len(other):
        return 0
    length = min(one.shape[1], other.shape[1])
    differs = (one[:, :length] != other[:, :length]).any(axis=0)
    return int(differs.argmax()) if differs.any() else length
