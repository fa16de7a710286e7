"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pipeload.serve.admission import Place
from pipeload.serve.bodies.chat import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
    Message,
    NewToolCall,
    Reply,
    ToolCall,
)
from pipeload.serve.errors import ApiError
from pipeload.serve.forms import Form
from pipeload.serve.generation import Answers, generated
from pipeload.serve.models import Served
from pipeload.serve.reading import read, refuse
from pipeload.serve.routes.desk import Desk, DeskRoute, counted, json_response, new_id
from pipeload.serve.routes.tokens import token_logprobs
from pipeload.serve.sampling import TOP_LOGPROBS, Order, order_of, within
from pipeload.serve.settings import LIMITS
from pipeload.serve.sse import DONE, event
from pipeload.serve.stops import StopCutter
from pipeload.tasks.generate.sequence import NewToken
from pipeload.tasks.text.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from pipeload.model import Model

__all__ = ["messages_of", "routes"]

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that ask for what there is not -> values that ask for nothing."""


def routes(desk: Desk) -> list[DeskRoute]:
    """The routes of this module."""
    return [DeskRoute("/v1/chat/completions", chat, desk, takes=ChatRequest, gives=ChatAnswer)]


async def chat(desk: Desk, request: Request) -> Response:
    """Go on with a conversation."""
    body = await read(request, ChatRequest)
    refuse(body, _NEUTRAL)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens differ. Send one of them.", param="max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs. Send logprobs: true.", param="top_logprobs")
    messages = messages_of(body.messages)
    form = Form(body)
    served = desk.models.find(body.model, ("text-generation",))
    identity: dict[str, Any] = {
        "id": new_id("chatcmpl"),
        "created": int(time.time()),
        "model": body.model or served.name,
    }

    async def ordered(place: Place, model: Model) -> Order:
        def work() -> Order:
            prompt = form.prompt(model, messages)
            return order_of(
                model,
                body,
                [prompt],
                max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
                logprobs=bool(body.logprobs),
                top_logprobs=within("top_logprobs", body.top_logprobs or 0, 0, TOP_LOGPROBS),
                rules=form.rules(model, len(prompt)),
                hidden_stops=form.hidden_stops,
            )

        return await place.run(work)

    async def events(place: Place, model: Model) -> AsyncGenerator[bytes, None]:
        return _events(desk, request, body, served, place, model, await ordered(place, model), identity, form)

    if body.stream:
        return await desk.stream(request, served, events)
    async with desk.call(request, served) as (place, model):
        order = await ordered(place, model)
        answers = Answers()
        told = [token async for token in generated(place, served, model, order, desk.metrics, answers)]
        choices = _choices(model, order, answers, told, form)
        del model
    usage = counted(request, answers)
    return json_response(ChatAnswer(choices=choices, usage=usage, **identity))


def messages_of(messages: Sequence[Message], name: str = "messages") -> list[dict[str, Any]]:
    """The messages as chat templates take them.

    Args:
        messages: of the request.
        name: of their field.

    Raises:
        ApiError: there is none, or one has parts that are no text.
    """
    if not messages:
        raise ApiError(400, f"{name} is an empty list. Send at least one message.", param=name)
    if len(messages) > LIMITS.messages:
        raise ApiError(400, f"{name} has {len(messages)} entries; this server takes {LIMITS.messages}.", param=name)
    made = []
    for index, message in enumerate(messages):
        content = message.content
        if isinstance(content, list):
            for part in content:
                if part.type not in ("text", "input_text", "output_text") or part.text is None:
                    raise ApiError(
                        400,
                        f"Message {index} has a part of type '{part.type:.40}'; the models here read text only.",
                        param=name,
                    )
            content = "".join(part.text or "" for part in content)
        role = "system" if message.role == "developer" else message.role
        made.append({"role": role, "content": content or ""} | _beside(message, index, name))
    return made


def _beside(message: Message, index: int, name: str) -> dict[str, Any]:
    """Other fields of a message than role and content. Templates take the arguments of calls as objects."""
    fields: dict[str, Any] = {}
    if message.name:
        fields["name"] = message.name
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    calls = []
    for call in message.tool_calls or ():
        try:
            arguments = msgspec.json.decode(call.function.arguments, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ApiError(
                400, f"Message {index} has arguments that are no JSON object: {error}.", param=name
            ) from error
        calls.append(
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
        )
    return fields | ({"tool_calls": calls} if calls else {})


def _choices(model: Model, order: Order, answers: Answers, told: Sequence[NewToken], form: Form) -> list[ChatChoice]:
    tokenizer = tokenizer_of(model)
    choices, copies = [], order.copies // order.drawn
    for index, one in enumerate(answers.results):
        cutter = StopCutter(order.stops)
        text = cutter.push(one.text or "") + cutter.flush()
        logprobs = None
        if one.logprobs is not None:
            own = [token for token in told if token.sequence == index // copies]
            logprobs = ChatLogprobs(content=token_logprobs(tokenizer, own))
        content, calls = form.found(text)
        reply = Reply(content=content, tool_calls=calls or msgspec.UNSET)
        reason: Any = form.finish_reason(one.finish_reason, calls)
        choices.append(ChatChoice(index=index, message=reply, logprobs=logprobs, finish_reason=reason))
    return choices


async def _events(
    desk: Desk,
    request: Request,
    body: ChatRequest,
    served: Served,
    place: Place,
    model: Model,
    order: Order,
    identity: dict[str, Any],
    form: Form,
) -> AsyncGenerator[bytes, None]:
    tokenizer = tokenizer_of(model)
    answers = Answers()
    cutters = [StopCutter((*order.stops, *form.shown_until)) for _ in range(order.drawn)]
    texts, shown = [""] * order.drawn, [""] * order.drawn
    copies = order.copies // order.drawn
    began = False

    def chunk(sequence: int, delta: Delta, logprobs: ChatLogprobs | None = None, reason: Any = None) -> bytes:
        places = range(sequence * copies, (sequence + 1) * copies)
        made = [ChunkChoice(index=i, delta=delta, logprobs=logprobs, finish_reason=reason) for i in places]
        return b"".join(event(ChatChunk(choices=[one], **identity)) for one in made)

    async for token in generated(place, served, model, order, desk.metrics, answers):
        if not began:
            began = True
            yield b"".join(chunk(one, Delta(role="assistant", content="")) for one in range(order.drawn))
        cutter = cutters[token.sequence]
        texts[token.sequence] += token.text
        text = "" if form.must_call else cutter.push(token.text)
        calls: list[ToolCall] = []
        if token.finish_reason is not None:
            whole = StopCutter(order.stops)
            content, calls = form.found(whole.push(texts[token.sequence]) + whole.flush())
            if not calls:
                # Where no call was found, what looked like one is text.
                text = (content or "")[len(shown[token.sequence]) :]
        shown[token.sequence] += text
        logprobs = ChatLogprobs(content=token_logprobs(tokenizer, [token])) if body.logprobs else None
        if text or logprobs:
            yield chunk(token.sequence, Delta(content=text), logprobs)
        if calls:
            told = [NewToolCall(index=i, id=call.id, function=call.function) for i, call in enumerate(calls)]
            yield chunk(token.sequence, Delta(tool_calls=told))
        if token.finish_reason is not None:
            yield chunk(token.sequence, Delta(), reason=form.finish_reason(token.finish_reason, calls))
    usage = counted(request, answers, stream=True)
    if body.stream_options is not None and body.stream_options.include_usage:
        yield event(ChatChunk(choices=[], usage=usage, **identity))
    yield DONE
