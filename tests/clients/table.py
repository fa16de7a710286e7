"""Writes the table of docs/clients.md from the rows that the tests try.

    python -m tests.clients.table

What LangChain sends a field by is asked of the installed classes, so it needs the packages of `.[dev]`.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.clients.catalog import OPENAI_ROUTES, ROWS
from tests.clients.langchain import way, why_not
from tests.clients.rows.row import Row
from tests.models import REPOSITORY

__all__ = ["PAGE", "table", "with_table"]

PAGE = REPOSITORY / "docs" / "clients.md"
_BEGIN, _END = "<!-- clients: made by python -m tests.clients.table -->", "<!-- end of clients -->"

_LONGEST = 40
"""Characters of a conversation that are shown."""


def table() -> str:
    """A section of each route."""
    return "\n".join(line for route in dict.fromkeys(row.route for row in ROWS) for line in _section(route))


def with_table(page: str, made: str) -> str:
    """The page with this table between its marks."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{made}\n{_END}{after}"


def _section(route: str) -> Iterator[str]:
    yield f"### `{route}`"
    yield ""
    if route in OPENAI_ROUTES:
        yield "| field | value | openai | langchain-openai | curl | |"
    else:
        yield "| field | value | openai, by `client.post()` | langchain-openai | curl | |"
    yield "| --- | --- | --- | --- | --- | --- |"
    before = ""
    for row in ROWS:
        if row.route == route:
            yield _line(row, repeated=row.name == before)
            before = row.name
    yield ""


def _line(row: Row, *, repeated: bool) -> str:
    outcome = "works" if row.holds else "refused"
    by = way(row)
    langchain = f"{outcome}, `{by}`" if by else f"- ({why})" if (why := why_not(row)) else "-"
    # Of conversations, the last column says more.
    value = "" if row.name in ("messages", "input") and len(row.shown) > _LONGEST else f"`{row.shown}`"
    cells = ["" if repeated else f"`{row.name}`", value, outcome, langchain, outcome, row.effect]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(), table()))
