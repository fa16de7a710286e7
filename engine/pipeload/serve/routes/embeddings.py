"""`/v1/embeddings`, and `/embed` of text-embeddings-inference."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from pipeload.serve.bodies.embeddings import (
    Embedding,
    EmbeddingsAnswer,
    EmbeddingsRequest,
    EmbedRequest,
    InputUsage,
)
from pipeload.serve.errors import ApiError
from pipeload.serve.reading import read
from pipeload.serve.routes.desk import Desk, DeskRoute, json_response, note
from pipeload.serve.routes.inputs import listed
from pipeload.tasks.text.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from pipeload.model import Model

__all__ = ["routes"]

_TASKS = ("feature-extraction",)


def routes(desk: Desk) -> list[DeskRoute]:
    """The routes of this module."""
    return [
        DeskRoute("/v1/embeddings", embeddings, desk, takes=EmbeddingsRequest, gives=EmbeddingsAnswer),
        DeskRoute("/embed", embed, desk, takes=EmbedRequest, gives=list[list[float]]),
    ]


async def embeddings(desk: Desk, request: Request) -> Response:
    """The vectors of texts, as OpenAI has it."""
    body = await read(request, EmbeddingsRequest)
    texts = listed(body.input, "input")
    served = desk.models.find(body.model, _TASKS)
    options: dict[str, Any] = {}
    if body.dimensions is not None:
        options = {"truncate_dim": body.dimensions, "normalize": True}
    async with desk.call(request, served) as (place, model):
        vectors, tokens = await place.run(lambda: _embedded(model, texts, "input", cut=False, **options))
    note(request, inputs=len(texts), prompt_tokens=tokens)
    data = [
        Embedding(index=index, embedding=_base64(vector) if body.encoding_format == "base64" else vector.tolist())
        for index, vector in enumerate(vectors)
    ]
    usage = InputUsage(prompt_tokens=tokens, total_tokens=tokens)
    return json_response(EmbeddingsAnswer(data=data, model=body.model or served.name, usage=usage))


async def embed(desk: Desk, request: Request) -> Response:
    """The vectors of texts, as text-embeddings-inference has it."""
    body = await read(request, EmbedRequest)
    if body.truncation_direction not in (None, "Right", "right"):
        raise ApiError(400, "Only the end of a text is cut.", param="truncation_direction")
    texts = listed(body.inputs, "inputs")
    options: dict[str, Any] = {
        "truncate_dim": body.dimensions,
        "normalize": body.normalize,
        "prompt_name": body.prompt_name,
    }
    async with desk.call(request, desk.models.find(None, _TASKS)) as (place, model):
        vectors, tokens = await place.run(lambda: _embedded(model, texts, "inputs", cut=bool(body.truncate), **options))
    note(request, inputs=len(texts), prompt_tokens=tokens)
    return json_response([vector.tolist() for vector in vectors])


def _embedded(
    model: Model,
    texts: Sequence[str | list[int]],
    name: str,
    *,
    cut: bool,
    truncate_dim: int | None = None,
    **options: Any,
) -> tuple[NDArray[np.float32], int]:
    """The vectors of texts, which came in the field of this name, and the number of tokens that they were made of."""
    tokenizer = tokenizer_of(model)
    tokens = 0
    for index, text in enumerate(texts):
        row = tokenizer.encode(text) if isinstance(text, str) else tokenizer.given(tokenizer.checked_ids(text))
        tokens += len(row.ids)
        if row.cut and not cut:
            raise ApiError(
                400,
                f"Text {index} has more than the {tokenizer.max_length} tokens that the model takes. Split it.",
                code="context_length_exceeded",
                param=name,
            )
    vectors = model.embed(texts, truncate_dim=truncate_dim, **options)
    if truncate_dim is not None and vectors.shape[1] < truncate_dim:
        raise ApiError(
            400, f"dimensions is {truncate_dim}, and the model's vectors have {vectors.shape[1]}.", param="dimensions"
        )
    return vectors, tokens


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode()
