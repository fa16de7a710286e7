"""Each field of the routes' requests, by each client: it works, or is refused with its reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from tests.clients.answers import Answer
from tests.clients.callers import Refused, call_curl, call_openai
from tests.clients.catalog import ROWS
from tests.clients.langchain import call_langchain, way
from tests.clients.rows.row import Row
from tests.clients.wire import Wire

pytestmark = [
    pytest.mark.xdist_group("clients"),
    # Requests for it are among the rows.
    pytest.mark.filterwarnings("ignore::pipeload.TruncationWarning"),
]

_CALLS: Mapping[str, Callable[[str, str, Mapping[str, Any]], Any]] = {
    "openai": call_openai,
    "langchain-openai": call_langchain,
    "curl": call_curl,
}
_NAMES = ("id", "status")
"""Of turns: LangChain gives none where they are not its own."""
_BASES: dict[str, Answer] = {}


def _base(wire: Wire, row: Row) -> Answer:
    key = f"{row.route} {row.base}"
    if key not in _BASES:
        call_openai(wire.address, row.route, row.base)
        _BASES[key] = Answer(wire.answer)
    return _BASES[key]


@pytest.mark.parametrize("client", _CALLS)
@pytest.mark.parametrize("row", ROWS, ids=[f"{row.route}-{row.name}-{row.shown}" for row in ROWS])
def test_a_field(wire: Wire, row: Row, client: str) -> None:
    if client == "curl" and shutil.which("curl") is None:
        pytest.skip("needs curl")
    if client == "langchain-openai" and not way(row):
        pytest.skip("langchain-openai does not send it")
    call = _CALLS[client]
    if row.holds is None:
        with pytest.raises(Refused) as caught:
            call(wire.address, row.route, row.body)
        error = caught.value.error
        assert (caught.value.status, error["param"] or "") == (row.status, row.param), error
        assert row.words in error["message"], error
        assert error["type"] == "invalid_request_error"
    else:
        base = _base(wire, row)
        made = call(wire.address, row.route, row.body)
        answer = Answer(wire.answer)
        assert row.holds(answer, base), wire.answer
        if client == "curl":
            assert made == wire.answer
        elif made:
            # The client has understood the answer.
            assert made[0] == answer.texts[0]
    # The client has sent the value, and not dropped or changed it.
    assert row.name in wire.sent, wire.sent
    sent = wire.sent[row.name]
    assert _alike(row.value, sent), sent


def _alike(value: Any, sent: Any) -> bool:
    """Whether a client has sent this value, perhaps with more fields, without names, or as a list of one."""
    if isinstance(value, dict) and isinstance(sent, dict):
        return all(_alike(one, sent.get(name)) for name, one in value.items() if name not in _NAMES)
    if isinstance(value, list) and isinstance(sent, list):
        return len(value) == len(sent) and all(map(_alike, value, sent))
    return bool(value == sent) or sent == [value]
