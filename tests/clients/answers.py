"""An answer of the server as it went over the wire, whatever client has asked."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

__all__ = ["Answer"]


class Answer:
    """A body of an answer, of any route.

    Args:
        data: its bytes: JSON, or server-sent events.

    Attributes:
        events: of a stream, without the mark of its end.
        body: the JSON; of a stream, its last event.
    """

    def __init__(self, data: bytes) -> None:
        self.events: list[Any] = []
        if data.startswith((b"data: ", b"event: ")):
            lines = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
            self.events = [json.loads(line) for line in lines if line != "[DONE]"]
        self.body: Any = self.events[-1] if self.events else json.loads(data)
        # The last event of `/v1/responses` has the whole answer.
        if self.events and "response" in self.body:
            self.body = self.body["response"]

    @property
    def choices(self) -> list[Any]:
        """All choices, of all events."""
        return [choice for one in self.events or [self.body] for choice in one.get("choices", ())]

    @property
    def texts(self) -> list[str]:
        """The texts of all answers."""
        if "output" in self.body:
            return ["".join(part["text"] for part in item["content"]) for item in self.body["output"]]
        texts: dict[int, str] = {}
        for choice in self.choices:
            said = choice.get("message") or choice.get("delta") or choice
            texts[choice["index"]] = texts.get(choice["index"], "") + (said.get("content") or said.get("text") or "")
        return [texts[index] for index in sorted(texts)]

    @property
    def words(self) -> list[str]:
        """Those of the first text."""
        return self.texts[0].split()

    @property
    def calls(self) -> list[Any]:
        """Functions that the answer calls."""
        said = [choice.get("message") or choice.get("delta") or {} for choice in self.choices]
        return [call["function"] for one in said for call in one.get("tool_calls") or ()]

    @property
    def logprobs(self) -> list[Any]:
        """Of the tokens of a chat's answer."""
        return [token for choice in self.choices for token in (choice["logprobs"] or {}).get("content", ())]

    @property
    def usage(self) -> dict[str, Any]:
        """Counts of tokens."""
        counts: dict[str, Any] = self.body["usage"]
        return counts

    @property
    def prompt_tokens(self) -> int:
        """Tokens that were read."""
        return int(self.usage["prompt_tokens"] if "prompt_tokens" in self.usage else self.usage["input_tokens"])

    @property
    def vectors(self) -> Any:
        """Of `/v1/embeddings` and `/embed`."""
        rows = [one["embedding"] for one in self.body["data"]] if isinstance(self.body, dict) else self.body
        return np.array(
            [np.frombuffer(base64.b64decode(one), "<f4") if isinstance(one, str) else one for one in rows], np.float32
        )

    def same(self, other: Answer) -> bool:
        """Whether two answers say the same."""
        if isinstance(self.body, dict) and "data" in self.body and "embedding" in self.body["data"][0]:
            return bool(np.allclose(self.vectors, other.vectors, atol=1e-5))
        return _said(self.body) == _said(other.body)


def _said(body: Any) -> Any:
    """A body without what is new in each answer, and numbers but for the rounding of floats."""
    if isinstance(body, dict):
        left = ("id", "created", "created_at", "prompt_tokens_details", "input_tokens_details", "model", "metadata")
        return {name: _said(value) for name, value in body.items() if name not in left}
    if isinstance(body, list):
        return [_said(one) for one in body]
    return round(body, 4) if isinstance(body, float) else body
