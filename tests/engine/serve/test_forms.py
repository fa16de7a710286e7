"""Answers that must be JSON fit their schema, and calls of functions their functions, whatever the model would like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.engine.serve.client import Client, settings, with_server

import pipeload
from pipeload.serve.bodies.chat import FunctionChoice, NamedFunction, Tool, ToolFunction
from pipeload.serve.guided import follow, json_grammar
from pipeload.serve.tools import Toolbox

pytest.importorskip("llguidance")

_PATH = "/v1/chat/completions"
_ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Describe a cat."}], "max_tokens": 60}
_SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}


def _formed(schema: object) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}}}


def _tool(name: str = "feed", schema: object = _SCHEMA) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "Feeds it.", "parameters": schema}}


def _fits(value: Any) -> bool:
    return value.keys() == {"kind", "age"} and value["kind"] in ("cat", "dog") and 0 <= value["age"] <= 99


def test_an_answer_fits_its_schema(chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        for fields in (
            {},
            {"temperature": 1.5, "seed": 1, "n": 3},
            {"temperature": 1, "seed": 2, "presence_penalty": 1},
        ):
            asked = _ASKED | _formed(_SCHEMA) | fields
            made = (await client.post(_PATH, asked)).json()
            assert all(choice["finish_reason"] == "stop" for choice in made["choices"])
            assert all(_fits(json.loads(choice["message"]["content"])) for choice in made["choices"])
            events = (await client.post(_PATH, asked | {"stream": True})).events()
            for choice in made["choices"]:
                own = [one["delta"] for event in events for one in event["choices"] if one["index"] == choice["index"]]
                assert "".join(each.get("content", "") for each in own) == choice["message"]["content"]

    with_server(settings(chat_model), ask)


def test_an_answer_may_be_any_object(chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        asked = _ASKED | {"response_format": {"type": "json_object"}, "max_tokens": 12, "temperature": 0}
        made = (await client.post(_PATH, asked)).json()["choices"][0]
        assert made["message"]["content"].startswith("{")
        if made["finish_reason"] == "stop":
            assert isinstance(json.loads(made["message"]["content"]), dict)

    with_server(settings(chat_model), ask)


def test_a_schema_that_nothing_can_meet_is_refused(chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        for schema, words in (
            ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
            ({"type": "colour"}, "colour"),
            ({"$ref": "http://127.0.0.1/schema"}, "does not fetch"),
            ({"$ref": "file:///etc/passwd"}, "No answer can follow"),
        ):
            answer = await client.post(_PATH, _ASKED | _formed(schema))
            assert (answer.status, answer.json()["error"]["param"]) == (400, "response_format"), answer.body
            assert words in answer.message
        refused = await client.post(_PATH, _ASKED | {"response_format": {"type": "json_schema"}})
        assert "names no schema" in refused.message
        both = await client.post(_PATH, _ASKED | _formed(_SCHEMA) | {"tools": [_tool()]})
        assert "both given" in both.message

    with_server(settings(chat_model), ask)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "feed"}}])
def test_a_call_that_must_come_fits_its_function(chat_model: Path, choice: Any) -> None:
    async def ask(client: Client) -> None:
        tools = [_tool("pet") | {}, _tool()] if isinstance(choice, dict) else [_tool()]
        asked = _ASKED | {"tools": tools, "tool_choice": choice}
        (made,) = (await client.post(_PATH, asked)).json()["choices"]
        assert made["message"]["content"] is None
        (call,) = made["message"]["tool_calls"]
        assert (call["type"], call["function"]["name"]) == ("function", "feed")
        assert _fits(json.loads(call["function"]["arguments"]))
        assert made["finish_reason"] == ("stop" if isinstance(choice, dict) else "tool_calls")
        events = (await client.post(_PATH, asked | {"stream": True})).events()
        deltas = [one["delta"] for event in events for one in event["choices"]]
        (streamed,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert streamed["function"] == call["function"]
        assert streamed["index"] == 0
        assert events[-1]["choices"][0]["finish_reason"] == made["finish_reason"]
        assert not any(delta.get("content") for delta in deltas)
        # The answer goes back, with the result of the call.
        turns = [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "Fed."},
        ]
        again = await client.post(_PATH, {**asked, "messages": _ASKED["messages"] + turns, "tool_choice": "none"})
        assert again.status == 200

    with_server(settings(chat_model), ask)


def test_an_answer_without_calls_is_text(chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        asked = _ASKED | {"tools": [_tool()], "max_tokens": 8, "temperature": 0}
        (made,) = (await client.post(_PATH, asked)).json()["choices"]
        assert "tool_calls" not in made["message"]
        events = (await client.post(_PATH, asked | {"stream": True})).events()
        text = "".join(one["delta"].get("content", "") for event in events for one in event["choices"])
        assert text == made["message"]["content"]

    with_server(settings(chat_model), ask)


def test_what_does_not_go_together_is_refused(chat_model: Path) -> None:
    async def ask(client: Client) -> None:
        for fields, words in (
            ({"tools": [_tool(), _tool()]}, "same name"),
            (
                {"tools": [_tool()], "tool_choice": {"type": "function", "function": {"name": "pet"}}},
                "'pet', which is no",
            ),
            ({"tool_choice": "required"}, "there are no tools"),
            ({"tools": [_tool(schema={"type": "colour"})], "tool_choice": "required"}, "No answer can follow tools"),
        ):
            answer = await client.post(_PATH, _ASKED | fields)
            assert (answer.status, words in answer.message) == (400, True), answer.body
        calls = [{"id": "1", "type": "function", "function": {"name": "feed", "arguments": "no"}}]
        messages = [{"role": "assistant", "tool_calls": calls}]
        assert "no JSON object" in (await client.post(_PATH, _ASKED | {"messages": messages})).message

    with_server(settings(chat_model), ask)


def _toolbox(**options: Any) -> Toolbox:
    tool = Tool(type="function", function=ToolFunction(name="feed", parameters=_SCHEMA))
    return Toolbox([tool], **{"choice": "auto", "parallel": True, **options})


_WRITTEN = '<tool_call>\n{"name": "feed", "arguments": {"kind": "cat", "age": 3}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("A cat.", "A cat.", 0),
        (f"I feed it.\n{_WRITTEN}", "I feed it.", 1),
        (_WRITTEN + _WRITTEN, None, 2),
        (_WRITTEN[:-20], _WRITTEN[:-20], 0),
        ("<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", 0),
    ],
)
def test_calls_are_found_in_a_text(text: str, content: str | None, calls: int) -> None:
    found, made = _toolbox().found(text)
    assert (found, len(made)) == (content, calls)
    assert all(_fits(json.loads(call.function.arguments)) for call in made)
    assert len({call.id for call in made}) == calls


def test_the_grammar_of_texts_with_calls_takes_them_and_no_others(chat_model: Path) -> None:
    import llguidance

    from pipeload.serve.guided import _tokenizer_of

    with pipeload.load(chat_model, "8GB") as model:
        tokenizer = _tokenizer_of(model)
        grammar = _toolbox().grammar()
        for text, taken in (
            ("A cat.", True),
            (f"I feed it. {_WRITTEN} Done.", True),
            ('<tool_call>\n{"name": "kill"', False),
            ('<tool_call>\n{"name": "feed", "arguments": {"kind": "cow"', False),
        ):
            matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
            tokens = tokenizer.tokenize_str(text)
            assert (matcher.try_consume_tokens(tokens) == len(tokens)) == taken, text


def test_one_call_ends_an_answer_that_may_have_one() -> None:
    assert _toolbox().stops == ()
    assert _toolbox(parallel=False).stops == ("</tool_call>",)
    assert _toolbox(choice=FunctionChoice(type="function", function=NamedFunction(name="feed"))).must


def test_a_rule_follows_each_sequence_of_a_batch(chat_model: Path) -> None:
    """They come one by one, and may have begun alike."""
    with pipeload.load(chat_model, "8GB") as model:
        prompt = model.chat_prompt(_ASKED["messages"])
        rule = follow(model, lambda: json_grammar(_SCHEMA, "x"), prompt_tokens=len(prompt), param="x")
        made = model.generate(
            prompt,
            max_new_tokens=60,
            do_sample=True,
            temperature=3.0,
            seed=3,
            num_return_sequences=5,
            logits_processor=[rule],
        )
    texts = [one.text for one in made]
    assert all(_fits(json.loads(text or "")) for text in texts)
    assert len(set(texts)) > 1
