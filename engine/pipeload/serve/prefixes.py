"""KV caches of texts that have ended, for requests that begin as they do.

A text goes to the request with it: what both have in common is not computed again, and the rest is forgotten. The
caches lie in memory that nothing else wants: a pass that needs more than the plan has beside its weights takes it
first; the texts that were used the longest time ago go before others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from pipeload.errors import BudgetError

if TYPE_CHECKING:
    from pipeload.decode import DecodeState
    from pipeload.model import Model
    from pipeload.tasks.generate.options import GenerationOptions
    from pipeload.tasks.generate.sequence import Generation
    from pipeload.tasks.generate.session import Session

    Text: TypeAlias = Session[DecodeState]

__all__ = ["Prefixes"]

_BUDGET_SHARE = 0.25
"""The caches take at most this fraction of the budget, unless the user sets another limit."""
_LEAST_SHARE = 0.5
"""A text with a smaller part in common stays for the conversation that it is of."""


class Prefixes:
    """The texts of one model. May be used from any thread.

    Args:
        most_bytes: the most that their caches may take; 0 keeps none, None takes a fraction of the budget.

    Attributes:
        hits: requests that have found a beginning of theirs.
        reused_tokens: tokens that these have not computed again.
    """

    def __init__(self, most_bytes: int | None) -> None:
        self._given_bytes = most_bytes
        self._most_bytes = 0
        self._lock = threading.Lock()
        self._model: Model | None = None
        # The one that was used the longest time ago first.
        self._texts: list[Text] = []
        self._running = 0
        self.hits = self.reused_tokens = 0

    def begin(self, model: Model) -> None:
        """The model has been opened."""
        share = int(model.plan.budget_bytes * _BUDGET_SHARE)
        self._most_bytes = share if self._given_bytes is None else self._given_bytes
        if self._most_bytes and model.keeps_beginnings:
            self._model = model
            model.give_back = self.give_back

    def end(self) -> None:
        """The model is about to be closed."""
        self._model = None
        self.give_back(self.nbytes)

    @property
    def entries(self) -> int:
        """The number of texts."""
        return len(self._texts)

    @property
    def nbytes(self) -> int:
        """Bytes of their caches."""
        return sum(text.nbytes for text in self._texts[:])

    def give_back(self, nbytes: int) -> None:
        """Give up texts until their caches had this many bytes, or none is left."""
        with self._lock:
            while nbytes > 0 and self._texts:
                text = self._texts.pop(0)
                nbytes -= text.nbytes
                text.close()

    def generate(
        self,
        model: Model,
        prompts: list[list[int]],
        drawn: int,
        options: GenerationOptions,
        told: Callable[[int], object],
    ) -> list[Generation]:
        """`model.generate`, from the longest beginning that a text here has in common with the only prompt.

        Args:
            model: the model.
            prompts: token ids of each. Several, or several answers to one, share no beginning.
            drawn: answers to each prompt.
            options: of `generate`.
            told: called with the number of tokens that are not computed again.
        """
        own = model.own_draft
        if self._model is not model or len(prompts) > 1 or drawn > 1 or (own is not None and own.model is not None):
            return model.generate(prompts, num_return_sequences=drawn, **options)
        while True:
            text, common = self._take(model, prompts[0])
            told(common)
            kept = False
            try:
                result = text.generate(prompts[0], **options)
                kept = True
                break
            except BudgetError:
                # The budget has become smaller than the plan. Nothing was told before the first pass.
                if not self._texts or len(text.token_ids) >= len(prompts[0]):
                    raise
                self.give_back(self.nbytes)
            finally:
                self._keep(model, text, kept=kept)
        if common:
            with self._lock:
                self.hits += 1
                self.reused_tokens += common
        return [result]

    def _take(self, model: Model, prompt: Sequence[int]) -> tuple[Text, int]:
        """A text to go on with, and the number of its tokens that the prompt begins with; else a new one, and 0."""
        with self._lock:
            self._running += 1
            found = [(_common(text.token_ids, prompt), place) for place, text in enumerate(self._texts)]
            common, place = max(found, default=(0, 0))
            text = None
            if common and common >= _LEAST_SHARE * len(self._texts[place].token_ids):
                text = self._texts.pop(place)
        if model.plan.streamed_bytes:
            # Weights would have the memory of the others, while texts are generated.
            self.give_back(self.nbytes)
        return (text, common) if text is not None else (model.session(), 0)

    def _keep(self, model: Model, text: Text, *, kept: bool) -> None:
        with self._lock:
            self._running -= 1
            alone = not (model.plan.streamed_bytes and self._running)
            if kept and alone and self._model is model and text.nbytes <= self._most_bytes:
                self._texts.append(text)
                text = None  # type: ignore[assignment]
        if text is not None:
            text.close()
        self.give_back(self.nbytes - self._most_bytes)


def _common(held: Sequence[int], prompt: Sequence[int]) -> int:
    """The number of tokens that both begin with; the last one of the prompt is always computed."""
    most = min(len(held), len(prompt) - 1)
    return next((place for place in range(most) if held[place] != prompt[place]), most)
