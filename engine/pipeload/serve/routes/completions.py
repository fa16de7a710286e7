"""`/v1/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from pipeload.serve.admission import Place
from pipeload.serve.bodies.completions import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from pipeload.serve.errors import ApiError
from pipeload.serve.generation import Answers, generated
from pipeload.serve.models import Served
from pipeload.serve.reading import read, refuse
from pipeload.serve.routes.desk import Desk, DeskRoute, counted, json_response, new_id
from pipeload.serve.routes.inputs import listed
from pipeload.serve.routes.tokens import finish_reason, token_text
from pipeload.serve.sampling import TOP_LOGPROBS, Order, order_of, within
from pipeload.serve.sse import DONE, event
from pipeload.serve.stops import StopCutter
from pipeload.tasks.generate.prompts import token_ids, tokenizer_if_any
from pipeload.tasks.generate.sequence import NewToken
from pipeload.tasks.text.tokenizer import Tokenizer, tokenizer_of

if TYPE_CHECKING:
    from pipeload.model import Model

__all__ = ["routes"]

_NEUTRAL: dict[str, tuple[Any, ...]] = {"echo": (False,), "best_of": (1,), "suffix": ("",)}


def routes(desk: Desk) -> list[DeskRoute]:
    """The routes of this module."""
    return [DeskRoute("/v1/completions", completions, desk, takes=CompletionRequest, gives=CompletionAnswer)]


async def completions(desk: Desk, request: Request) -> Response:
    """Go on with texts."""
    body = await read(request, CompletionRequest)
    refuse(body, _NEUTRAL)
    prompts = listed(body.prompt, "prompt")
    served = desk.models.find(body.model, ("text-generation",))
    identity: dict[str, Any] = {"id": new_id("cmpl"), "created": int(time.time()), "model": body.model or served.name}

    async def ordered(place: Place, model: Model) -> Order:
        def work() -> Order:
            tokenizer = tokenizer_if_any(model, required=any(isinstance(one, str) for one in prompts))
            return order_of(
                model,
                body,
                [token_ids(one, tokenizer) for one in prompts],
                max_tokens=body.max_tokens,
                logprobs=body.logprobs is not None,
                top_logprobs=within("logprobs", body.logprobs or 0, 0, TOP_LOGPROBS),
            )

        return await place.run(work)

    async def events(place: Place, model: Model) -> AsyncGenerator[bytes, None]:
        return _events(desk, request, body, served, place, model, await ordered(place, model), identity)

    if body.stream:
        return await desk.stream(request, served, events)
    async with desk.call(request, served) as (place, model):
        order = await ordered(place, model)
        answers = Answers()
        told = [token async for token in generated(place, served, model, order, desk.metrics, answers)]
        choices = _choices(model, order, answers, told)
        del model
    usage = counted(request, answers)
    return json_response(CompletionAnswer(choices=choices, usage=usage, **identity))


def _choices(model: Model, order: Order, answers: Answers, told: Sequence[NewToken]) -> list[CompletionChoice]:
    choices, copies = [], order.copies // order.drawn
    for index, one in enumerate(answers.results):
        if one.text is None:
            raise ApiError(400, "The model has no tokenizer, so its tokens have no text here.")
        cutter = StopCutter(order.stops)
        text = cutter.push(one.text) + cutter.flush()
        logprobs = None
        if one.logprobs is not None:
            own = [token for token in told if token.sequence == index // copies]
            logprobs = _logprobs(tokenizer_of(model), own, 0)
        reason: Any = finish_reason(one.finish_reason)
        choices.append(CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason))
    return choices


async def _events(
    desk: Desk,
    request: Request,
    body: CompletionRequest,
    served: Served,
    place: Place,
    model: Model,
    order: Order,
    identity: dict[str, Any],
) -> AsyncGenerator[bytes, None]:
    tokenizer = tokenizer_of(model)
    answers, copies = Answers(), order.copies // order.drawn
    sequences = order.drawn * len(order.prompts)
    cutters = [StopCutter(order.stops) for _ in range(sequences)]
    lengths = [0] * sequences
    async for token in generated(place, served, model, order, desk.metrics, answers):
        cutter = cutters[token.sequence]
        text = cutter.push(token.text)
        if token.finish_reason is not None:
            text += cutter.flush()
        logprobs = None
        if body.logprobs is not None:
            logprobs = _logprobs(tokenizer, [token], lengths[token.sequence])
        lengths[token.sequence] += len(token.text)
        reason: Any = finish_reason(token.finish_reason)
        if text or logprobs or reason:
            for place_ in range(token.sequence * copies, (token.sequence + 1) * copies):
                choice = CompletionChoice(index=place_, text=text, logprobs=logprobs, finish_reason=reason)
                yield event(CompletionAnswer(choices=[choice], **identity))
    usage = counted(request, answers, stream=True)
    if body.stream_options is not None and body.stream_options.include_usage:
        yield event(CompletionAnswer(choices=[], usage=usage, **identity))
    yield DONE


def _logprobs(tokenizer: Tokenizer, tokens: Sequence[NewToken], offset: int) -> CompletionLogprobs:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return CompletionLogprobs(
        tokens=[token_text(tokenizer, token.token_id) for token in tokens],
        token_logprobs=[token.logprob or 0.0 for token in tokens],
        top_logprobs=[
            {token_text(tokenizer, other): logprob for other, logprob in token.top_logprobs or ()} for token in tokens
        ],
        text_offset=offsets,
    )
