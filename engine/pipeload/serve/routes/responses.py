"""`/v1/responses`: texts."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pipeload.serve.admission import Place
from pipeload.serve.bodies.chat import Message
from pipeload.serve.bodies.generation import Choosing
from pipeload.serve.bodies.responses import (
    OutputMessage,
    OutputText,
    ResponseAnswer,
    ResponseEvent,
    ResponsesRequest,
    ResponseUsage,
)
from pipeload.serve.errors import ApiError
from pipeload.serve.generation import Answers, generated
from pipeload.serve.models import Served
from pipeload.serve.reading import read, refuse
from pipeload.serve.routes.chat import messages_of
from pipeload.serve.routes.desk import Desk, DeskRoute, counted, json_response, new_id
from pipeload.serve.sampling import Order, order_of
from pipeload.serve.sse import event

if TYPE_CHECKING:
    from pipeload.model import Model

__all__ = ["routes"]

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "text": ({"format": {"type": "text"}}, {}),
    "reasoning": ({"effort": "none"}, {}),
    "include": ([],),
    "truncation": ("disabled",),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "image": (),
    "moderation": (),
    "access_programs": (),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "top_logprobs": (0,),
    "max_tool_calls": (),
}


def routes(desk: Desk) -> list[DeskRoute]:
    """The routes of this module."""
    return [DeskRoute("/v1/responses", responses, desk, takes=ResponsesRequest, gives=ResponseAnswer)]


async def responses(desk: Desk, request: Request) -> Response:
    """Answer a text or a conversation."""
    body = await read(request, ResponsesRequest)
    refuse(body, _NEUTRAL)
    messages = _messages(body)
    served = desk.models.find(body.model, ("text-generation",))
    begun = ResponseAnswer(
        id=new_id("resp"),
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model or served.name,
        temperature=body.temperature,
        top_p=body.top_p,
    )

    async def ordered(place: Place, model: Model) -> Order:
        return await place.run(
            lambda: order_of(
                model,
                Choosing(temperature=body.temperature, top_p=body.top_p),
                [model.chat_prompt(messages)],
                max_tokens=body.max_output_tokens,
                logprobs=False,
                top_logprobs=0,
            )
        )

    async def events(place: Place, model: Model) -> AsyncGenerator[bytes, None]:
        return _events(desk, request, served, place, model, await ordered(place, model), begun)

    if body.stream:
        return await desk.stream(request, served, events)
    async with desk.call(request, served) as (place, model):
        order = await ordered(place, model)
        answers = Answers()
        async for _ in generated(place, served, model, order, desk.metrics, answers):
            pass
    return json_response(_ended(begun, answers, new_id("msg"), request))


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    turns = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        return messages_of([*turns, Message(role="user", content=body.input)], "input")
    for index, item in enumerate(body.input):
        if item.type != "message" or item.role is None:
            raise ApiError(400, f"Input {index} has the type '{item.type:.40}'; only messages are read.", param="input")
        turns.append(Message(role=item.role, content=item.content))
    return messages_of(turns, "input")


def _ended(begun: ResponseAnswer, answers: Answers, item_id: str, request: Request) -> ResponseAnswer:
    (one,) = answers.results
    status: Any = "incomplete" if one.finish_reason == "length" else "completed"
    counts = counted(request, answers)
    usage = ResponseUsage(
        input_tokens=counts.prompt_tokens,
        input_tokens_details=counts.prompt_tokens_details,
        output_tokens=counts.completion_tokens,
        total_tokens=counts.total_tokens,
    )
    return msgspec.structs.replace(
        begun,
        status=status,
        incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
        output=[OutputMessage(id=item_id, status=status, content=[OutputText(text=one.text or "")])],
        usage=usage,
    )


async def _events(
    desk: Desk, request: Request, served: Served, place: Place, model: Model, order: Order, begun: ResponseAnswer
) -> AsyncGenerator[bytes, None]:
    number, item_id, answers, began = 0, new_id("msg"), Answers(), False
    at: dict[str, Any] = {"item_id": item_id, "output_index": 0, "content_index": 0}

    def made(kind: str, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        return event(ResponseEvent(type=f"response.{kind}", sequence_number=number - 1, **fields), f"response.{kind}")

    def beginning() -> bytes:
        item = OutputMessage(id=item_id, status="in_progress", content=[])
        return b"".join(
            (
                made("created", response=begun),
                made("in_progress", response=begun),
                made("output_item.added", output_index=0, item=item),
                made("content_part.added", part=OutputText(text=""), **at),
            )
        )

    async for token in generated(place, served, model, order, desk.metrics, answers):
        if not began:
            began = True
            yield beginning()
        if token.text:
            yield made("output_text.delta", delta=token.text, logprobs=[], **at)
    ended = _ended(begun, answers, item_id, request)
    (item,) = ended.output
    (part,) = item.content
    yield made("output_text.done", text=part.text, logprobs=[], **at)
    yield made("content_part.done", part=part, **at)
    yield made("output_item.done", output_index=0, item=item)
    yield made(ended.status, response=ended)
