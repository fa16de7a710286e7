"""Requests of every strange form, made from valid ones by a seed."""

from __future__ import annotations

import json
import random
from typing import Any

__all__ = ["BODIES", "damaged", "strange"]

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "chat",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 2,
        "temperature": 0.5,
        "stop": ["x"],
        "logprobs": True,
        "top_logprobs": 1,
        "n": 2,
        "seed": 1,
        "stream": True,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logit_bias": {"5": 1.0},
    },
    "/v1/completions": {"model": "chat", "prompt": [5, 6], "max_tokens": 2, "top_p": 0.9, "top_k": 3, "logprobs": 1},
    "/v1/responses": {"model": "chat", "input": [{"role": "user", "content": "Hi"}], "max_output_tokens": 2},
    "/v1/embeddings": {"model": "embedder", "input": ["the cat", "dog"], "dimensions": 4, "encoding_format": "base64"},
    "/embed": {"inputs": ["the cat"], "truncate": True, "normalize": False, "dimensions": 3},
    "/v1/rerank": {"model": "embedder", "query": "cat", "documents": ["a", {"text": "b"}], "top_n": 1},
    "/rerank": {"query": "cat", "texts": ["a", "b"]},
    "/v1/classify": {"model": "chat", "input": [{"text": "a", "text_pair": "b"}], "top_k": 1},
    "/tokenize": {"model": "chat", "prompt": "the cat", "add_special_tokens": False},
}
_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, -(2**63), 1.5, 1e308, -1e308, "", "x", "\0", "\ud7ff", "🙂" * 50,
    [], {}, [[]], [None], [[1, -1]], [2**40], {"a": 1}, {"type": "json_object"}, {"type": "function"}, "auto",
    "x" * 5000,
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}},
]  # fmt: skip


def strange(chance: random.Random, body: Any) -> Any:
    """A body with one to three parts replaced, dropped, doubled or added."""
    made = json.loads(json.dumps(body))
    for _ in range(chance.randint(1, 3)):
        place = made
        while isinstance(place, dict | list) and place:
            key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], dict | list) and place[key] and chance.random() < 0.5:
                place = place[key]
                continue
            match chance.randint(0, 3):
                case 0:
                    del place[key]
                case 1 if isinstance(place, dict):
                    place[f"{key}x"] = place[key]
                case _:
                    place[key] = chance.choice(_VALUES)
            break
    return made


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Bytes with one to four places overwritten, cut out or grown."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        data = (
            data[:at]
            + bytes(chance.randrange(256) for _ in range(chance.randint(0, 3)))
            + data[at + chance.randint(0, 3) :]
        )
    return data
