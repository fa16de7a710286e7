"""Every field has a row: those of the installed client's types, of the references, and of the server's own bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from tests.clients.callers import Refused, call_openai
from tests.clients.catalog import LISTED, OPENAI_ROUTES, ROWS, literals, openai_fields
from tests.clients.langchain import way
from tests.clients.rows.inputs import EMBEDDINGS
from tests.clients.rows.responses import RESPONSES
from tests.clients.rows.texts import CHAT, CHAT_BASE, COMPLETIONS, SAID
from tests.clients.table import PAGE, table, with_table
from tests.clients.wire import Wire

pytestmark = pytest.mark.xdist_group("clients")


def _named(route: str) -> set[str]:
    return {row.name for row in ROWS if row.route == route}


@pytest.mark.parametrize("route", OPENAI_ROUTES)
def test_every_field_of_the_client_has_a_row(route: str) -> None:
    assert {*openai_fields(route)} <= _named(route)


@pytest.mark.parametrize(
    ("route", "fields"), [(route, fields) for route, listed in LISTED.items() for fields in listed.values()]
)
def test_every_field_of_a_reference_has_a_row(route: str, fields: Sequence[str]) -> None:
    assert {*fields} <= _named(route)


@pytest.mark.parametrize("route", [*OPENAI_ROUTES, *LISTED])
def test_every_field_of_the_server_has_a_row_and_no_row_is_of_another(wire: Wire, route: str) -> None:
    (takes,) = [one.takes for one in wire.application.routes if one.path == route]
    assert _named(route) == {one.name for one in msgspec.structs.fields(takes)} | {"colour"}


_ROLES = {"system", "developer", "user", "assistant", "tool"}
_KINDS: Sequence[tuple[str, str, str, set[str], str, Any]] = (
    # Route, field, its part, those that are taken, what it is put in, other fields.
    (CHAT, "messages", "role", _ROLES, "turn", {}),
    (CHAT, "tools", "type", {"function"}, "object", {}),
    (CHAT, "tool_choice", "type", {"function"}, "choice", {"tools": []}),
    (CHAT, "response_format", "type", {"text", "json_object", "json_schema"}, "choice", {}),
    (RESPONSES, "input", "type", {"message"}, "object", {}),
    (RESPONSES, "tools", "type", set(), "object", {}),
    (RESPONSES, "tool_choice", "type", set(), "choice", {}),
)


@pytest.mark.parametrize(("route", "name", "part", "taken", "place", "others"), _KINDS)
def test_every_other_kind_of_the_client_is_refused_by_name(
    wire: Wire, route: str, name: str, part: str, taken: set[str], place: str, others: Any
) -> None:
    known = literals(openai_fields(route)[name], part)
    assert taken <= known
    for kind in sorted(known - taken):
        made: Any = {part: kind} | ({"content": "x"} if place == "turn" else {})
        base = CHAT_BASE if route == CHAT else {"model": "chat", "input": SAID}
        with pytest.raises(Refused) as caught:
            call_openai(wire.address, route, {**base, **others, name: made if place == "choice" else [made]})
        error = caught.value.error
        assert caught.value.status == 400, (kind, error)
        assert str(error["param"]).startswith(name), (kind, error)
        assert kind in error["message"], (kind, error)


_OF_LANGCHAIN = {
    *("client", "async_client", "root_client", "root_async_client", "http_client", "http_async_client"),
    *("openai_api_key", "openai_api_base", "openai_organization", "openai_proxy", "openai_api_type"),
    *("openai_api_version", "request_timeout", "max_retries", "retry_min_seconds", "retry_max_seconds"),
    *("default_headers", "default_query", "headers", "http_socket_options", "stream_chunk_timeout"),
    *("tiktoken_model_name", "tiktoken_enabled", "embedding_ctx_length", "check_embedding_ctx_length"),
    *("allowed_special", "disallowed_special", "chunk_size", "batch_size", "show_progress_bar", "skip_empty"),
    *("include_response_headers", "output_version", "use_responses_api", "disabled_params", "deployment"),
}
"""Options that are no field: of connections, of its own tokenizer, and of what it makes of answers."""
_OTHERWISE = {
    *("model_name", "model_kwargs", "extra_body"),
    # The same as `stream()`, usage in a stream, `max_completion_tokens`, and `previous_response_id`.
    *("streaming", "stream_usage", "max_tokens", "use_previous_response_id"),
}
"""Options whose fields have a row under another name."""


@pytest.mark.parametrize(
    ("name", "routes"),
    [("ChatOpenAI", (CHAT, RESPONSES)), ("OpenAI", (COMPLETIONS,)), ("OpenAIEmbeddings", (EMBEDDINGS,))],
)
def test_every_option_of_langchain_is_a_field_or_known_not_to_be_one(name: str, routes: Sequence[str]) -> None:
    import langchain_openai
    from langchain_core.language_models import BaseChatModel, BaseLLM

    kind = getattr(langchain_openai, name)
    general = {*BaseChatModel.model_fields, *BaseLLM.model_fields}
    sent = {way(row).removesuffix("=") for row in ROWS if row.route in routes}
    assert {*kind.model_fields} - general - sent <= _OF_LANGCHAIN | _OTHERWISE


def test_the_page_has_the_rows() -> None:
    page = PAGE.read_text()
    assert with_table(page, table()) == page, "Run python -m tests.clients.table"
