"""Calls of the server that a person can type, with what is right about their answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["CALLS", "Call"]

_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request.

    Attributes:
        path: its route.
        body: its JSON.
        told: the answer in a few words; raises LookupError or ValueError if the answer is wrong.
    """

    path: str
    body: dict[str, Any]
    told: Callable[[dict[str, Any]], str]

    def line(self, address: str) -> str:
        """The call for a shell."""
        return f"curl -s {address}{self.path} -H 'content-type: application/json' -d '{json.dumps(self.body)}'"

    def answer(self, address: str) -> dict[str, Any]:
        """The server's answer to the line itself, where this machine has curl.

        Raises:
            OSError: the server is not there.
            ValueError: the answer is no JSON.
            TypeError: it is no object.
        """
        if shutil.which("curl"):
            done = subprocess.run(
                ["/bin/sh", "-c", self.line(address)], capture_output=True, timeout=_TIMEOUT_S, check=False
            )
            answer = json.loads(done.stdout)
        else:
            request = urllib.request.Request(
                address + self.path, json.dumps(self.body).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                answer = json.load(response)
        if not isinstance(answer, dict):
            raise TypeError("the answer is no JSON object")
        return answer


def _vector(answer: dict[str, Any]) -> str:
    (found,) = answer["data"]
    numbers = found["embedding"]
    if len(numbers) != 384 or not all(isinstance(number, float) for number in numbers):
        raise ValueError("the embedding of all-MiniLM-L6-v2 has 384 numbers")
    return f"384 numbers, {', '.join(f'{number:.4f}' for number in numbers[:3])} ..."


def _words(answer: dict[str, Any]) -> str:
    text = answer["choices"][0]["message"]["content"]
    if not text.strip():
        raise ValueError("the answer has no text")
    return str(text)


CALLS = (
    Call(path="/v1/embeddings", body={"model": "minilm", "input": "a cat"}, told=_vector),
    Call(
        path="/v1/chat/completions",
        body={
            "model": "smollm2-135m",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 32,
        },
        told=_words,
    ),
)
