"""`/v1/classify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from pipeload.serve.bodies.classify import ClassifyAnswer, ClassifyRequest, Found, FoundLabel, Item
from pipeload.serve.bodies.embeddings import InputUsage
from pipeload.serve.errors import ApiError
from pipeload.serve.images import image_bytes
from pipeload.serve.reading import read
from pipeload.serve.routes.desk import Desk, DeskRoute, json_response, note
from pipeload.serve.routes.inputs import check_count
from pipeload.tasks.text.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from pipeload.model import Model

__all__ = ["routes"]

_IMAGES = "image-classification"
_TASKS = ("text-classification", "token-classification", _IMAGES)


def routes(desk: Desk) -> list[DeskRoute]:
    """The routes of this module."""
    return [DeskRoute("/v1/classify", classify, desk, takes=ClassifyRequest, gives=ClassifyAnswer)]


async def classify(desk: Desk, request: Request) -> Response:
    """The labels of texts, pairs of texts or images, or the entities in texts."""
    body = await read(request, ClassifyRequest)
    items = body.input if isinstance(body.input, list) else [body.input]
    check_count(items, "input")
    served = desk.models.find(body.model, _TASKS)
    images = served.manifest.task == _IMAGES
    inputs = [_image(item) if images else _text(item) for item in items]

    def work(model: Model) -> tuple[list[list[Any]], int | None]:
        read_ones: Sequence[Any] = [image_bytes(one) for one in inputs] if images else inputs
        found = model.classify(
            [*read_ones],
            top_k=body.top_k,
            aggregation_strategy=body.aggregation_strategy,
            batch_size=1 if images else 32,
        )
        return found, None if images else _tokens(model, inputs)

    async with desk.call(request, served) as (place, model):
        found, tokens = await place.run(lambda: work(model))
    note(request, inputs=len(items), prompt_tokens=tokens)
    return json_response(
        ClassifyAnswer(
            data=[Found(index=i, labels=[FoundLabel(**asdict(one)) for one in row]) for i, row in enumerate(found)],
            model=body.model or served.name,
            usage=None if tokens is None else InputUsage(prompt_tokens=tokens, total_tokens=tokens),
        )
    )


def _text(item: str | Item) -> Any:
    if isinstance(item, str):
        return item
    if item.text is None or item.image is not None:
        raise ApiError(400, "This model takes texts. Send a text, or text and text_pair.", param="input")
    return item.text if item.text_pair is None else (item.text, item.text_pair)


def _image(item: str | Item) -> str:
    if isinstance(item, str):
        return item
    if item.image is None or item.text is not None or item.text_pair is not None:
        raise ApiError(400, "This model takes images. Send image, as base64 or a data: URL.", param="input")
    return item.image


def _tokens(model: Model, inputs: Sequence[Any]) -> int:
    tokenizer = tokenizer_of(model)
    return sum(len(tokenizer.encode(*(one if isinstance(one, tuple) else (one,))).ids) for one in inputs)
