"""Tokens as text, with their probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from pipeload.serve.bodies.chat import TokenLogprob, TopLogprob
from pipeload.tasks.generate.sequence import FinishReason, NewToken
from pipeload.tasks.text.tokenizer import Tokenizer

__all__ = ["finish_reason", "token_logprobs", "token_text"]

_PART = "\N{REPLACEMENT CHARACTER}"


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of a token by itself, special tokens too."""
    return tokenizer.decode([token_id], special=True)


def token_logprobs(tokenizer: Tokenizer, tokens: Sequence[NewToken]) -> list[TokenLogprob]:
    """The log-probabilities of tokens, and of the likeliest in the place of each."""
    made = []
    for token in tokens:
        text = token_text(tokenizer, token.token_id)
        top = [(token_text(tokenizer, other), logprob) for other, logprob in token.top_logprobs or ()]
        made.append(
            TokenLogprob(
                token=text,
                logprob=token.logprob or 0.0,
                bytes=_bytes(text),
                top_logprobs=[TopLogprob(token=one, logprob=logprob, bytes=_bytes(one)) for one, logprob in top],
            )
        )
    return made


def finish_reason(reason: FinishReason | None) -> str | None:
    """OpenAI's word for it."""
    return None if reason is None else "length" if reason == "length" else "stop"


def _bytes(text: str) -> list[int] | None:
    """None where the token is a part of a character only."""
    return None if _PART in text else list(text.encode())
