"""Functions that an answer may call: told to the model, held to their schemas, and found in its text.

A call is written as Hermes and Qwen have it, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Where a call
must come, the answer is the object alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from pipeload.serve.bodies.chat import CalledFunction, FunctionChoice, Tool, ToolCall, ToolFunction
from pipeload.serve.errors import ApiError
from pipeload.serve.guided import Call, json_grammar, text_with_calls
from pipeload.serve.routes.desk import new_id

if TYPE_CHECKING:
    from pipeload.model import Model

__all__ = ["TRIGGER", "Toolbox"]

TRIGGER = "<tool_call>"
_END = "</tool_call>"
_CALL = re.compile(rf"{TRIGGER}\s*(.*?)\s*{_END}", re.DOTALL)
_ANY = {"type": "object"}


class Toolbox:
    """The functions of a request.

    Args:
        tools: as the request names them.
        choice: `none`, `auto`, `required`, or one of them.
        parallel: whether an answer may have several calls.

    Attributes:
        must: the answer is a call.
        stops: texts after which the engine has to stop.

    Raises:
        ApiError: two have one name, or the choice is none of them.
    """

    def __init__(self, tools: Sequence[Tool], choice: str | FunctionChoice | None, *, parallel: bool) -> None:
        self.functions = [tool.function for tool in tools]
        names = [one.name for one in self.functions]
        if len(set(names)) < len(names):
            raise ApiError(400, "Two tools have the same name.", param="tools")
        self.must = choice == "required" or isinstance(choice, FunctionChoice)
        self.named = isinstance(choice, FunctionChoice)
        if isinstance(choice, FunctionChoice):
            self.callable = [one for one in self.functions if one.name == choice.function.name]
            if not self.callable:
                raise ApiError(
                    400, f"tool_choice names '{choice.function.name:.80}', which is no tool.", param="tool_choice"
                )
        else:
            self.callable = self.functions
        if self.must and not self.callable:
            raise ApiError(400, "tool_choice asks for a call, and there are no tools.", param="tool_choice")
        self.stops = () if parallel or self.must else (_END,)

    def grammar(self) -> str:
        """The grammar of answers."""
        if self.must:
            calls = [
                {
                    "type": "object",
                    "properties": {"name": {"const": one.name}, "arguments": _schema(one)},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
                for one in self.callable
            ]
            return json_grammar(calls[0] if len(calls) == 1 else {"anyOf": calls}, "tools")
        tags = [
            Call(f"{TRIGGER}\n" + '{"name": ' + _json(one.name) + ', "arguments": ', _schema(one), "}\n" + _END)
            for one in self.callable
        ]
        return text_with_calls(TRIGGER, tags, "tools")

    def prompt(self, model: Model, messages: list[dict[str, Any]]) -> list[int]:
        """The conversation with the functions, by the model's own template, or in words where it knows none."""
        described = [{"type": "function", "function": msgspec.to_builtins(one)} for one in self.functions]
        told = model.chat_prompt(messages, tools=described)
        if told != model.chat_prompt(messages):
            return told
        text = (
            "You may call these functions:\n"
            + "\n".join(_json(one) for one in described)
            + f'\nTo call one, write {TRIGGER}\n{{"name": NAME, "arguments": OBJECT}}\n{_END}'
        )
        if messages and messages[0]["role"] == "system":
            first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
            return model.chat_prompt([first, *messages[1:]])
        return model.chat_prompt([{"role": "system", "content": text}, *messages])

    def found(self, text: str) -> tuple[str | None, list[ToolCall]]:
        """The text before the calls, and the calls, in an answer. A call that was cut off is none."""
        if self.must:
            call = _call(text)
            return (None, [call]) if call else (text, [])
        calls = [call for one in _CALL.findall(text) if (call := _call(one))]
        return (text.partition(TRIGGER)[0].strip() or None, calls) if calls else (text, [])


def _schema(function: ToolFunction) -> dict[str, Any]:
    return function.parameters or _ANY


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _call(text: str) -> ToolCall | None:
    try:
        found = msgspec.json.decode(text, type=_Written)
    except msgspec.MsgspecError:
        return None
    return ToolCall(id=new_id("call"), function=CalledFunction(name=found.name, arguments=_json(found.arguments)))


class _Written(msgspec.Struct):
    name: str
    arguments: dict[str, Any]
