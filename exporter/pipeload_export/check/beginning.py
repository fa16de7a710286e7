"""Where a difference begins: what an input has that no input with the right answer has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeload_export.check.questions import Prompt, Question

__all__ = ["Traits", "beginning"]

_MOST_NAMES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What may make an input's answer another one.

    Attributes:
        name: for messages.
        length: tokens of its longest text; 0 where there is no text.
        texts: how many there are.
        padding: the side on which a shorter text is padded; empty for none.
        cached: whether it is read token by token, over KV caches.
    """

    name: str
    length: int
    texts: int = 1
    padding: str = ""
    cached: bool = False

    @classmethod
    def of_question(cls, question: Question) -> Traits:
        """Of a single pass."""
        ids, mask = (question.inputs.get(name) for name in ("input_ids", "attention_mask"))
        padding = ""
        if question.length and mask is not None and not mask.all():
            padding = "right" if mask[:, 0].all() else "left"
        texts = len(ids) if ids is not None else 1
        return cls(name=question.name, length=question.length, texts=texts, padding=padding)

    @classmethod
    def of_prompt(cls, prompt: Prompt, new_tokens: int) -> Traits:
        """Of a text that is continued."""
        texts, length = prompt.ids.shape
        return cls(name=prompt.name, length=length + new_tokens, texts=texts, cached=True)


def beginning(case: Traits, equal: Sequence[Traits], boundaries: Mapping[int, str]) -> str:
    """A clause that tells an input with another answer from those with the right one.

    Args:
        case: the first input whose answer differs.
        equal: those before it.
        boundaries: lengths in the config -> their keys.
    """
    if not equal:
        return "the answers are different from the first on"
    longest, most = max(one.length for one in equal), max(one.texts for one in equal)
    bounds = []
    if case.length > longest:
        bounds.append(f"up to {longest} tokens")
    if case.texts > most:
        bounds.append(f"for {most} text{'s' if most > 1 else ''} at a time")
    if case.padding and case.padding not in {one.padding for one in equal}:
        bounds.append(f"without padding on the {case.padding}")
    if case.cached and not any(one.cached for one in equal):
        bounds.append("without KV caches")
    if not bounds or not case.length:
        last = ", ".join(f"'{one.name}'" for one in equal[-_MOST_NAMES:])
        return f"the answers are equal for {last}"
    # Some tables of positions begin after padding, so that a text may be a token longer than the boundary says.
    crossed = [f"{key} = {at}" for at, key in boundaries.items() if longest - 1 <= at < case.length]
    known = f"; by config.json {crossed[0]}" if crossed and case.length > longest else ""
    return f"the answers are equal {', '.join(bounds)}{known}"
