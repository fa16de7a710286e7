"""`/v1/rerank`, and `/rerank` of text-embeddings-inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from pipeload.serve.bodies.embeddings import InputUsage
from pipeload.serve.bodies.ranking import (
    Document,
    RankedDocument,
    RankedText,
    RankRequest,
    RerankAnswer,
    RerankRequest,
)
from pipeload.serve.errors import ApiError
from pipeload.serve.models import Served
from pipeload.serve.reading import read, refuse
from pipeload.serve.routes.desk import Desk, DeskRoute, json_response, new_id, note
from pipeload.serve.routes.inputs import check_count
from pipeload.serve.settings import LIMITS
from pipeload.tasks.classify.rerank import Ranked
from pipeload.tasks.text.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from pipeload.model import Model

__all__ = ["routes"]

_TASKS = ("text-classification",)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "truncation": (True,),
    "max_tokens_per_doc": (),
    "max_chunks_per_doc": (),
    "rank_fields": (["text"],),
    "overfetch_factor": (),
}


def routes(desk: Desk) -> list[DeskRoute]:
    """The routes of this module."""
    return [
        DeskRoute("/v1/rerank", rerank, desk, takes=RerankRequest, gives=RerankAnswer),
        DeskRoute("/rerank", rank, desk, takes=RankRequest, gives=list[RankedText]),
    ]


async def rerank(desk: Desk, request: Request) -> Response:
    """Order documents by how well they answer a query."""
    body = await read(request, RerankRequest)
    refuse(body, _NEUTRAL)
    documents = [one if isinstance(one, str) else one.text for one in body.documents]
    served = desk.models.find(body.model, _TASKS)
    ranked, tokens = await _ranked(desk, request, served, body.query, documents, "documents", body.top_n)
    results = [
        RankedDocument(
            index=one.index,
            relevance_score=one.score,
            document=Document(text=one.text) if body.return_documents else None,
        )
        for one in ranked
    ]
    usage = InputUsage(prompt_tokens=tokens, total_tokens=tokens)
    return json_response(
        RerankAnswer(id=new_id("rerank"), model=body.model or served.name, results=results, usage=usage)
    )


async def rank(desk: Desk, request: Request) -> Response:
    """Order texts, as text-embeddings-inference does."""
    body = await read(request, RankRequest)
    refuse(body, {"raw_scores": (False,), "truncation_direction": ("Right", "right")})
    served = desk.models.find(None, _TASKS)
    ranked, _ = await _ranked(desk, request, served, body.query, body.texts, "texts", None)
    return json_response(
        [RankedText(index=one.index, score=one.score, text=one.text if body.return_text else None) for one in ranked]
    )


async def _ranked(
    desk: Desk,
    request: Request,
    served: Served,
    query: str,
    documents: Sequence[str],
    name: str,
    top: int | None,
) -> tuple[list[Ranked], int]:
    check_count(documents, name)
    if top is not None and top < 1:
        raise ApiError(400, f"top_n is {top}; it must be at least 1.", param="top_n")
    # A request is small, and the query is read with each text.
    if len(query) * len(documents) > LIMITS.body_bytes:
        raise ApiError(
            400,
            f"The query has {len(query)} characters, which are read with each of {len(documents)} texts: at most "
            f"{LIMITS.body_bytes} in all. Shorten it, or send fewer texts.",
            param="query",
        )

    def work(model: Model) -> tuple[list[Ranked], int]:
        ranked = model.rerank(query, documents, top_k=top)
        tokenizer = tokenizer_of(model)
        return ranked, sum(len(tokenizer.encode(query, document).ids) for document in documents)

    async with desk.call(request, served) as (place, model):
        ranked, tokens = await place.run(lambda: work(model))
    note(request, inputs=len(documents), prompt_tokens=tokens)
    return ranked, tokens
