"""What OpenAI's client and LangChain make of more than one field: parsed answers, calls of functions, conversations."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest
from tests.clients.callers import openai_client
from tests.clients.rows.texts import CHAT_BASE, SAID, TOOL
from tests.clients.wire import Wire

pytestmark = pytest.mark.xdist_group("clients")


class Animal(pydantic.BaseModel):
    """An animal."""

    kind: Any = pydantic.Field(json_schema_extra={"enum": ["cat", "dog"]})


def _chat(wire: Wire, **options: Any) -> Any:
    import langchain_openai

    url = f"{wire.address}/v1"
    shared = openai_client(url)._client
    return langchain_openai.ChatOpenAI(
        model="chat", base_url=url, api_key="unused", http_client=shared, max_retries=0, **options
    )


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_has_structured_output(wire: Wire, method: Any) -> None:
    made = _chat(wire, max_tokens=60).with_structured_output(Animal, method=method).invoke(SAID)
    assert isinstance(made, Animal)
    assert made.kind in ("cat", "dog")


def test_langchain_has_json_mode(wire: Wire) -> None:
    asked = _chat(wire, max_tokens=12).with_structured_output(None, method="json_mode", include_raw=True)
    assert asked.invoke(SAID)["raw"].text.startswith("{")
    assert wire.sent["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize("streamed", [False, True])
def test_langchain_calls_functions_and_gives_back_what_they_return(wire: Wire, streamed: bool) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    llm = _chat(wire, max_tokens=60).bind_tools([TOOL], tool_choice="feed")
    turns: list[Any] = [HumanMessage(SAID)]
    if streamed:
        pieces = [*llm.stream(turns)]
        called = pieces[0]
        for piece in pieces[1:]:
            called += piece
    else:
        called = llm.invoke(turns)
    (call,) = called.tool_calls
    assert call["name"] == "feed"
    assert call["args"]["kind"] in ("cat", "dog")
    turns += [called, ToolMessage("It is fed.", tool_call_id=call["id"])]
    assert _chat(wire, max_tokens=4).invoke(turns).usage_metadata["output_tokens"] == 4
    assert [one["role"] for one in wire.sent["messages"]] == ["user", "assistant", "tool"]


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_streams_with_usage_and_goes_on_with_its_own_answers(wire: Wire, responses: bool) -> None:
    from langchain_core.messages import HumanMessage

    llm = _chat(wire, max_tokens=4, stream_usage=True, use_responses_api=responses)
    pieces = [*llm.stream(SAID)]
    made = pieces[0]
    for piece in pieces[1:]:
        made += piece
    assert made.usage_metadata["output_tokens"] == 4
    assert made.text == llm.invoke(SAID).text
    assert llm.invoke([HumanMessage(SAID), made, HumanMessage("And of Italy?")]).usage_metadata["output_tokens"] == 4


def test_langchain_calls_without_waiting(wire: Wire) -> None:
    import asyncio

    llm = _chat(wire, max_tokens=4)

    async def both() -> list[Any]:
        return list(await asyncio.gather(llm.ainvoke(SAID), llm.ainvoke("A cat.")))

    one, other = asyncio.run(both())
    assert one.usage_metadata["output_tokens"] == other.usage_metadata["output_tokens"] == 4


def test_openai_parses_an_answer(wire: Wire) -> None:
    client = openai_client(f"{wire.address}/v1")
    made = client.chat.completions.parse(**(CHAT_BASE | {"max_completion_tokens": 60}), response_format=Animal)
    assert made.choices[0].message.parsed.kind in ("cat", "dog")


def test_openai_has_a_stream_with_events_of_its_own(wire: Wire) -> None:
    client = openai_client(f"{wire.address}/v1")
    with client.chat.completions.stream(**CHAT_BASE) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text == stream.current_completion_snapshot.choices[0].message.content
    with client.responses.stream(model="chat", input=SAID, max_output_tokens=8) as stream:
        # Its own last word is only for answers that have ended by themselves.
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == text
