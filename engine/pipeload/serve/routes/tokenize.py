"""`/tokenize`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from pipeload.serve.bodies.tokenize import TokenizeAnswer, TokenizeRequest
from pipeload.serve.errors import ApiError
from pipeload.serve.reading import read, refuse
from pipeload.serve.routes.chat import messages_of
from pipeload.serve.routes.desk import Desk, DeskRoute, json_response, note
from pipeload.serve.routes.tokens import token_text
from pipeload.tasks.runner import config_of
from pipeload.tasks.text.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from pipeload.model import Model

__all__ = ["routes"]

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "tools": ([],),
}


def routes(desk: Desk) -> list[DeskRoute]:
    """The routes of this module."""
    return [DeskRoute("/tokenize", tokenize, desk, takes=TokenizeRequest, gives=TokenizeAnswer)]


async def tokenize(desk: Desk, request: Request) -> Response:
    """The token ids of a text or a conversation."""
    body = await read(request, TokenizeRequest)
    refuse(body, _NEUTRAL)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Send either prompt or messages.", param="prompt")
    messages = None if body.messages is None else messages_of(body.messages)
    served = desk.models.find(body.model)

    def work(model: Model) -> TokenizeAnswer:
        tokenizer = tokenizer_of(model)
        if messages is not None:
            tokens = model.chat_prompt(messages)
        else:
            tokens = [*tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens).ids]
        longest = config_of(model).max_positions if tokenizer.max_length is None else tokenizer.max_length
        texts = [token_text(tokenizer, token) for token in tokens] if body.return_token_strs else None
        return TokenizeAnswer(count=len(tokens), max_model_len=longest, tokens=tokens, token_strs=texts)

    async with desk.call(request, served) as (place, model):
        answer = await place.run(lambda: work(model))
    note(request, prompt_tokens=answer.count)
    return json_response(answer)
