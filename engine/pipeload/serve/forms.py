"""The form of an answer in a chat: free text, JSON, or calls of functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeload.serve.bodies.chat import ChatRequest, ToolCall
from pipeload.serve.errors import ApiError
from pipeload.serve.guided import follow, json_grammar
from pipeload.serve.routes.tokens import finish_reason
from pipeload.serve.tools import TRIGGER, Toolbox
from pipeload.tasks.generate.sampling import LogitsProcessor
from pipeload.tasks.generate.sequence import FinishReason

if TYPE_CHECKING:
    from pipeload.model import Model

__all__ = ["Form"]


class Form:
    """The form that a request asks for.

    Args:
        body: the request.

    Attributes:
        must_call: the answer is a call.
        hidden_stops: texts that end the answer and belong to it.
        shown_until: text from one of these on is not shown before it is known what it is.

    Raises:
        ApiError: the request asks for what does not go together.
    """

    def __init__(self, body: ChatRequest) -> None:
        wanted = body.response_format
        self._schema: dict[str, Any] | None = None
        if wanted is not None and wanted.type == "json_object":
            self._schema = {"type": "object"}
        if wanted is not None and wanted.type == "json_schema":
            if wanted.json_schema is None or wanted.json_schema.schema is None:
                raise ApiError(
                    400, "response_format names no schema. Send json_schema.schema.", param="response_format"
                )
            self._schema = wanted.json_schema.schema
        self._tools: Toolbox | None = None
        if body.tool_choice == "none" or not body.tools:
            if body.tool_choice not in (None, "none", "auto"):
                raise ApiError(400, "tool_choice asks for a call, and there are no tools.", param="tool_choice")
        else:
            self._tools = Toolbox(body.tools, body.tool_choice, parallel=body.parallel_tool_calls is not False)
        if self._tools is not None and self._schema is not None:
            raise ApiError(400, "response_format and tools are both given. Send one of them.", param="response_format")
        self.must_call = self._tools is not None and self._tools.must
        self.hidden_stops: Sequence[str] = self._tools.stops if self._tools else ()
        self.shown_until: Sequence[str] = (TRIGGER,) if self._tools else ()

    def prompt(self, model: Model, messages: list[dict[str, Any]]) -> list[int]:
        """The token ids of the conversation."""
        return model.chat_prompt(messages) if self._tools is None else self._tools.prompt(model, messages)

    def rules(self, model: Model, prompt_tokens: int) -> list[LogitsProcessor]:
        """Rules that hold the answer to its form.

        Raises:
            ApiError: no answer can have it.
            ConfigError: llguidance is not installed.
        """
        if self._tools is not None:
            return [follow(model, self._tools.grammar, prompt_tokens=prompt_tokens, param="tools")]
        if (schema := self._schema) is not None:
            grammar = partial(json_grammar, schema, "response_format")
            return [follow(model, grammar, prompt_tokens=prompt_tokens, param="response_format")]
        return []

    def found(self, text: str) -> tuple[str | None, list[ToolCall]]:
        """The text and the calls of an answer."""
        return (text, []) if self._tools is None else self._tools.found(text)

    def finish_reason(self, reason: FinishReason | None, calls: Sequence[ToolCall]) -> str | None:
        """OpenAI's word for the end of an answer; one that had to call a function by name just stops."""
        if calls and self._tools is not None and not self._tools.named:
            return "tool_calls"
        return finish_reason(reason)
