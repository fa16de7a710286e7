"""Fields of the routes that generate nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from tests.clients.answers import Answer
from tests.clients.rows.row import Row, cannot, nothing, refuses, works

__all__ = ["CLASSIFY", "EMBED", "EMBEDDINGS", "INPUT_ROWS", "RANK", "RERANK", "TOKENIZE"]

EMBEDDINGS, EMBED = "/v1/embeddings", "/embed"
RERANK, RANK = "/v1/rerank", "/rerank"
CLASSIFY, TOKENIZE = "/v1/classify", "/tokenize"
_DOCUMENTS = ["paris is nice", "the cat sat", "london"]
_TEXTS = ["the cat", "a dog sat"]
_LONG = "the cat " * 20


def _near(one: Any, other: Any) -> bool:
    return one.shape == other.shape and np.allclose(one, other, atol=1e-5)


def _embedding_rows() -> list[Row]:
    base: Mapping[str, Any] = {"model": "embedder", "input": _TEXTS}
    take, refuse = partial(works, EMBEDDINGS, base), partial(refuses, EMBEDDINGS, base)
    return [
        take("model", "embedder", "a name or an alias", lambda a, _: a.body["model"] == "embedder"),
        refuse("model", "gpt-5", "404: it is not here", "There is no model 'gpt-5' here", status=404),
        take("input", "the cat", "a text", lambda a, b: _near(a.vectors, b.vectors[:1])),
        take("input", _TEXTS[::-1], "several texts", lambda a, b: _near(a.vectors, b.vectors[::-1])),
        take("input", [6, 7], "token ids", lambda a, _: a.vectors.shape == (1, 64)),
        take("input", [[6, 7], [8]], "token ids of several texts", lambda a, _: a.vectors.shape == (2, 64)),
        refuse("input", _LONG, "texts that are too long", "has more than the 16 tokens that the model takes"),
        take("dimensions", 4, "the first numbers", lambda a, _: a.vectors.shape == (2, 4)),
        refuse("dimensions", 65, "more than the model has", "vectors have 64"),
        take("encoding_format", "float", "numbers", lambda a, b: _near(a.vectors, b.vectors)),
        take("encoding_format", "base64", "bytes of float32", lambda a, b: _near(a.vectors, b.vectors)),
        *nothing(EMBEDDINGS, base, user="me"),
        refuse("colour", "red", "an unknown field", "unknown field `colour`"),
    ]


def _embed_rows() -> list[Row]:
    base: Mapping[str, Any] = {"inputs": _TEXTS}
    take, refuse = partial(works, EMBED, base), partial(refuses, EMBED, base)
    ones = np.ones(2, np.float32)
    return [
        take("inputs", "the cat", "a text", lambda a, b: _near(a.vectors, b.vectors[:1])),
        take("inputs", _TEXTS[::-1], "several texts", lambda a, b: _near(a.vectors, b.vectors[::-1])),
        take("normalize", True, "length 1", lambda a, _: _near(np.linalg.norm(a.vectors, axis=1), ones)),
        take("normalize", False, "as the model has it", lambda a, b: not _near(a.vectors, b.vectors)),
        take("truncate", True, "cuts texts", lambda a, _: a.vectors.shape == (1, 64), inputs=_LONG),
        refuse("truncate", False, "texts that are too long", "has more than the 16 tokens", "inputs", inputs=_LONG),
        *nothing(EMBED, base, "the end is cut", truncation_direction="Right"),
        refuse("truncation_direction", "Left", "only the end is cut", "Only the end of a text is cut"),
        refuse("prompt_name", "query", "a prompt that the model has not", "'query'", ""),
        take("dimensions", 4, "the first numbers", lambda a, _: a.vectors.shape == (2, 4)),
        refuse("colour", "red", "an unknown field", "unknown field `colour`"),
    ]


def _order(answer: Answer) -> list[int]:
    found = answer.body if isinstance(answer.body, list) else answer.body["results"]
    return [one["index"] for one in found]


def _rerank_rows() -> list[Row]:
    base: Mapping[str, Any] = {"model": "scorer", "query": "paris", "documents": _DOCUMENTS}
    take, refuse = partial(works, RERANK, base), partial(refuses, RERANK, base)
    objects = [{"text": text} for text in _DOCUMENTS]
    return [
        take("model", "scorer", "a name or an alias", lambda a, _: a.body["model"] == "scorer"),
        take("query", "the cat", "a text", lambda a, b: not a.same(b)),
        take("documents", _DOCUMENTS[:2], "texts", lambda a, _: {*_order(a)} == {0, 1}),
        take("documents", objects, "objects with `text`", lambda a, b: a.same(b)),
        take("top_n", 2, "the best", lambda a, b: _order(a) == _order(b)[:2]),
        take(
            "return_documents",
            True,
            "the texts, too",
            lambda a, _: all(one["document"]["text"] == _DOCUMENTS[one["index"]] for one in a.body["results"]),
        ),
        *nothing(RERANK, base, "pairs that are too long are cut", truncation=True),
        *cannot(RERANK, base, "pairs that are too long are cut", truncation=False),
        *cannot(RERANK, base, "documents are cut where the model ends", max_tokens_per_doc=9, max_chunks_per_doc=2),
        *cannot(RERANK, base, "all documents are scored", overfetch_factor=2),
        *nothing(RERANK, base, "the field that is read", rank_fields=["text"]),
        *cannot(RERANK, base, "only `text` is read", rank_fields=["title"]),
        *nothing(RERANK, base, "calls are served as they come", priority=3),
        refuse("colour", "red", "an unknown field", "unknown field `colour`"),
    ]


def _rank_rows() -> list[Row]:
    base: Mapping[str, Any] = {"query": "paris", "texts": _DOCUMENTS}
    take, refuse = partial(works, RANK, base), partial(refuses, RANK, base)
    return [
        take("query", "the cat", "a text", lambda a, b: not a.same(b)),
        take("texts", _DOCUMENTS[:2], "texts", lambda a, _: {*_order(a)} == {0, 1}),
        take(
            "return_text",
            True,
            "the texts, too",
            lambda a, _: all(one["text"] == _DOCUMENTS[one["index"]] for one in a.body),
        ),
        *nothing(RANK, base, "scores as the model has them", raw_scores=False),
        *cannot(RANK, base, "scores go through the model's activation", raw_scores=True),
        *nothing(RANK, base, "pairs that are too long are cut", truncate=True, truncation_direction="Right"),
        *cannot(RANK, base, "only the end is cut", truncation_direction="Left"),
        refuse("colour", "red", "an unknown field", "unknown field `colour`"),
    ]


def _classify_rows() -> list[Row]:
    base: Mapping[str, Any] = {"model": "scorer", "input": ["the cat"]}
    take, refuse = partial(works, CLASSIFY, base), partial(refuses, CLASSIFY, base)
    return [
        take("model", "scorer", "a name or an alias", lambda a, _: a.body["model"] == "scorer"),
        take("input", "the cat", "a text", lambda a, b: a.same(b)),
        take("input", ["the cat", "london"], "several texts", lambda a, _: len(a.body["data"]) == 2),
        take("input", [{"text": "the cat"}], "objects with `text`", lambda a, b: a.same(b)),
        take("input", {"text": "the cat", "text_pair": "london"}, "a pair", lambda a, b: not a.same(b)),
        refuse("input", {"image": "AA=="}, "images, by a model for texts", "This model takes texts"),
        take("top_k", 1, "the best labels", lambda a, _: len(a.body["data"][0]["labels"]) == 1),
        *nothing(CLASSIFY, base, "for entities", aggregation_strategy="max"),
        refuse("aggregation_strategy", "sum", "another word", "'sum'"),
        refuse("colour", "red", "an unknown field", "unknown field `colour`"),
    ]


def _tokenize_rows() -> list[Row]:
    base: Mapping[str, Any] = {"model": "embedder", "prompt": "the cat"}
    take, refuse = partial(works, TOKENIZE, base), partial(refuses, TOKENIZE, base)
    chat: dict[str, Any] = {"model": "chat", "prompt": None, "messages": [{"role": "user", "content": "the cat"}]}

    def cannot_chat(name: str, value: Any, effect: str) -> Row:
        return refuse(name, value, effect, f"{name} is ", **chat)

    return [
        take("model", "chat", "a name or an alias", lambda a, b: a.body["tokens"] != b.body["tokens"]),
        take("prompt", "the cat sat", "a text", lambda a, _: a.body["count"] == 5),
        take("messages", chat["messages"], "a conversation", lambda a, _: a.body["count"] > 2, **chat),
        take("add_special_tokens", False, "those of the text alone", lambda a, _: a.body["count"] == 2),
        take("return_token_strs", True, "texts of tokens", lambda a, _: a.body["token_strs"][1:-1] == ["the", "cat"]),
        take("add_generation_prompt", True, "the beginning of an answer", lambda a, _: a.body["count"] > 2, **chat),
        cannot_chat("add_generation_prompt", False, "conversations are for an answer"),
        *nothing(TOKENIZE, base, "conversations are for an answer", continue_final_message=False),
        cannot_chat("continue_final_message", True, "conversations are for an answer"),
        cannot_chat("chat_template", "{{ messages }}", "the model's own template is used"),
        cannot_chat("chat_template_kwargs", {"enable_thinking": False}, "the model's own template is used"),
        cannot_chat("mm_processor_kwargs", {"num_crops": 1}, "models read text"),
        *nothing(TOKENIZE, base, "no functions", tools=[]),
        cannot_chat("tools", [{"type": "function", "function": {"name": "feed"}}], "in `/v1/chat/completions`"),
        refuse("colour", "red", "an unknown field", "unknown field `colour`"),
    ]


INPUT_ROWS = [
    *_embedding_rows(),
    *_rerank_rows(),
    *_classify_rows(),
    *_rank_rows(),
    *_embed_rows(),
    *_tokenize_rows(),
]
