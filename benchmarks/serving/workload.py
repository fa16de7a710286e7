"""What clients ask: conversations of one question, and texts to embed, drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["PARTS", "QUESTIONS", "TEXTS", "Asked", "Kind", "asked", "chat_body"]

Kind = Literal["chat", "embeddings"]

PARTS: dict[str, tuple[Kind, ...]] = {
    "chat": ("chat",),
    "chat-fp32": ("chat",),
    "embeddings": ("embeddings",),
    "embeddings-large": ("embeddings",),
    "mixed": ("chat", "embeddings"),
}
"""Name of a part -> kinds of requests, which come equally often."""

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "How does a kettle know that the water boils?",
    "Write one sentence about the sea.",
    "Why is the sky blue?",
    "Give me a recipe for bread in two sentences.",
    "What does a librarian do all day?",
    "Explain what a prime number is, and give the first five of them.",
    "Which planet is the largest one?",
    "Translate 'good morning' into Spanish.",
    "A train leaves at noon and travels for three hours at 80 km/h. How far does it come?",
    "What should I pack for a week in the mountains in October?",
)
ANSWER_TOKENS = (8, 16, 32)
_SENTENCES = (
    "The harbour was quiet when the first boat came in.",
    "Transformers read a text all at once and weigh each word against the others.",
    "She kept the letters in a tin box under the stairs.",
    "Memory is the scarcest thing on a small board.",
    "Bread needs flour, water, salt and time.",
    "The committee met on Tuesday, argued until midnight and decided nothing at all.",
    "A bridge that is not maintained is a promise to the river.",
    "Rain fell on the fields for nine days.",
)
TEXTS = tuple(
    " ".join(_SENTENCES[(first + step) % len(_SENTENCES)] for step in range(count))
    for count in (1, 2, 4)
    for first in range(len(_SENTENCES))
)
"""24 texts of 8 to 60 words."""
_TEXTS_A_REQUEST = (1, 1, 1, 8)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Attributes:
        kind: of the request.
        path: its route.
        body: its fields.
        indices: the question in `QUESTIONS`, or the texts in `TEXTS`.
    """

    kind: Kind
    path: str
    body: dict[str, Any]
    indices: tuple[int, ...]


def asked(kinds: tuple[Kind, ...], seed: int) -> Iterator[Asked]:
    """Requests without an end, the same for a seed."""
    chance = random.Random(seed)
    while True:
        if chance.choice(kinds) == "chat":
            index = chance.randrange(len(QUESTIONS))
            yield Asked("chat", "/v1/chat/completions", chat_body(index, chance.choice(ANSWER_TOKENS)), (index,))
        else:
            indices = tuple(chance.randrange(len(TEXTS)) for _ in range(chance.choice(_TEXTS_A_REQUEST)))
            body = {"model": "minilm", "input": [TEXTS[index] for index in indices]}
            yield Asked("embeddings", "/v1/embeddings", body, indices)


def chat_body(index: int, tokens: int) -> dict[str, Any]:
    """A question, answered greedily and as a stream."""
    return {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": QUESTIONS[index]}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
