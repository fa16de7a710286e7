"""Bodies of `/v1/rerank`, as Jina and Cohere have it, and of `/rerank` of text-embeddings-inference (TEI)."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pipeload.serve.bodies.embeddings import InputUsage

__all__ = ["Document", "RankedDocument", "RankedText", "RankRequest", "RerankAnswer", "RerankRequest"]


class Document(msgspec.Struct, kw_only=True):
    """A document."""

    text: str


class RerankRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Documents to order by how well they answer a query.

    Attributes:
        model: a name of `/v1/models`; may be left out where one model classifies texts.
        query: what is asked.
        documents: texts, or objects with `text`.
        top_n: the most documents in the answer.
        return_documents: the answer has the documents' texts, too.
        priority: has no effect: calls are served as they come.
        truncation: pairs that are longer than the model takes are always cut.
    """

    query: str
    documents: list[str | Document]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool | None = None
    priority: int | None = None
    truncation: Any = None
    max_tokens_per_doc: Any = None
    max_chunks_per_doc: Any = None
    rank_fields: Any = None
    overfetch_factor: Any = None


class RankedDocument(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A document in the answer."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankAnswer(msgspec.Struct, kw_only=True):
    """The documents, best first."""

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RankedDocument]
    usage: InputUsage


class RankRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Texts to order, as TEI takes them.

    Attributes:
        query: what is asked.
        texts: the texts.
        raw_scores: scores without the model's own activation, which this server does not give.
        return_text: the answer has the texts, too.
        truncate: has no effect: pairs that are longer than the model takes are cut.
        truncation_direction: only the end of a text is cut.
    """

    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = None
    truncation_direction: str | None = None


class RankedText(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A text in TEI's answer, a list of these, best first."""

    index: int
    score: float
    text: str | None = None
