"""Bodies of `/v1/responses`: texts, without tools, reasoning and stored conversations."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pipeload.serve.bodies.chat import Part
from pipeload.serve.bodies.generation import CachedTokens

__all__ = [
    "InputItem",
    "OutputMessage",
    "OutputText",
    "ResponseAnswer",
    "ResponseEvent",
    "ResponseUsage",
    "ResponsesRequest",
]

Status = Literal["in_progress", "completed", "incomplete"]


class InputItem(msgspec.Struct, kw_only=True):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    type: str = "message"


class CacheOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How OpenAI keeps beginnings of texts."""

    mode: str | None = None
    ttl: str | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text or a conversation to answer.

    Attributes:
        input: a text of the user, or the turns so far.
        model: a name of `/v1/models`; may be left out where there is one model that generates.
        instructions: go before the conversation.
        max_output_tokens: the most tokens of the answer.
        temperature, top_p, stream: as for `/v1/chat/completions`.
        metadata: comes back in the answer.
        store, user, service_tier, safety_identifier, stream_options: have no effect.
        prompt_cache_key, prompt_cache_options, prompt_cache_retention: have no effect: texts are kept while there is
            memory.
    """

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: str | None = None
    stream_options: dict[str, bool] | None = None
    parallel_tool_calls: bool | None = None
    tools: Any = None
    tool_choice: Any = None
    text: Any = None
    reasoning: Any = None
    include: Any = None
    truncation: Any = None
    background: Any = None
    background_options: Any = None
    context_management: Any = None
    image: Any = None
    moderation: Any = None
    access_programs: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    top_logprobs: Any = None
    max_tool_calls: Any = None


class OutputText(msgspec.Struct, kw_only=True):
    """A part of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str] = []
    logprobs: list[str] = []


class OutputMessage(msgspec.Struct, kw_only=True):
    """An answer."""

    id: str
    type: Literal["message"] = "message"
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningTokens(msgspec.Struct, kw_only=True, frozen=True):
    """Details of the answer's tokens."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, kw_only=True):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: CachedTokens = CachedTokens()
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int


class ResponseAnswer(msgspec.Struct, kw_only=True):
    """An answer and how it was made."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    model: str
    output: list[OutputMessage] = []
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    store: bool = False
    temperature: float | None = None
    text: dict[str, dict[str, str]] = msgspec.field(default_factory=lambda: {"format": {"type": "text"}})
    tool_choice: str = "auto"
    tools: list[str] = []
    top_p: float | None = None
    truncation: str = "disabled"
    usage: ResponseUsage | None = None


class ResponseEvent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponseAnswer | None = None
    output_index: int | None = None
    content_index: int | None = None
    item_id: str | None = None
    item: OutputMessage | None = None
    part: OutputText | None = None
    delta: str | None = None
    text: str | None = None
    logprobs: list[str] | None = None
