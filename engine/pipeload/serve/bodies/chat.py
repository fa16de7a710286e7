"""Bodies of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pipeload.serve.bodies.generation import Choosing, Usage

__all__ = [
    "ChatAnswer",
    "ChatChoice",
    "ChatChunk",
    "ChatLogprobs",
    "ChatRequest",
    "ChunkChoice",
    "CalledFunction",
    "Delta",
    "FunctionChoice",
    "Message",
    "NewToolCall",
    "Part",
    "Reply",
    "ResponseFormat",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolFunction",
    "TopLogprob",
]

FinishReason = Literal["stop", "length", "tool_calls"]


class Part(msgspec.Struct, kw_only=True):
    """A part of a message; only those of type `text` are read."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, kw_only=True):
    """A function and the arguments of its call, as JSON."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    """A call of a function in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A turn of a conversation; one of role `tool` has the result of a call."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ToolFunction(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A function that an answer may call; `parameters` is the JSON schema of its arguments, which answers follow."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """A function that an answer may call."""

    type: Literal["function"]
    function: ToolFunction


class NamedFunction(msgspec.Struct, kw_only=True):
    """The name of a function."""

    name: str


class FunctionChoice(msgspec.Struct, kw_only=True):
    """The function that the answer must call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(msgspec.Struct, kw_only=True):
    """A JSON schema that the answer follows."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Choosing, kw_only=True, forbid_unknown_fields=True):
    """A conversation to go on with, by the model's own chat template.

    Attributes:
        messages: the turns so far.
        max_tokens, max_completion_tokens: the most tokens of an answer.
        logprobs: the log-probabilities of the answer's tokens.
        top_logprobs: the likeliest tokens in the place of each, 0 to 20; needs `logprobs`.
        response_format: JSON, or JSON that fits a schema.
        tools, tool_choice, parallel_tool_calls: functions that an answer may, or must, call.
        metadata, store, service_tier, safety_identifier: have no effect.
        prompt_cache_key, prompt_cache_options, prompt_cache_retention: have no effect: texts are kept while there is
            memory.
    """

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, str] | None = None
    prompt_cache_retention: str | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    moderation: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class TopLogprob(msgspec.Struct, kw_only=True):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(msgspec.Struct, kw_only=True):
    """A token of an answer."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """The tokens of an answer."""

    content: list[TokenLogprob]
    refusal: None = None


class Reply(msgspec.Struct, kw_only=True):
    """An answer's text."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer."""

    index: int
    message: Reply
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatAnswer(msgspec.Struct, kw_only=True):
    """All answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class NewToolCall(ToolCall, kw_only=True):
    """A call of a function, whole, with its place among the calls of an answer."""

    index: int


class Delta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """New text of an answer."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[NewToolCall] | None = None


class ChunkChoice(msgspec.Struct, kw_only=True):
    """New text of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
