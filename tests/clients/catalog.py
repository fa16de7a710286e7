"""All rows, and the fields that each interface has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from tests.clients.rows.inputs import CLASSIFY, EMBED, EMBEDDINGS, INPUT_ROWS, RANK, RERANK, TOKENIZE
from tests.clients.rows.responses import RESPONSE_ROWS, RESPONSES
from tests.clients.rows.row import Row
from tests.clients.rows.texts import CHAT, CHAT_ROWS, COMPLETION_ROWS, COMPLETIONS

__all__ = ["LISTED", "OPENAI_ROUTES", "ROWS", "literals", "openai_fields"]

ROWS: tuple[Row, ...] = (*CHAT_ROWS, *COMPLETION_ROWS, *RESPONSE_ROWS, *INPUT_ROWS)

OPENAI_ROUTES = (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS)
"""Routes whose fields the client's own types list."""

LISTED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    RERANK: {
        "Jina": ("model", "query", "documents", "top_n", "return_documents", "truncation"),
        "Cohere": (
            *("model", "query", "documents", "top_n", "max_tokens_per_doc", "priority"),
            *("return_documents", "rank_fields", "max_chunks_per_doc"),
        ),
    },
    RANK: {"TEI": ("query", "texts", "raw_scores", "return_text", "truncate", "truncation_direction")},
    EMBED: {"TEI": ("inputs", "normalize", "truncate", "truncation_direction", "prompt_name", "dimensions")},
    TOKENIZE: {
        "vLLM": (
            *("model", "prompt", "messages", "add_special_tokens", "return_token_strs", "add_generation_prompt"),
            *("continue_final_message", "chat_template", "chat_template_kwargs", "mm_processor_kwargs", "tools"),
        )
    },
    CLASSIFY: {},
}
"""Route -> interface -> its fields, as its reference has them: there is no client whose types list these."""


def openai_fields(route: str) -> dict[str, Any]:
    """The fields that the installed client sends to a route, and their types."""
    from openai.types import completion_create_params, embedding_create_params
    from openai.types.chat import completion_create_params as chat_create_params
    from openai.types.responses import response_create_params

    kinds: Mapping[str, Any] = {
        CHAT: chat_create_params.CompletionCreateParamsStreaming,
        COMPLETIONS: completion_create_params.CompletionCreateParamsStreaming,
        RESPONSES: response_create_params.ResponseCreateParamsStreaming,
        EMBEDDINGS: embedding_create_params.EmbeddingCreateParams,
    }
    return get_type_hints(kinds[route])


def literals(kind: Any, name: str) -> set[str]:
    """The words that objects within a type may have in a field, such as `type`.

    Args:
        kind: a type of the client, of lists, unions and TypedDicts.
        name: of the field.
    """
    if isinstance(kind, type) and hasattr(kind, "__required_keys__"):
        told = get_type_hints(kind).get(name)
        return {one for one in _words(told) if isinstance(one, str)}
    return {one for part in get_args(kind) if not isinstance(part, str) for one in literals(part, name)}


def _words(kind: Any) -> tuple[Any, ...]:
    """The words of a `Literal`, which may be optional."""
    return tuple(one for part in get_args(kind) for one in (_words(part) if get_args(part) else (part,)))
