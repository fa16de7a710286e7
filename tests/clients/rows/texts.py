"""Fields of `/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from tests.clients.rows.row import Row, cannot, nothing, refuses, works

__all__ = ["CHAT", "CHAT_BASE", "CHAT_ROWS", "COMPLETIONS", "COMPLETION_ROWS", "SAID", "SCHEMA", "TOOL"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAID = "What is the capital of France?"
_USER = {"role": "user", "content": SAID}
CHAT_BASE: Mapping[str, Any] = {"model": "chat", "messages": [_USER], "max_completion_tokens": 8}
_BASE: Mapping[str, Any] = {"model": "chat", "prompt": "The capital", "max_tokens": 8, "temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}},
    "required": ["kind"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "feed", "description": "Feeds it.", "parameters": SCHEMA}}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "feed", "arguments": '{"kind": "cat"}'}}
_NAMED = {"type": "function", "function": {"name": "feed"}}
# Without penalties, one of these tokens comes each time.
_LIKELY = {"logit_bias": {"500": 12, "501": 12}}


def _choosing(route: str, base: Mapping[str, Any], limit: str) -> list[Row]:
    """Fields of both routes.

    Args:
        route: one of them.
        base: its base.
        limit: its field for the most tokens of an answer.
    """
    take, refuse = partial(works, route, base), partial(refuses, route, base)
    drawn: dict[str, Any] = {"temperature": 1.5, "seed": 3}
    two = {limit: 2}
    return [
        take("model", "gpt-4o-mini", "a name or an alias", lambda a, _: a.body["model"] == "gpt-4o-mini"),
        refuse("model", "gpt-5", "404: it is not here", "There is no model 'gpt-5' here", status=404),
        take("temperature", 1.5, "draws", lambda a, b: a.texts != b.texts, seed=3),
        take("temperature", 0, "takes the likeliest tokens", lambda a, b: a.same(b)),
        take("top_p", 1e-6, "draws of fewer tokens", lambda a, b: a.same(b), **drawn),
        take("top_k", 1, "draws of fewer tokens", lambda a, b: a.same(b), **drawn),
        take("min_p", 1.0, "draws of fewer tokens", lambda a, b: a.same(b), **drawn),
        take("repetition_penalty", 50.0, "fewer tokens of the text", lambda a, b: a.texts != b.texts),
        take(
            "presence_penalty",
            2,
            "fewer tokens of the answer",
            lambda a, _: {*a.words} == {"w500", "w501"},
            **_LIKELY,
            **two,
        ),
        take(
            "frequency_penalty",
            2,
            "fewer tokens of the answer",
            lambda a, _: {*a.words} == {"w500", "w501"},
            **_LIKELY,
            **two,
        ),
        take("logit_bias", {"500": 100}, "adds to logits", lambda a, _: {*a.words} == {"w500"}),
        take("seed", 3, "draws that can be repeated", lambda a, b: a.texts != b.texts, temperature=1.5),
        take("n", 2, "answers", lambda a, _: len(a.texts) == 2),
        refuse("n", 17, "more than 16 answers", "from 1 to 16"),
        take("stop", "w50", "ends before it", lambda a, _: a.texts == [" "], logit_bias={"500": 100}),
        take("stop", ["w50", "x"], "ends before one of them", lambda a, _: a.texts == [" "], logit_bias={"500": 100}),
        take("stream", True, "comes as events", lambda a, b: len(a.events) > 1 and a.texts == b.texts),
        take(
            "stream_options",
            {"include_usage": True},
            "usage in the last event",
            lambda a, b: a.usage["total_tokens"] == b.usage["total_tokens"],
            stream=True,
        ),
        take(
            "stream_options",
            {"include_obfuscation": False},
            "no effect: events are not padded",
            lambda a, b: a.texts == b.texts,
            stream=True,
        ),
        *nothing(route, base, user="me"),
        refuse("colour", "red", "an unknown field", "unknown field `colour`"),
    ]


def _chat_rows() -> list[Row]:
    take, refuse = partial(works, CHAT, CHAT_BASE), partial(refuses, CHAT, CHAT_BASE)
    sixty = {"max_completion_tokens": 60}

    def messages(effect: str, *turns: Any) -> Row:
        return take("messages", [*turns], effect, lambda a, b: a.prompt_tokens > b.prompt_tokens)

    def part(kind: str, effect: str, content: Any) -> Row:
        turns = [{"role": "user", "content": [{"type": kind, kind: content}]}]
        return refuse("messages", turns, effect, f"has a part of type '{kind}'")

    return [
        messages("role `system`", {"role": "system", "content": "Be brief."}, _USER),
        messages("role `developer`, as `system`", {"role": "developer", "content": "Be brief."}, _USER),
        messages("role `assistant`", _USER, {"role": "assistant", "content": "Paris."}, _USER),
        messages(
            "`tool_calls`, and role `tool`",
            _USER,
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "It is fed."},
        ),
        take("messages", [_USER | {"name": "anna"}], "`name`, for the chat template", lambda a, b: a.same(b)),
        take(
            "messages",
            [{"role": "user", "content": [{"type": "text", "text": SAID}]}],
            "parts of type `text`",
            lambda a, b: a.same(b),
        ),
        part("image_url", "images: models read text", {"url": "data:image/png;base64,AA=="}),
        part("input_audio", "audio: models read text", {"data": "AA==", "format": "wav"}),
        part("file", "files: models read text", {"filename": "x.pdf", "file_data": "data:application/pdf;base64,AA=="}),
        refuse(
            "messages",
            [_USER, {"role": "function", "name": "feed", "content": "x"}],
            "role `function`: `tool` has replaced it",
            "'function'",
            param="messages[1].role",
        ),
        take("max_completion_tokens", 3, "at most so long", lambda a, _: a.usage["completion_tokens"] == 3),
        take(
            "max_tokens",
            3,
            "the older name",
            lambda a, _: a.usage["completion_tokens"] == 3,
            max_completion_tokens=None,
        ),
        *_choosing(CHAT, CHAT_BASE, "max_completion_tokens"),
        take("logprobs", True, "of each token", lambda a, _: len(a.logprobs) == 8),
        take(
            "top_logprobs",
            2,
            "in the place of each token",
            lambda a, _: all(len(one["top_logprobs"]) == 2 for one in a.logprobs),
            logprobs=True,
        ),
        refuse("top_logprobs", 21, "more than 20", "from 0 to 20", logprobs=True),
        take(
            "response_format",
            {"type": "text"},
            "free text",
            lambda a, _: a.texts == [" "],
            stop="w50",
            logit_bias={"500": 100},
        ),
        take("response_format", {"type": "json_object"}, "JSON", lambda a, _: a.texts[0].startswith("{"), **sixty),
        take(
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}},
            "JSON of this schema",
            lambda a, _: json.loads(a.texts[0])["kind"] in ("cat", "dog"),
            **sixty,
        ),
        refuse(
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "colour"}}},
            "a schema that nothing can meet",
            "No answer can follow response_format",
        ),
        take("tools", [TOOL], "functions that may be called", lambda a, b: a.prompt_tokens > b.prompt_tokens),
        refuse(
            "tools",
            [{"type": "custom", "custom": {"name": "feed"}}],
            "tools of type `custom`: arguments are JSON",
            "'custom'",
            param="tools[0].type",
        ),
        take("tool_choice", "none", "no call", lambda a, b: a.same(b), tools=[TOOL]),
        take("tool_choice", "auto", "a call, or none", lambda a, b: a.prompt_tokens > b.prompt_tokens, tools=[TOOL]),
        take(
            "tool_choice",
            "required",
            "one call",
            lambda a, _: [one["name"] for one in a.calls] == ["feed"],
            tools=[TOOL],
            **sixty,
        ),
        take(
            "tool_choice",
            _NAMED,
            "a call of it",
            lambda a, _: [one["name"] for one in a.calls] == ["feed"],
            tools=[TOOL],
            **sixty,
        ),
        refuse(
            "tool_choice",
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [_NAMED]}},
            "a choice of some tools: send only those",
            "'allowed_tools'",
            param="tool_choice.type",
            tools=[TOOL],
        ),
        refuse(
            "tool_choice",
            {"type": "custom", "custom": {"name": "feed"}},
            "tools of type `custom`: arguments are JSON",
            "'custom'",
            param="tool_choice.type",
            tools=[TOOL],
        ),
        take(
            "parallel_tool_calls",
            False,
            "at most one call",
            lambda a, b: a.prompt_tokens > b.prompt_tokens and len(a.calls) < 2,
            tools=[TOOL],
        ),
        *cannot(
            CHAT,
            CHAT_BASE,
            "`tools` has replaced it",
            functions=[{"name": "feed", "parameters": SCHEMA}],
            function_call={"name": "feed"},
        ),
        *nothing(CHAT, CHAT_BASE, "answers are text", modalities=["text"]),
        *cannot(
            CHAT,
            CHAT_BASE,
            "answers are text",
            modalities=["text", "audio"],
            audio={"voice": "alloy", "format": "wav"},
        ),
        *nothing(CHAT, CHAT_BASE, "no thoughts", reasoning_effort="none"),
        *cannot(CHAT, CHAT_BASE, "models have no levels of thought", reasoning_effort="high"),
        *nothing(CHAT, CHAT_BASE, "as long as the model likes", verbosity="medium"),
        *cannot(CHAT, CHAT_BASE, "models have no levels of length", verbosity="low"),
        *cannot(
            CHAT, CHAT_BASE, "no text is taken from the request", prediction={"type": "content", "content": "Paris"}
        ),
        *cannot(CHAT, CHAT_BASE, "the server calls no other", web_search_options={"search_context_size": "low"}),
        *cannot(CHAT, CHAT_BASE, "no model here judges texts", moderation={"model": "omni-moderation-latest"}),
        *nothing(
            CHAT,
            CHAT_BASE,
            metadata={"a": "b"},
            store=True,
            service_tier="flex",
            safety_identifier="me",
            prompt_cache_key="me",
        ),
        *nothing(
            CHAT,
            CHAT_BASE,
            "no effect: texts are kept while there is memory",
            prompt_cache_retention="24h",
            prompt_cache_options={"mode": "implicit", "ttl": "30m"},
        ),
    ]


def _completion_rows() -> list[Row]:
    take, refuse = partial(works, COMPLETIONS, _BASE), partial(refuses, COMPLETIONS, _BASE)
    return [
        take("prompt", "The capital of France", "a text", lambda a, b: a.prompt_tokens > b.prompt_tokens),
        take("prompt", ["The capital", "A cat"], "several texts", lambda a, _: len(a.texts) == 2),
        take("prompt", [500, 501, 502], "token ids", lambda a, _: a.prompt_tokens == 3),
        take("prompt", [[500, 501], [502]], "token ids of several texts", lambda a, _: len(a.texts) == 2),
        take("max_tokens", 3, "at most so long", lambda a, _: a.usage["completion_tokens"] == 3),
        *_choosing(COMPLETIONS, _BASE, "max_tokens"),
        take(
            "logprobs",
            2,
            "of each token, and in its place",
            lambda a, _: [len(one) for one in a.choices[0]["logprobs"]["top_logprobs"]] == [2] * 8,
        ),
        refuse("logprobs", 21, "more than 20", "from 0 to 20"),
        *nothing(COMPLETIONS, _BASE, "one answer is made for each", best_of=1),
        *cannot(COMPLETIONS, _BASE, "answers are not compared: use `n`", best_of=2),
        *nothing(COMPLETIONS, _BASE, "answers without the prompt", echo=False),
        *cannot(COMPLETIONS, _BASE, "put the prompt before the answer", echo=True),
        *cannot(COMPLETIONS, _BASE, "models go on, and fill no gaps", suffix="."),
    ]


CHAT_ROWS = _chat_rows()
COMPLETION_ROWS = _completion_rows()
