"""curl and OpenAI's client, which send a request; LangChain's classes are in `langchain.py`."""

from __future__ import annotations

import inspect
import json
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from tests.clients.rows.inputs import EMBEDDINGS
from tests.clients.rows.responses import RESPONSES
from tests.clients.rows.texts import CHAT, COMPLETIONS

__all__ = ["Refused", "call_curl", "call_openai", "openai_client", "told"]

_PATIENCE_S = 60


class Refused(Exception):  # noqa: N818 - what was expected, mostly
    """A client has told its caller of an error.

    Args:
        status: of HTTP.
        error: of the answer.
    """

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        super().__init__(error["message"])
        self.status, self.error = status, error


def call_curl(address: str, route: str, body: Mapping[str, Any]) -> bytes:
    """What curl prints. Raises Refused."""
    command = ["curl", "--silent", "--show-error", "--no-buffer", "--write-out", "\n%{http_code}", address + route]
    command += ["-H", "Content-Type: application/json", "--data-binary", "@-"]
    done = subprocess.run(
        command, input=json.dumps(body).encode(), capture_output=True, timeout=_PATIENCE_S, check=True
    )
    answer, _, status = done.stdout.rpartition(b"\n")
    if status != b"200":
        raise Refused(int(status), json.loads(answer)["error"])
    return answer


@cache
def openai_client(url: str) -> Any:
    """OpenAI's client, which retries nothing. One for all calls: each would read the system's certificates."""
    import openai

    return openai.OpenAI(base_url=url, api_key="unused", max_retries=0)


def call_openai(address: str, route: str, body: Mapping[str, Any]) -> list[str]:
    """The texts that the client makes of an answer. Raises Refused."""
    import openai

    client = openai_client(f"{address}/v1")
    methods: Mapping[str, Callable[..., Any]] = {
        CHAT: client.chat.completions.create,
        COMPLETIONS: client.completions.create,
        RESPONSES: client.responses.create,
        EMBEDDINGS: client.embeddings.create,
    }
    try:
        if route not in methods:
            client.post(f"{address}{route}", body=dict(body), cast_to=object)
            return []
        create = methods[route]
        own = inspect.signature(create).parameters
        others = {name: value for name, value in body.items() if name not in own}
        made = create(**{name: value for name, value in body.items() if name in own}, extra_body=others)
        return _openai_texts(list(made) if body.get("stream") else [made])
    except openai.APIStatusError as error:
        raise told(error) from error


def told(error: Any) -> Refused:
    """What an error of OpenAI's client says."""
    return Refused(error.status_code, error.body)


def _openai_texts(made: list[Any]) -> list[str]:
    if hasattr(made[-1], "response"):
        return [made[-1].response.output_text]
    if hasattr(made[-1], "output_text"):
        return [made[-1].output_text]
    texts: dict[int, str] = {}
    for choice in (choice for one in made for choice in getattr(one, "choices", ())):
        said = getattr(choice, "message", None) or getattr(choice, "delta", None)
        text = (choice.text if said is None else said.content) or ""
        texts[choice.index] = texts.get(choice.index, "") + text
    return [texts[index] for index in sorted(texts)]
