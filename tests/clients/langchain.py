"""LangChain's classes for OpenAI's interface: which field of a request comes of what, and calls with all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from tests.clients.callers import openai_client, told
from tests.clients.rows.inputs import EMBEDDINGS
from tests.clients.rows.responses import RESPONSES
from tests.clients.rows.row import Row
from tests.clients.rows.texts import CHAT, COMPLETIONS

__all__ = ["call_langchain", "way", "why_not"]

_LONGEST: Mapping[str, str] = {"max_completion_tokens": "max_completion_tokens", "max_output_tokens": "max_tokens"}
"""Fields that are options under another name."""
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_CALLED: Mapping[str, Mapping[str, str]] = {
    CHAT: {"messages": "invoke()", "stream": "stream()", **dict.fromkeys(_TOOLS, "bind_tools()")},
    COMPLETIONS: {"prompt": "generate()", "stream": "stream()", "stop": "generate(stop=)"},
    RESPONSES: {"input": "invoke()", "stream": "stream()", **dict.fromkeys(_TOOLS, "bind_tools()")},
    EMBEDDINGS: {"input": "embed_documents()"},
}
"""Fields that a call brings, and no option."""
_NOT_SENT: Sequence[tuple[str, str, Any, str]] = (
    (CHAT, "max_tokens", 3, "it sends `max_completion_tokens`"),
    (CHAT, "tools", [{"type": "custom", "custom": {"name": "feed"}}], "it takes functions only"),
    (COMPLETIONS, "best_of", 1, "it leaves 1 out"),
    (
        RESPONSES,
        "input",
        [{"type": "function_call_output", "call_id": "call_1", "output": "x"}],
        "it takes messages only",
    ),
    (RESPONSES, "tools", [], "it leaves an empty list out"),
    (EMBEDDINGS, "encoding_format", "base64", "it does not decode it"),
)
"""Route, field, value, and why the class does not send it."""


def way(row: Row) -> str:
    """How a user of LangChain gives a value of a field; empty where the class of the route does not send it."""
    if row.route not in _CALLED or why_not(row):
        return ""
    if called := _CALLED[row.route].get(row.name):
        return called
    if row.name in _options(row.route):
        return f"{_LONGEST.get(row.name, row.name)}="
    return "model_kwargs=" if row.name in _known(row.route) else "extra_body="


def why_not(row: Row) -> str:
    """Why a class does not send a value; empty where it does, or where there is no class for the route."""
    if row.name in ("prompt", "input") and "token ids" in row.effect:
        return "it sends texts only"
    return next((why for *what, why in _NOT_SENT if [row.route, row.name, row.value] == what), "")


def call_langchain(address: str, route: str, body: Mapping[str, Any]) -> list[str]:
    """The texts that a class makes of an answer. Raises Refused."""
    import openai

    try:
        return _CALLS[route](f"{address}/v1", route, {name: one for name, one in body.items() if one is not None})
    except openai.APIStatusError as error:
        raise told(error) from error


@cache
def _options(route: str) -> frozenset[str]:
    """Fields of a request that are options of the class."""
    import langchain_openai
    from langchain_core.language_models import BaseChatModel, BaseLLM

    kinds: Mapping[str, tuple[Any, Any]] = {
        CHAT: (langchain_openai.ChatOpenAI, BaseChatModel),
        COMPLETIONS: (langchain_openai.OpenAI, BaseLLM),
        RESPONSES: (langchain_openai.ChatOpenAI, BaseChatModel),
    }
    if route == EMBEDDINGS:
        return frozenset({"model", "dimensions"})
    kind, base = kinds[route]
    # Options of all of LangChain's models, such as metadata, are not sent.
    return frozenset({"model", *kind.model_fields} - {*base.model_fields} | {*_LONGEST}) & _known(route)


@cache
def _known(route: str) -> frozenset[str]:
    """Arguments of the client's method that `model_kwargs` takes."""
    import openai

    client = openai.OpenAI(api_key="unused")
    methods: Mapping[str, Callable[..., Any]] = {
        CHAT: client.chat.completions.create,
        COMPLETIONS: client.completions.create,
        RESPONSES: client.responses.create,
        EMBEDDINGS: client.embeddings.create,
    }
    # LangChain has metadata of its own.
    return frozenset(inspect.signature(methods[route]).parameters) - {"metadata"}


def _class_options(url: str, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Options that bring all fields but those of calls."""
    own = {_LONGEST.get(name, name): one for name, one in body.items() if name in _options(route)}
    others = {name: one for name, one in body.items() if name not in {*_options(route), *_CALLED[route]}}
    extra = {name: one for name, one in others.items() if name not in _known(route)}
    known = {name: one for name, one in others.items() if name in _known(route)}
    if route == EMBEDDINGS:
        known |= {"extra_body": extra} if extra else {}
    elif extra:
        own["extra_body"] = extra
    shared = openai_client(url)._client
    return {"base_url": url, "api_key": "unused", "max_retries": 0, "http_client": shared, "model_kwargs": known, **own}


def _chat(url: str, route: str, body: Mapping[str, Any]) -> list[str]:
    import langchain_openai

    options = _class_options(url, route, body)
    llm: Any = langchain_openai.ChatOpenAI(**options, use_responses_api=route == RESPONSES)
    called = {name: body[name] for name in _TOOLS if name in body}
    llm = llm.bind_tools(**called) if "tools" in called else llm.bind(**called)
    asked = body["messages" if route == CHAT else "input"]
    if body.get("stream"):
        return ["".join(one.text for one in llm.stream(asked))]
    return [str(llm.invoke(asked).text)]


def _completions(url: str, route: str, body: Mapping[str, Any]) -> list[str]:
    import langchain_openai

    llm = langchain_openai.OpenAI(**_class_options(url, route, body))
    prompts, stop = _listed(body["prompt"]), body.get("stop")
    stop = [stop] if isinstance(stop, str) else stop
    if body.get("stream"):
        return ["".join(llm.stream(prompts[0], stop=stop))]
    made = llm.generate([*prompts], stop=stop)
    return [one.text for texts in made.generations for one in texts]


def _embeddings(url: str, route: str, body: Mapping[str, Any]) -> list[str]:
    import langchain_openai

    options = _class_options(url, route, body)
    langchain_openai.OpenAIEmbeddings(**options, check_embedding_ctx_length=False).embed_documents(
        [*_listed(body["input"])]
    )
    return []


def _listed(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


_CALLS = {CHAT: _chat, COMPLETIONS: _completions, RESPONSES: _chat, EMBEDDINGS: _embeddings}
